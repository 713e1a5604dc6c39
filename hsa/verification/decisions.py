"""The two answers of a comparison with the sources, and the comparison of recorded decisions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hsa.errors import shown
from hsa.methods.base import Method
from hsa.methods.copied import decision_dict
from hsa.methods.tensors import Outcome, TensorRecord, TensorTask


@dataclass(frozen=True)
class Answers:
    """Whether the bytes of the weights follow from the recorded decisions, and the decisions from the sources.

    Example:
        >>> Answers.all([Answers(True, True), Answers(True, False)])
        Answers(bytes_follow=True, decisions_follow=False)
    """

    bytes_follow: bool
    decisions_follow: bool

    @classmethod
    def all(cls, answers: Iterable[Answers]) -> Answers:
        """The combined answers for several outputs."""
        each = list(answers)
        return cls(all(one.bytes_follow for one in each), all(one.decisions_follow for one in each))


def recorded_decisions(targets: Iterable[TensorRecord], tasks: Iterable[TensorTask]) -> dict[str, Any]:
    """The recorded decisions for the tasks that match a recorded tensor, by canonical name."""
    by_name = {target.canonical: target for target in targets}
    return {
        task.name: by_name[task.name].decision
        for task in tasks
        if task.name in by_name and is_recorded(by_name[task.name], task)
    }


def is_recorded(target: TensorRecord, task: TensorTask) -> bool:
    """Whether a recorded tensor is the one that follows from the sources and the settings."""
    recorded = target.name, target.shape, target.code, target.partition
    return recorded == (task.output_name, task.shape, task.out_code, task.partition)


def other_decision(method: Method[Any, Any], recorded: Any, decision: Any) -> str | None:
    """The difference between a recorded decision and the one that follows from the sources; None if there is none.

    They are compared in the form in which the record stores them. Numbers that differ between machines are compared
    within the method's tolerance.
    """
    before, after = decision_dict(method, recorded), decision_dict(method, decision)
    for key in after:
        if before.get(key) != after[key] and not (key in method.approximate and _near(method, before, after, key)):
            return f": {key} {shown(before.get(key))} is recorded, the sources give {shown(after[key])}"
    return None


def other_decisions(
    method: Method[Any, Any], recorded: Mapping[str, Any], outcomes: Iterable[Outcome]
) -> Iterator[str]:
    """A line for every target whose recorded decision does not follow from the sources."""
    for outcome in outcomes:
        if outcome.task.name in recorded:
            what = other_decision(method, recorded[outcome.task.name], outcome.decision)
            if what is not None:
                yield f"the decision for {outcome.task.output_name} does not follow from the sources{what}"


def _near(method: Method[Any, Any], before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> bool:
    """Whether a recorded number lies within the method's tolerance."""
    one, other = before.get(key), after[key]
    return isinstance(one, float) and isinstance(other, float) and math.isclose(one, other, rel_tol=method.tolerance)
