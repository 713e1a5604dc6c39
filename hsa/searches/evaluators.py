"""Score a candidate: put it into the loaded model, decode block by block, and stop where it has lost the race.

An evaluator holds all that is heavy; candidates and results are plain values, so that other processes may each hold
one of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hsa.errors import DataError, HsaError, MachineError, RequestError, shown
from hsa.evaluation.decoding import Recognizer
from hsa.evaluation.transcription import FeatureCache
from hsa.evaluation.utterance import Utterance
from hsa.searches.candidates import Candidate, Result
from hsa.searches.dev_sets import DevSets
from hsa.searches.encoder_states import EncoderStates
from hsa.searches.objectives import Objective
from hsa.searches.racing import Race, next_test
from hsa.searches.resident_model import ResidentModel

Rival = Sequence[int]
"""Errors of all utterances of the best candidate so far."""


class Evaluator(Protocol):
    """Scores candidates, one at a time."""

    def learn(self, weights: str, found: Any) -> None:
        """What an earlier run has found of a model with these weights: its texts, or its score."""

    def evaluate(self, candidate: Candidate, rival: Rival | None) -> Result:
        """The result of a candidate, stopped where it loses against the rival; None lets it be decoded whole."""


class SpeechEvaluator:
    """Scores candidates by word errors on dev sets.

    `on_batch` is called with the number of utterances after each block. Candidates whose weights equal those of an
    earlier one are not decoded again.
    """

    def __init__(
        self,
        resident: ResidentModel,
        recognizer: Recognizer,
        dev: DevSets,
        objective: Objective,
        *,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self.resident, self.dev = resident, dev
        self.decoder = Decoder(recognizer)
        self._objective, self._on_batch = objective, on_batch
        self._known: dict[str, tuple[str, ...]] = {}

    def learn(self, weights: str, texts: Sequence[str]) -> None:
        """What a model with these weights wrote for the first utterances."""
        if len(texts) > len(self._known.get(weights, ())):
            self._known[weights] = tuple(texts)

    def evaluate(self, candidate: Candidate, rival: Rival | None) -> Result:
        started = time.perf_counter()
        try:
            weights = self.resident.put(candidate)
        except MachineError:
            raise
        except HsaError as error:
            return Result(failure=str(error), seconds=time.perf_counter() - started)
        merging = time.perf_counter() - started
        self.decoder.begin_model(weights.encoder)
        race = None if rival is None else Race(self.dev, self._objective, rival)
        known = self._known.get(weights.whole, ())
        texts: list[str] = []
        errors: list[int] = []
        stopped, decoded, due = False, 0, 0
        for first, last in self.dev.blocks():
            block = list(known[first:last])
            if len(block) < last - first:
                block = self.decoder.transcribe(first, [item.utterance for item in self.dev.items[first:last]])
                decoded += last - first
            texts += block
            try:
                errors += [self.dev.errors(first + place, text) for place, text in enumerate(block)]
            except DataError as error:  # a text that the normaliser cannot read
                seconds = time.perf_counter() - started
                return Result(weights.whole, decoded=decoded, failure=str(error), seconds=seconds, merging=merging)
            if self._on_batch is not None:
                self._on_batch(last - first)
            if race is not None and due <= last < len(self.dev.items):
                stopped = race.is_lost(errors)
                due = next_test(last)
                if stopped:
                    break
        self.learn(weights.whole, texts)
        return Result(
            weights.whole,
            tuple(errors),
            tuple(texts),
            decoded,
            stopped,
            seconds=time.perf_counter() - started,
            merging=merging,
        )


class Decoder:
    """A recogniser with what it keeps between models: features, and encoder states where they stay."""

    def __init__(self, recognizer: Recognizer) -> None:
        self.recognizer = recognizer
        self._features = FeatureCache()
        self.states = EncoderStates(recognizer.model)

    def begin_model(self, encoder: str) -> None:
        """The model has an encoder with this digest from now on."""
        self.states.begin_model(encoder)

    def transcribe(self, key: object, batch: Sequence[Utterance]) -> list[str]:
        """The texts of a batch, which `key` tells from others."""
        self.states.begin_batch((key, len(batch)))
        return self.recognizer.transcribe(self._features.of(self.recognizer, str(key), batch))


class OwnEvaluator:
    """Scores candidates by a function of the caller's own, which gets the loaded model; lower is better."""

    def __init__(self, resident: ResidentModel, score: Callable[[Any], float]) -> None:
        self.resident, self._score = resident, score
        self._known: dict[str, float] = {}

    def learn(self, weights: str, score: float) -> None:
        self._known[weights] = score

    def evaluate(self, candidate: Candidate, rival: Rival | None) -> Result:
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
