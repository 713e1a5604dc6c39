"""The shapes of synthetic Whisper models, and the small files of their checkpoints: configs and a tokenizer.

The tokenizer is byte-level, so no vocabulary needs to be shipped.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

DType = Literal["float32", "float16", "bfloat16"]

DTYPES: dict[str, tuple[str, int]] = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
WEIGHT_STD = 0.02

_LANGUAGES = ("en", "de", "es", "fr")
_END_OF_TEXT = "<|endoftext|>"
_SPECIAL_TOKENS = (
    _END_OF_TEXT,
    "<|startoftranscript|>",
    *(f"<|{language}|>" for language in _LANGUAGES),
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
_TOKEN_IDS = {token: 256 + position for position, token in enumerate(_SPECIAL_TOKENS)}

TOKENIZER_VOCAB_SIZE: int = 256 + len(_SPECIAL_TOKENS)
"""Number of tokens of the byte-level tokenizer that `write_processor` writes."""


@dataclass(frozen=True)
class WhisperShape:
    """The dimensions of a Whisper model, named as in its `config.json` where they appear there.

    Raises:
        ValueError: a dimension is below 1, or a head count does not divide `d_model`.
    """

    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_heads: int
    decoder_heads: int
    ffn_dim: int
    vocab_size: int
    num_mel_bins: int = 80
    max_source_positions: int = 1500
    max_target_positions: int = 448

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        for name in ("encoder_heads", "decoder_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, which does not divide d_model {self.d_model}")


def _published(d_model: int, layers: int, **changes: int) -> WhisperShape:
    """The shape of a published size: heads are 64 wide, and the feed-forward layer is four times the width."""
    dimensions = {
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_heads": d_model // 64,
        "decoder_heads": d_model // 64,
        "ffn_dim": 4 * d_model,
        "vocab_size": 51865,
    }
    return WhisperShape(d_model=d_model, **{**dimensions, **changes})


SHAPES: dict[str, WhisperShape] = {
    "tiny": _published(384, 4),
    "base": _published(512, 6),
    "small": _published(768, 12),
    "medium": _published(1024, 24),
    "large-v3": _published(1280, 32, vocab_size=51866, num_mel_bins=128),
    "large-v3-turbo": _published(1280, 32, decoder_layers=4, vocab_size=51866, num_mel_bins=128),
    "demo": _published(384, 4, vocab_size=TOKENIZER_VOCAB_SIZE, max_source_positions=250, max_target_positions=64),
    "test": WhisperShape(
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_heads=4,
        decoder_heads=4,
        ffn_dim=128,
        vocab_size=TOKENIZER_VOCAB_SIZE,
        max_source_positions=50,
        max_target_positions=32,
    ),
}
"""The published multilingual sizes by name, and two small ones: "demo" and "test"."""

MINIATURE = WhisperShape(
    d_model=20,
    encoder_layers=32,
    decoder_layers=32,
    encoder_heads=20,
    decoder_heads=20,
    ffn_dim=4,
    vocab_size=TOKENIZER_VOCAB_SIZE,
    num_mel_bins=4,
    max_source_positions=50,
    max_target_positions=8,
)
"""large-v3 with the same numbers of tensors and heads but very few elements, so that only the work per tensor and per
head remains."""


def write_config(
    directory: str | os.PathLike[str],
    shape: WhisperShape,
    dtype: DType,
    *,
    architecture: str = "WhisperForConditionalGeneration",
) -> None:
    """Write `config.json` and `generation_config.json`, with the token ids of `write_processor`'s tokenizer.

    Args:
        directory: created if it does not exist.
        shape: the dimensions; the vocabulary must be at least as large as the tokenizer's.
        dtype: the dtype of the saved weights.
        architecture: the transformers class that would have saved the checkpoint.

    Raises:
        ValueError: unknown dtype, or a vocabulary smaller than `TOKENIZER_VOCAB_SIZE`.
    """
    check_dtype(dtype)
    if shape.vocab_size < TOKENIZER_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {shape.vocab_size}, expected at least {TOKENIZER_VOCAB_SIZE}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    end = _TOKEN_IDS[_END_OF_TEXT]
    start = _TOKEN_IDS["<|startoftranscript|>"]
    tokens = {
        "begin_suppress_tokens": [byte_symbols().index(_symbol(ord(" "))), end],
        "bos_token_id": end,
        "decoder_start_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    config = {
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "apply_spec_augment": False,
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "d_model": shape.d_model,
        "decoder_attention_heads": shape.decoder_heads,
        "decoder_ffn_dim": shape.ffn_dim,
        "decoder_layerdrop": 0.0,
        "decoder_layers": shape.decoder_layers,
        "dropout": 0.0,
        "dtype": dtype,
        "encoder_attention_heads": shape.encoder_heads,
        "encoder_ffn_dim": shape.ffn_dim,
        "encoder_layerdrop": 0.0,
        "encoder_layers": shape.encoder_layers,
        "init_std": WEIGHT_STD,
        "is_encoder_decoder": True,
        "max_source_positions": shape.max_source_positions,
        "max_target_positions": shape.max_target_positions,
        "median_filter_width": 7,
        "model_type": "whisper",
        "num_hidden_layers": shape.encoder_layers,
        "num_mel_bins": shape.num_mel_bins,
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }
    generation = {
        "is_multilingual": True,
        "lang_to_id": {f"<|{language}|>": _TOKEN_IDS[f"<|{language}|>"] for language in _LANGUAGES},
        "max_initial_timestamp_index": 50,
        "max_length": shape.max_target_positions,
        "no_timestamps_token_id": _TOKEN_IDS["<|notimestamps|>"],
        "prev_sot_token_id": _TOKEN_IDS["<|startofprev|>"],
        "return_timestamps": False,
        "suppress_tokens": sorted(set(_TOKEN_IDS.values()) - {end}),
        "task_to_id": {task: _TOKEN_IDS[f"<|{task}|>"] for task in ("transcribe", "translate")},
    }
    write_json(directory / "config.json", {**config, **tokens})
    write_json(directory / "generation_config.json", {**generation, **tokens})


def _is_visible(byte: int) -> bool:
    return 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF


def _symbol(byte: int) -> str:
    """The character that represents a byte in byte-level vocabularies: the same one, or one from U+0100 on."""
    if _is_visible(byte):
        return chr(byte)
    return chr(256 + sum(not _is_visible(smaller) for smaller in range(byte)))


def byte_symbols() -> list[str]:
    """All 256 symbols in the order of GPT-2's vocabulary, which Whisper's shares: visible bytes first."""
    return [_symbol(byte) for byte in sorted(range(256), key=lambda byte: (not _is_visible(byte), byte))]


def write_processor(directory: str | os.PathLike[str], shape: WhisperShape | None = None) -> None:
    """Write a byte-level tokenizer and a feature extractor that `WhisperProcessor.from_pretrained` loads.

    The tokenizer has a token for each byte (no merges) and Whisper's special tokens for four languages,
    without the timestamps.

    Args:
        directory: created if it does not exist.
        shape: determines the feature extractor's mel bins, its window of 0.02 s per source position and the tokenizer's
            longest input. Without it, these are those of the published 80-bin models (30 s, 448 tokens).

    Raises:
        ValueError: the source positions are not a whole number of seconds.
    """
    shape = shape or SHAPES["tiny"]
    seconds, rest = divmod(shape.max_source_positions, 50)
    if rest:
        raise ValueError(f"max_source_positions is {shape.max_source_positions}, expected a multiple of 50")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {symbol: position for position, symbol in enumerate(byte_symbols())}
    vocabulary[_END_OF_TEXT] = _TOKEN_IDS[_END_OF_TEXT]
    text = json.dumps(vocabulary, ensure_ascii=False) + "\n"
    (directory / "vocab.json").write_text(text, encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write_json(directory / "normalizer.json", {})
    write_json(directory / "added_tokens.json", _TOKEN_IDS)
    names = {f"{use}_token": _END_OF_TEXT for use in ("bos", "eos", "pad", "unk")}
    special = {**names, "additional_special_tokens": list(_SPECIAL_TOKENS)}
    write_json(directory / "special_tokens_map.json", special)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): {"content": token, **flags} for token, number in _TOKEN_IDS.items()},
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": shape.max_target_positions,
        "processor_class": "WhisperProcessor",
        "return_attention_mask": False,
        "tokenizer_class": "WhisperTokenizer",
    }
    write_json(directory / "tokenizer_config.json", {**tokenizer, **special})
    features = {
        "chunk_length": seconds,
        "dither": 0.0,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": shape.num_mel_bins,
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": seconds * 16000,
        "nb_max_frames": seconds * 100,
        "padding_side": "right",
        "padding_value": 0.0,
        "processor_class": "WhisperProcessor",
        "return_attention_mask": False,
        "sampling_rate": 16000,
    }
    write_json(directory / "preprocessor_config.json", features)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
