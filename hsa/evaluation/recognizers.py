"""Recognisers of Whisper, of other sequence-to-sequence models, and of models with a CTC head.

Padding changes what some models hear: the short utterances of a Whisper are all 30 s long, but wav2vec2 models whose
convolutions are normalised over time (`feat_extract_norm` "group") give other logits for padded audio, and their
feature extractors give no attention mask. Utterances of such a model are decoded together where they are equally
long, else one by one. What is longer than a Whisper hears at a time is decoded alone too.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.errors import SourceError
from hsa.evaluation.model_kinds import kind_of, language_code
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.transformers_calls import explained, quiet_transformers
from hsa.system.digests import digest_of
from hsa.system.dtypes import Float32

WHISPER_NEW_TOKENS = 224
"""Half of Whisper's text context, where OpenAI's own decoding stops a segment. Source: openai/whisper, decoding.py."""

OTHER_NEW_TOKENS = 448
"""Tokens of an utterance of another sequence-to-sequence model, unless its own config says more."""

LEAST_SECONDS = 0.1
"""Shorter audio is padded with silence for a CTC model, whose convolutions need some hundred samples."""


@dataclass(frozen=True)
class Part:
    """What is decoded at a time: which utterances of a batch, and their features by the model's names for them."""

    numbers: tuple[int, ...]
    inputs: Any


class _Recognizer:
    """What all have in common. `part_text` decodes one part."""

    def __init__(self, model: Any, folder: Path, options: DecodingOptions) -> None:
        from transformers import AutoFeatureExtractor, AutoTokenizer

        self.model = model
        self.folder = folder
        self.options = options
        self.extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.rate = int(self.extractor.sampling_rate)
        self.features_key = self._features_key()

    def _features_key(self) -> str:
        about = json.loads(self.extractor.to_json_string())
        about = {name: value for name, value in about.items() if name not in ("processor_class", "_processor_class")}
        return digest_of(json.dumps([type(self).__name__, about], sort_keys=True).encode("utf-8"))

    def features(self, audio: Sequence[Float32]) -> tuple[Part, ...]:
        """The parts of a batch, on the CPU in float32; audio is float32 [samples] at `rate`."""
        with quiet_transformers(), explained(self.folder):
            return tuple(self._parts(audio))

    def size_of(self, features: Sequence[Part]) -> int:
        """Bytes of memory that features take."""
        return sum(value.nbytes for part in features for value in part.inputs.values())

    def transcribe(self, features: Sequence[Part]) -> list[str]:
        """The text of each utterance of a batch, as the model writes it."""
        import torch

        texts: dict[int, str] = {}
        with quiet_transformers(), explained(self.folder), torch.inference_mode():
            for part in features:
                inputs = {name: self._moved(value) for name, value in part.inputs.items()}
                texts.update(zip(part.numbers, self.part_texts(inputs), strict=True))
        return [texts[number].strip() for number in range(len(texts))]

    def _moved(self, value: Any) -> Any:
        floating = value.is_floating_point()
        return value.to(self.model.device, self.model.dtype) if floating else value.to(self.model.device)

    def _parts(self, audio: Sequence[Float32]) -> Iterator[Part]:
        padded = bool(getattr(self.extractor, "return_attention_mask", False))
        for numbers in [[*range(len(audio))]] if padded and len(audio) else _equally_long(audio):
            yield Part(tuple(numbers), self._extract([audio[number] for number in numbers], padding=True))

    def _extract(self, audio: Sequence[Float32], **how: Any) -> dict[str, Any]:
        found = self.extractor(list(audio), sampling_rate=self.rate, return_tensors="pt", **how)
        return dict(found)

    def part_texts(self, inputs: dict[str, Any]) -> list[str]:
        raise NotImplementedError


def _equally_long(audio: Sequence[Float32]) -> list[list[int]]:
    """The numbers of utterances that need no padding beside one another."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, samples in enumerate(audio):
        by_length[len(samples)].append(number)
    return list(by_length.values())


class SpeechRecognizer(_Recognizer):
    """A sequence-to-sequence model of any family."""

    def part_texts(self, inputs: dict[str, Any]) -> list[str]:
        tokens = self.model.generate(**inputs, **self._how())
        return list(self.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _how(self) -> dict[str, Any]:
        stated = self.model.generation_config.max_length or 0
        self.model.generation_config.max_length = None
        return {
            "num_beams": self.options.beams,
            "do_sample": False,
            "max_new_tokens": max(stated, OTHER_NEW_TOKENS),
        }


class WhisperRecognizer(SpeechRecognizer):
    """A Whisper: utterances of at most 30 s as one batch, longer ones alone and window by window."""

    def __init__(self, model: Any, folder: Path, options: DecodingOptions) -> None:
        super().__init__(model, folder, options)
        kind = kind_of(folder)
        mels = model.config.num_mel_bins
        if self.extractor.feature_size != mels:
            raise SourceError(
                f"{folder}: its feature extractor gives {self.extractor.feature_size} mel bands and its model takes "
                f"{mels}; take preprocessor_config.json from the model that it was fine-tuned from"
            )
        code = None if options.language is None else language_code(options.language)
        self._speech = {"language": code, "task": options.task} if kind.multilingual else {}
        self._new_tokens = min(WHISPER_NEW_TOKENS, model.config.max_target_positions // 2)

    def _parts(self, audio: Sequence[Float32]) -> Iterator[Part]:
        window = self.extractor.n_samples
        short = [number for number, samples in enumerate(audio) if len(samples) <= window]
        if short:
            yield Part(tuple(short), self._extract([audio[number] for number in short]))
        for number in sorted(set(range(len(audio))) - set(short)):
            whole = {"truncation": False, "padding": "longest", "return_attention_mask": True}
            yield Part((number,), self._extract([audio[number]], **whole))

    def part_texts(self, inputs: dict[str, Any]) -> list[str]:
        if "attention_mask" in inputs:  # long: transformers cuts it at the timestamps that the model writes
            inputs["return_timestamps"] = True
        return super().part_texts(inputs)

    def _how(self) -> dict[str, Any]:
        return {**super()._how(), "max_new_tokens": self._new_tokens, **self._speech}


class CtcRecognizer(_Recognizer):
    """A model with a CTC head, decoded greedily: the likeliest token of each frame, repeats and blanks removed."""

    def part_texts(self, inputs: dict[str, Any]) -> list[str]:
        tokens = self.model(**inputs).logits.argmax(-1)
        return list(self.tokenizer.batch_decode(tokens))

    def _extract(self, audio: Sequence[Float32], **how: Any) -> dict[str, Any]:
        import numpy as np

        least = round(LEAST_SECONDS * self.rate)
        heard = [np.pad(samples, (0, max(0, least - len(samples)))) for samples in audio]
        return super()._extract(heard, **how)
