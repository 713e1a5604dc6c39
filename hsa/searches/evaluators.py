"""Score a candidate: put it into the loaded model, decode block by block, and stop once it has lost the race.

An evaluator has all the large objects. Candidates and results are plain values, so each worker of a search can have its
own evaluator.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hsa.errors import DataError, HsaError, MachineError, RequestError, SourceError, shown
from hsa.evaluation.decoding import Recognizer
from hsa.evaluation.speculative import Drafts
from hsa.evaluation.transcription import FeatureCache
from hsa.evaluation.utterance import Utterance
from hsa.searches.candidates import Candidate, Result
from hsa.searches.dev_sets import DevSets
from hsa.searches.encoder_states import EncoderStates
from hsa.searches.objectives import Objective
from hsa.searches.racing import Race, next_test
from hsa.searches.resident_model import ResidentModel, Weights

Incumbent = Sequence[int]
"""The word errors of each utterance of the incumbent, which is the best complete trial so far."""


class Evaluator(Protocol):
    """Scores candidates, one at a time. `resident` is the model that they are put into, on `device` (`cpu`, `cuda:0`,
    ...)."""

    resident: ResidentModel
    device: str

    def add_cached(self, weights: str, found: Any) -> None:
        """Add known results of a model with these weights, its texts or its score, so that it is not scored again."""

    def evaluate(self, candidate: Candidate, incumbent: Incumbent | None) -> Result:
        """Score a candidate. It is stopped if it loses against the incumbent; with None it is decoded completely."""


class SpeechEvaluator:
    """Scores candidates by word errors on dev sets.

    Candidates whose weights equal those of an earlier one are not decoded again.
    """

    def __init__(
        self,
        resident: ResidentModel,
        recognizer: Recognizer,
        dev: DevSets,
        objective: Objective,
        device: str,
    ) -> None:
        self.resident, self.dev, self.device = resident, dev, device
        self.decoder = Decoder(recognizer)
        self._objective = objective
        self._held: tuple[Candidate, Weights] | None = None
        self._known: dict[str, tuple[str, ...]] = {}

    def add_cached(self, weights: str, texts: Sequence[str]) -> None:
        """Add the texts of a model with these weights for the first utterances."""
        if len(texts) > len(self._known.get(weights, ())):
            self._known[weights] = tuple(texts)

    def evaluate(self, candidate: Candidate, incumbent: Incumbent | None) -> Result:
        started = time.perf_counter()
        try:
            weights = self._put(candidate)
        except MachineError:
            raise
        except HsaError as error:
            return Result(failure=str(error), seconds=time.perf_counter() - started)
        merging = time.perf_counter() - started
        race = None if incumbent is None else Race(self.dev, self._objective, incumbent)
        known = self._known.get(weights.whole, ())
        texts: list[str] = []
        errors: list[int] = []
        stopped, decoded, due = False, 0, 0
        for first, last in self.dev.blocks():
            block = list(known[first:last])
            try:
                if len(block) < last - first:
                    block = self.decoder.transcribe(first, [item.utterance for item in self.dev.items[first:last]])
                    decoded += last - first
                texts += block
                errors += [self.dev.errors(first + place, text) for place, text in enumerate(block)]
            except (DataError, SourceError) as error:  # a text that cannot be normalised, or a broken merge
                if candidate.source is not None and isinstance(error, SourceError):
                    raise
                seconds = time.perf_counter() - started
                return Result(weights.whole, decoded=decoded, failure=str(error), seconds=seconds, merging=merging)
            if race is not None and due <= last < len(self.dev.items):
                stopped = race.is_lost(errors)
                due = next_test(last)
                if stopped:
                    break
        self.add_cached(weights.whole, texts)
        return Result(
            weights.whole,
            tuple(errors),
            tuple(texts),
            decoded,
            stopped,
            seconds=time.perf_counter() - started,
            merging=merging,
        )

    def transcribe(self, candidate: Candidate, key: str, utterances: Sequence[Utterance]) -> tuple[str, ...]:
        """Transcribe a batch of utterances with a candidate; `key` names their set. Raises the errors of putting the
        candidate into the model."""
        self._put(candidate)
        return tuple(self.decoder.transcribe(key, utterances))

    def _put(self, candidate: Candidate) -> Weights:
        """Put a candidate into the model unless it is already there."""
        if self._held is None or self._held[0] != candidate:
            self._held = None
            weights = self.resident.put(candidate)
            self.decoder.begin_model(weights.encoder)
            self._held = candidate, weights
        return self._held[1]


class Decoder:
    """A recogniser with its caches across models: features, states of an unchanged encoder, and texts as drafts."""

    def __init__(self, recognizer: Recognizer) -> None:
        self.recognizer = recognizer
        self._features = FeatureCache()
        self._drafts: defaultdict[tuple[object, str], Drafts] = defaultdict(Drafts)
        self.states = EncoderStates(recognizer.model)

    def begin_model(self, encoder: str) -> None:
        """Set the digest of the encoder that the model has from now on."""
        self.states.begin_model(encoder)

    def transcribe(self, key: object, batch: Sequence[Utterance]) -> list[str]:
        """Transcribe a batch of utterances. `key` distinguishes them from utterances of other sets with the same
        ids."""
        self.states.begin_batch((key, tuple(each.id for each in batch)))
        features = self._features.of(self.recognizer, str(key), batch)
        return self.recognizer.transcribe(features, [self._drafts[key, each.id] for each in batch])


class OwnEvaluator:
    """Scores candidates by the caller's own function, which gets the loaded model; lower is better."""

    def __init__(self, resident: ResidentModel, score: Callable[[Any], float], device: str) -> None:
        self.resident, self.device, self._score = resident, device, score
        self._known: dict[str, float] = {}

    def add_cached(self, weights: str, score: float) -> None:
        self._known[weights] = score

    def evaluate(self, candidate: Candidate, incumbent: Incumbent | None) -> Result:
        started = time.perf_counter()
        try:
            weights = self.resident.put(candidate).whole
        except MachineError:
            raise
        except HsaError as error:
            return Result(failure=str(error), seconds=time.perf_counter() - started)
        merging = time.perf_counter() - started
        decoded = weights not in self._known
        if decoded:
            self._known[weights] = self._checked(self._score(self.resident.model))
        score = self._known[weights]
        seconds = time.perf_counter() - started
        if not math.isfinite(score):
            return Result(weights, failure=f"its score is {score}", seconds=seconds, merging=merging)
        return Result(weights, decoded=int(decoded), score=score, seconds=seconds, merging=merging)

    def _checked(self, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise RequestError(f"evaluate must give a number, got {shown(value)}") from error
