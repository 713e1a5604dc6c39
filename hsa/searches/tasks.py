"""The tasks that a search sends to a process with loaded models. Tasks are values, so they can be sent elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from hsa.evaluation.utterance import Utterance
from hsa.searches.candidates import Candidate, Result
from hsa.searches.evaluators import Evaluator, Incumbent, SpeechEvaluator


class Task(Protocol):
    """A piece of work; `run` executes it with the evaluator of a process."""

    def run(self, evaluator: Evaluator) -> Any:
        """Return the task's result, a value that can be sent to another process."""


@dataclass(frozen=True)
class Score:
    """Score a candidate on the dev sets. It is stopped if it loses against the incumbent.

    Example:
        >>> pool.submit(Score(Candidate("ties defaults", "default", "ties"), incumbent=None))  # doctest: +SKIP
    """

    candidate: Candidate
    incumbent: Incumbent | None

    def run(self, evaluator: Evaluator) -> Result:
        return evaluator.evaluate(self.candidate, self.incumbent)


@dataclass(frozen=True)
class Transcribe:
    """Transcribe one batch of utterances with a candidate; `key` names their set."""

    candidate: Candidate
    key: str
    utterances: tuple[Utterance, ...]

    def run(self, evaluator: Evaluator) -> tuple[str, ...]:
        assert isinstance(evaluator, SpeechEvaluator)
        return evaluator.transcribe(self.candidate, self.key, self.utterances)


@dataclass(frozen=True)
class LayersOf:
    """The layer of each target of a method that belongs to a layer, by canonical name."""

    method: str

    def run(self, evaluator: Evaluator) -> dict[str, int]:
        return evaluator.resident.layers_of(self.method)
