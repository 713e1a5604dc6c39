"""Recognisers of Whisper, of other sequence-to-sequence models, and of models with a CTC head.

Padding changes the results of some models even with an attention mask, because convolutions that are normalised over
time include it (Moonshine; wav2vec2 with `feat_extract_norm` "group"). A Whisper always hears 30 s, so it is not
affected, and models of MASKED ignore the padding. With all other models, utterances of equal length are decoded
together, and the rest one by one.

Longer audio is decoded alone: by a Whisper with transformers' long-form decoding, by a CTC model in overlapping
windows, as in transformers' pipeline. Other sequence-to-sequence models hear it whole.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.errors import SourceError
from hsa.evaluation.encoders import encode_one_by_one
from hsa.evaluation.model_kinds import kind_of, language_code
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.speculative import Drafts, generate_with_drafts, may_draft
from hsa.evaluation.transformers_calls import FROM_DISK, explained, quiet_transformers
from hsa.system.digests import digest_of
from hsa.system.dtypes import Float32

WHISPER_NEW_TOKENS = 224
"""Half of Whisper's text context, where OpenAI's own decoding stops a segment. Source: openai/whisper, decoding.py."""

OTHER_NEW_TOKENS = 448
"""Maximum tokens of an utterance for other sequence-to-sequence models, unless their own config allows more."""

LEAST_SECONDS = 0.1
"""Minimum seconds for a CTC model, whose convolutions need some hundred samples. Shorter audio is padded with
silence."""

WINDOW_SECONDS, STRIDE_SECONDS = 30, 5
"""Longer audio is given to a CTC model in windows of 30 s. The 5 s that a window shares with its neighbour on each side
are heard but not written: a sixth of the window, as in transformers' pipeline."""


MASKED = ("Wav2Vec2ForCTC", "HubertForCTC", "WavLMForCTC")
"""Classes that ignore the padding given by their attention mask, if their convolutions are normalised by frame."""


@dataclass(frozen=True)
class Part:
    """Utterances that are decoded together: their indices in the batch, and the model's inputs by argument name."""

    numbers: tuple[int, ...]
    inputs: Any


class _Recognizer(ABC):
    """The base class of all recognisers. `part_texts` decodes one part."""

    def __init__(self, model: Any, folder: Path, options: DecodingOptions) -> None:
        from transformers import AutoFeatureExtractor, AutoTokenizer

        self.model = model
        self.folder = folder
        self.options = options
        self.extractor = AutoFeatureExtractor.from_pretrained(folder, **FROM_DISK)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **FROM_DISK)
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
        """The size of features in bytes."""
        return sum(value.nbytes for part in features for value in part.inputs.values())

    def transcribe(self, features: Sequence[Part], drafts: Sequence[Drafts] | None = None) -> list[str]:
        """The text of each utterance of a batch, as the model writes it.

        `drafts` are the texts of other models for each utterance; this model's text is added. They make some models
        faster, and change no text.
        """
        import torch

        texts: dict[int, str] = {}
        with quiet_transformers(), explained(self.folder), torch.inference_mode():
            for part in features:
                known = None if drafts is None else [drafts[number] for number in part.numbers]
                texts.update(zip(part.numbers, self.part_texts(part.inputs, known), strict=True))
        return [texts[number].strip() for number in range(len(texts))]

    def _moved(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move features to the model's device and dtype."""
        device, dtype = self.model.device, self.model.dtype
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in inputs.items()
        }

    def _may_pad(self) -> bool:
        """Whether padding is known to have no effect, because the model gets a mask for it."""
        return (
            type(self.model).__name__ in MASKED
            and getattr(self.model.config, "feat_extract_norm", None) == "layer"
            and bool(getattr(self.extractor, "return_attention_mask", False))
        )

    def _parts(self, audio: Sequence[Float32]) -> Iterator[Part]:
        together = [[*range(len(audio))]] if self._may_pad() and len(audio) else _equally_long(audio)
        for numbers in together:
            yield Part(tuple(numbers), self._extract([audio[number] for number in numbers], padding=True))

    def _extract(self, audio: Sequence[Float32], **how: Any) -> dict[str, Any]:
        found = self.extractor(list(audio), sampling_rate=self.rate, return_tensors="pt", **how)
        return dict(found)

    @abstractmethod
    def part_texts(self, inputs: dict[str, Any], drafts: Sequence[Drafts] | None = None) -> list[str]:
        """The text of each utterance of a part, from its features."""


def _equally_long(audio: Sequence[Float32]) -> list[list[int]]:
    """Group the indices of utterances that have equal length and need no padding together."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, samples in enumerate(audio):
        by_length[len(samples)].append(number)
    return list(by_length.values())


class SpeechRecognizer(_Recognizer):
    """A sequence-to-sequence model of any family."""

    def __init__(self, model: Any, folder: Path, options: DecodingOptions) -> None:
        super().__init__(model, folder, options)
        stated = getattr(model.generation_config, "max_length", None) or 0
        self._how = {
            "num_beams": options.beams,
            "do_sample": False,
            "max_new_tokens": options.max_tokens or max(stated, OTHER_NEW_TOKENS),
            "max_length": None,  # transformers warns if both are set
        }

    def part_texts(self, inputs: dict[str, Any], drafts: Sequence[Drafts] | None = None) -> list[str]:
        tokens = self._generate(inputs, drafts)
        return list(self.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _generate(self, inputs: dict[str, Any], drafts: Sequence[Drafts] | None) -> list[list[int]]:
        """The tokens of each utterance of a part."""
        found: list[list[int]] = self.model.generate(**self._moved(inputs), **self._how_of(inputs)).tolist()
        return found

    def _how_of(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `generate` for these inputs."""
        return self._how


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
        encode_one_by_one(model.get_encoder())
        wanted = options.max_tokens or WHISPER_NEW_TOKENS
        self._how["max_new_tokens"] = min(wanted, model.config.max_target_positions // 2)
        if kind.multilingual:
            self._how["language"] = None if options.language is None else language_code(options.language)
            self._how["task"] = options.task

    def _parts(self, audio: Sequence[Float32]) -> Iterator[Part]:
        window = self.extractor.n_samples
        short = [number for number, samples in enumerate(audio) if len(samples) <= window]
        if short:
            yield Part(tuple(short), self._extract([audio[number] for number in short], return_attention_mask=False))
        for number in sorted(set(range(len(audio))) - set(short)):
            whole = {"truncation": False, "padding": "longest", "return_attention_mask": True}
            yield Part((number,), self._extract([audio[number]], **whole))

    def _how_of(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**self._how, "return_timestamps": True} if _is_long(inputs) else self._how

    def _generate(self, inputs: dict[str, Any], drafts: Sequence[Drafts] | None) -> list[list[int]]:
        if drafts is None or _is_long(inputs) or self.options.beams > 1:
            return super()._generate(inputs, None)
        if not may_draft(self.model, self.tokenizer.all_special_ids):
            return super()._generate(inputs, None)
        return generate_with_drafts(self.model, self._moved(inputs), self._how, drafts)


def _is_long(inputs: dict[str, Any]) -> bool:
    """Whether the audio is longer than one window. transformers then cuts it at timestamps that the model writes."""
    return "attention_mask" in inputs


class CtcRecognizer(_Recognizer):
    """A model with a CTC head, decoded greedily: the likeliest token of each frame, repeats and blanks removed."""

    def _parts(self, audio: Sequence[Float32]) -> Iterator[Part]:
        limit = WINDOW_SECONDS * self.rate
        short = [number for number, samples in enumerate(audio) if len(samples) <= limit]
        for part in super()._parts([audio[number] for number in short]):
            yield Part(tuple(short[number] for number in part.numbers), part.inputs)
        for number in sorted(set(range(len(audio))) - set(short)):
            yield Part((number,), {"samples": self._as_tensor(audio[number])})

    def part_texts(self, inputs: dict[str, Any], drafts: Sequence[Drafts] | None = None) -> list[str]:
        if "samples" in inputs:
            return list(self.tokenizer.batch_decode([self._long_tokens(inputs["samples"].numpy())]))
        tokens, lengths = self._tokens(inputs)
        return list(self.tokenizer.batch_decode([row[:length] for row, length in zip(tokens, lengths, strict=True)]))

    def _tokens(self, inputs: dict[str, Any]) -> tuple[list[list[int]], list[int]]:
        """The likeliest token of each frame, and the number of frames of each utterance without padding."""
        tokens = self.model(**self._moved(inputs)).logits.argmax(-1)
        mask = inputs.get("attention_mask")
        if mask is None or not self._may_pad():
            return tokens.tolist(), [tokens.shape[1]] * len(tokens)
        lengths = self.model._get_feat_extract_output_lengths(mask.sum(-1))
        return tokens.tolist(), [int(length) for length in lengths]

    def _long_tokens(self, samples: Float32) -> list[int]:
        """The tokens of audio that is heard in windows. Each window contributes the part that it does not share. The
        first also contributes its start, and the last its end."""
        ratio = int(getattr(self.model.config, "inputs_to_logits_ratio", 1))  # samples of a frame; 1 is unknown
        window, stride = (round(seconds * self.rate / ratio) * ratio for seconds in (WINDOW_SECONDS, STRIDE_SECONDS))
        tokens: list[int] = []
        for start in range(0, max(1, len(samples) - 2 * stride), window - 2 * stride):
            heard = samples[start : start + window]
            ((row, *_), _) = self._tokens(self._extract([heard]))
            frames = round(len(heard) / ratio) if ratio > 1 else len(row)
            shared = round(stride / len(heard) * frames)
            is_last = start + window >= len(samples)
            tokens += row[shared if start else 0 : len(row) if is_last else frames - shared]
        return tokens

    def _extract(self, audio: Sequence[Float32], **how: Any) -> dict[str, Any]:
        import numpy as np

        least = round(LEAST_SECONDS * self.rate)
        heard = [np.pad(samples, (0, max(0, least - len(samples)))) for samples in audio]
        return super()._extract(heard, **how)

    @staticmethod
    def _as_tensor(samples: Float32) -> Any:
        import torch

        return torch.from_numpy(samples.copy())
