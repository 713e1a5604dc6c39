"""Stop candidates that are worse than the best so far, by Optuna's Wilcoxon signed-rank test on utterances.

A word error rate is a ratio of sums, and the test takes one value for each utterance: its errors, times what one error
adds to the objective (`Objective.shares`). The mean of these values is the objective, so a candidate whose values are
larger is worse by the objective. Where sets differ in their words, errors in a small set weigh more, as they do there.
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
"""Blocks of which each is followed by a test."""


def next_test(decoded: int) -> int:
    """How many utterances must be decoded until a candidate is tested again.

    A test takes time that grows with the utterances decoded so far. With one after every block, a candidate on a large
    dev set would take time that grows with the square of the set, so after `TESTED_WHOLE` blocks a test waits until as
    many of them again as one in `TESTED_WHOLE` have been decoded.

    Example:
        >>> next_test(16), next_test(64_000)
        (17, 65000)
    """
    return decoded + max(1, decoded // TESTED_WHOLE)


class Race:
    """A candidate against the best trial so far (the incumbent), whose errors of all utterances are known.

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
        """Whether a candidate with these errors of the first utterances is worse than the incumbent, by the test."""
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
    """A study in memory whose best trial has these values, as the pruner wants it."""
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
