"""Trials as a search reports them: a candidate, its result, and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hsa.searches.candidates import Candidate, Result
from hsa.searches.dev_sets import DevSets
from hsa.searches.objectives import OWN, Objective

State = Literal["complete", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """A model that was scored on the dev sets.

    Args:
        number: its position among all trials, from 1.
        candidate: the model that was scored.
        state: `stopped` if it lost the race, `failed` if it could not be made or scored.
        values: the objective; for a stopped trial, over the decoded utterances; empty if it failed.
        rates: word error rates by dev set, as fractions, over the same utterances.
        drawn: the values that the sampler drew, by their names in the study.
        result: the errors of each utterance, and the cost.

    Example:
        >>> sources = {"base": "whisper-small", "models": ["m1", "m2"]}
        >>> study = hsa.search(sources, method="linear", dev=["dev.tsv"], trials=6, output="search")
        >>> study.trials[0].name, study.trials[0].settings
        ('whisper-small', {})
    """

    number: int
    candidate: Candidate
    state: State
    values: tuple[float, ...]
    rates: Mapping[str, float]
    result: Result
    drawn: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.candidate.name

    @property
    def method(self) -> str | None:
        return self.candidate.method

    @property
    def settings(self) -> Mapping[str, Any]:
        """Keywords of `hsa.merge` besides the sources, `method` and `output`."""
        return self.candidate.settings

    @property
    def value(self) -> float:
        """The objective; the mean of its values if there are several."""
        return sum(self.values) / len(self.values)

    @property
    def wer(self) -> float:
        """The objective as a word error rate, a fraction: 0.05 is 5 %. For a Pareto search, the mean of the sets."""
        return self.value

    def as_dict(self) -> dict[str, Any]:
        result = self.result.as_dict()
        return {
            "number": self.number,
            **self.candidate.as_dict(),
            "state": self.state,
            "values": list(self.values),
            "wer": dict(self.rates),
            "drawn": dict(self.drawn),
            **{key: result[key] for key in ("weights", "decoded", "failure", "seconds", "merging")},
            "utterances": len(self.result.errors),
        }


def make_trial(
    number: int,
    candidate: Candidate,
    result: Result,
    objective: Objective,
    dev: DevSets | None,
    drawn: Mapping[str, Any] | None = None,
) -> Trial:
    """Make a trial with its scores."""
    if result.failure is not None:
        return Trial(number, candidate, "failed", (), {}, result, drawn or {})
    if objective.kind == OWN or dev is None:
        assert result.score is not None
        return Trial(number, candidate, "complete", (result.score,), {}, result, drawn or {})
    rates = dev.rates(result.errors)
    state: State = "stopped" if len(result.errors) < len(dev.items) else "complete"
    return Trial(number, candidate, state, objective.values(rates), rates, result, drawn or {})


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The complete trial with the smallest value, the first if several are equal; None if there is none."""
    complete = [trial for trial in trials if trial.state == "complete"]
    return min(complete, key=lambda trial: trial.value, default=None)


def front_of(trials: Sequence[Trial]) -> list[Trial]:
    """The non-dominated complete trials; of equal ones, only the first."""
    complete = [trial for trial in trials if trial.state == "complete"]
    front: list[Trial] = []
    for trial in sorted(complete, key=lambda each: (each.values, each.number)):
        if not any(_covers(other.values, trial.values) for other in front):
            front.append(trial)
    return front


def _covers(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(mine <= theirs for mine, theirs in zip(one, other, strict=True))
