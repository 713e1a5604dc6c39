"""The files that a loader reads from a model's directory. In an output, all of them must have been written by the
merge."""

from __future__ import annotations

import re

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ggml",
    ".index.json",
)
"""Suffixes of weights and of their indexes that some loader of Whisper models reads if it finds them."""

_CODE = (".py", ".jinja", ".model", ".tiktoken")
"""Suffixes of code and templates that transformers loads, and of tokenizers in other formats."""

_CONFIGS = "generation|preprocessor|processor|tokenizer|adapter|video_preprocessor|image_processor|feature_extractor"
_SETTINGS = re.compile(
    rf"(?:(?:{_CONFIGS}|quanti\w*)_)?config(?:\..+)?\.json"
    r"|(?:adapter|tokenizer|vocab|merges|normalizer|special_tokens|added_tokens|chat_template)[^/]*\.(?:json|txt)",
    re.ASCII,
)
"""Names of configs and tokenizer files. transformers also reads names with a version (`config.4.0.0.json`)."""

_FOLDERS = ("additional_chat_templates", "custom_generate")
"""Directories that transformers looks into. It ignores all others in a model's directory."""


def is_read_by_loaders(name: str) -> bool:
    """Whether a loader would read a file or directory of this name in a model's directory.

    Example:
        >>> is_read_by_loaders("tokenizer.json"), is_read_by_loaders("wer.json")
        (True, False)
    """
    lower = name.lower()
    return lower.endswith(_WEIGHTS + _CODE) or lower in _FOLDERS or _SETTINGS.fullmatch(lower) is not None
