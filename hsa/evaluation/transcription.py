"""Transcribe sets with models, one model in memory at a time, and store the transcripts."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hsa.evaluation.audio import read_audio
from hsa.evaluation.decoding import Recognizer, chosen_device, load_recognizer
from hsa.evaluation.hypotheses import Hypotheses, Transcript, describe, key_of, plain_name
from hsa.evaluation.models import OpenModel
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.prepared import PreparedSet
from hsa.evaluation.utterance import Utterance

KEPT_FEATURES = 1 << 30
"""Maximum bytes of features that are cached for later models: those of about 1100 utterances of a Whisper."""


@dataclass(frozen=True)
class Step:
    """The progress of a run: the utterances decoded and to decode, and the seconds of audio decoded. `seconds` is the
    time since decoding began, including the time to load models."""

    model: str
    set: str
    done: int
    total: int
    audio_seconds: float
    seconds: float


EvaluationProgress = Callable[[Step], None]
"""A callback after every batch."""


class FeatureCache:
    """Caches features by model family and the utterances of a batch, up to a number of bytes."""

    def __init__(self, limit: int = KEPT_FEATURES) -> None:
        self._limit, self._held = limit, 0
        self._kept: OrderedDict[tuple[str, str, tuple[str, ...]], Any] = OrderedDict()

    def of(self, recognizer: Recognizer, name: str, batch: Sequence[Utterance]) -> Any:
        """The features of a batch of the set with this name, from the cache or computed from its audio."""
        key = (recognizer.features_key, name, tuple(each.id for each in batch))
        if key not in self._kept:
            features = recognizer.features([read_audio(each, recognizer.rate) for each in batch])
            size = recognizer.size_of(features)
            if self._held + size > self._limit:
                return features
            self._held += size
            self._kept[key] = features
        return self._kept[key]


@dataclass
class Transcription:
    """The work of a run: every model on every set. `texts` maps set and id to each model's text.

    `decoded` counts the utterances that this run decoded.
    """

    models: Sequence[OpenModel]
    sets: Sequence[PreparedSet]
    options: DecodingOptions
    folder: Path | None
    progress: EvaluationProgress | None = None
    texts: dict[tuple[str, str], Mapping[str, str]] = field(default_factory=dict)
    decoded: int = 0
    audio_seconds: float = 0.0

    def run(self) -> None:
        device = chosen_device(self.options.device)
        by_key: dict[str, Hypotheses] = {}  # two copies of one model are decoded once
        kept = [[self._kept(model, data, device, by_key) for data in self.sets] for model in self.models]
        self._total = sum(len(each.missing) for each in by_key.values())
        cache = FeatureCache()
        self._started = time.perf_counter()
        for model, row in zip(self.models, kept, strict=True):
            with ExitStack() as stack:
                recognizer: Recognizer | None = None
                for data, hypotheses in zip(self.sets, row, strict=True):
                    if hypotheses.missing:
                        if recognizer is None:
                            recognizer = load_recognizer(stack.enter_context(model.checkpoint()), self.options)
                        self._decode(model, data, hypotheses, recognizer, cache)
                    else:  # if a run was killed after its last batch, this renames its file
                        with hypotheses.appending():
                            pass
                    self.texts[model.name, data.name] = hypotheses.texts

    def _kept(self, model: OpenModel, data: PreparedSet, device: str, by_key: dict[str, Hypotheses]) -> Hypotheses:
        description = describe(model, data.digest, len(data.order), self.options, device)
        key = key_of(description)
        if key not in by_key:
            name = plain_name(model.name, data.name)
            by_key[key] = Hypotheses(self.folder, name, description, data.order, self.options.batch)
        return by_key[key]

    def _decode(
        self,
        model: OpenModel,
        data: PreparedSet,
        hypotheses: Hypotheses,
        recognizer: Recognizer,
        cache: FeatureCache,
    ) -> None:
        with hypotheses.appending():
            while batch := hypotheses.missing[: self.options.batch]:
                texts = recognizer.transcribe(cache.of(recognizer, data.name, batch))
                hypotheses.add([Transcript(each.id, text) for each, text in zip(batch, texts, strict=True)])
                self.decoded += len(batch)
                self.audio_seconds += sum(data.seconds[each.id] for each in batch)
                if self.progress is not None:
                    seconds = time.perf_counter() - self._started
                    self.progress(Step(model.name, data.name, self.decoded, self._total, self.audio_seconds, seconds))
