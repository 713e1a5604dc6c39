"""Stop candidates that are worse than the best so far, by Optuna's Wilcoxon signed-rank test on utterances.

A word error rate is a ratio of sums, but the test needs one value per utterance: its errors, times the contribution of
one error to the objective (`Objective.shares`). The mean of these values is the objective, so a candidate with larger
values is worse by the objective. If sets differ in their number of words, errors in a small set weigh more in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hsa.searches.dev_sets import DevSets
from hsa.searches.objectives import Objective
from hsa.searches.samplers import quiet_optuna

THRESHOLD = 0.05
"""The p-value below which a candidate is stopped."""


TESTED_WHOLE = 64
"""Number of blocks after each of which there is a test."""


def next_test(decoded: int) -> int:
    """The number of utterances that must be decoded before a candidate is tested again.

    The time of a test grows with the number of utterances decoded so far. With a test after every block, the total time
    would grow with the square of the dev set. After `TESTED_WHOLE` blocks, a test therefore waits until the number of
    decoded utterances has grown by a share of 1 / `TESTED_WHOLE`.

    Example:
        >>> next_test(16), next_test(64_000)
        (17, 65000)
    """
    return decoded + max(1, decoded // TESTED_WHOLE)


class Race:
    """A candidate against the incumbent, which is the best trial so far and has known errors for all utterances.

    Example:
        >>> race = Race(dev, Objective("mean"), incumbent_errors)  # doctest: +SKIP
        >>> race.is_lost(errors_of_the_first_block)  # doctest: +SKIP
        False
    """

    def __init__(
        self, dev: DevSets, objective: Objective, incumbent: Sequence[int], threshold: float = THRESHOLD
    ) -> None:
        self._shares = objective.shares(dev, dev.rates(incumbent))
        self._threshold = threshold
        self._study = _study(self._values(incumbent))

    def is_lost(self, errors: Sequence[int]) -> bool:
        """Whether the test finds a candidate with these errors of the first utterances worse than the incumbent."""
        import optuna

        values = self._values(errors)
        if len(values) < 2:
            return False
        with quiet_optuna():
            pruner = optuna.pruners.WilcoxonPruner(p_threshold=self._threshold)
        return bool(pruner.prune(self._study, _trial(optuna.trial.TrialState.RUNNING, values)))

    def _values(self, errors: Sequence[int]) -> dict[int, float]:
        pairs = zip(self._shares, errors, strict=False)
        return {number: share * error for number, (share, error) in enumerate(pairs) if share > 0.0}


def _study(values: Mapping[int, float]) -> Any:
    """An in-memory study whose best trial has these values, as the pruner requires."""
    import optuna

    with quiet_optuna():
        study = optuna.create_study(storage=optuna.storages.InMemoryStorage(), direction="minimize")
        study.add_trial(_trial(optuna.trial.TrialState.COMPLETE, values))
    return study


def _trial(state: Any, values: Mapping[int, float]) -> Any:
    import optuna

    complete = state == optuna.trial.TrialState.COMPLETE
    value = sum(values.values()) / len(values) if complete else None
    return optuna.trial.create_trial(state=state, value=value, intermediate_values=dict(values))
