"""What a search asks of a process that holds its models. Tasks are values, so that they can be sent elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from hsa.evaluation.utterance import Utterance
from hsa.searches.candidates import Candidate, Result
from hsa.searches.evaluators import Evaluator, Incumbent, SpeechEvaluator


class Task(Protocol):
    """A piece of work; `run` does it with what a process holds."""

    def run(self, evaluator: Evaluator) -> Any:
        """What the task gives, a value that can be sent to another process."""


@dataclass(frozen=True)
class Score:
    """Score a candidate on the dev sets, stopped where it loses against the incumbent.

    Example:
        >>> pool.submit(Score(Candidate("ties defaults", "default", "ties"), incumbent=None))  # doctest: +SKIP
    """

    candidate: Candidate
    incumbent: Incumbent | None

    def run(self, evaluator: Evaluator) -> Result:
        return evaluator.evaluate(self.candidate, self.incumbent)


@dataclass(frozen=True)
class Transcribe:
    """Transcribe one batch of utterances with a candidate; `key` names the set that they are of."""

    candidate: Candidate
    key: str
    utterances: tuple[Utterance, ...]

    def run(self, evaluator: Evaluator) -> tuple[str, ...]:
        assert isinstance(evaluator, SpeechEvaluator)
        return evaluator.transcribe(self.candidate, self.key, self.utterances)


@dataclass(frozen=True)
class LayersOf:
    """The layer of each target of a method that lies in one, by canonical name."""

    method: str

    def run(self, evaluator: Evaluator) -> dict[str, int]:
        return evaluator.resident.layers_of(self.method)
