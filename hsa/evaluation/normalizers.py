"""Normalise texts before they are compared: Whisper's own normalisers, or a plain one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from hsa.errors import DataError, HeaderError, RequestError, listed, shown
from hsa.evaluation.files import open_regular
from hsa.option_names import option
from hsa.system.strict_json import MAX_JSON, load_json

NORMALIZERS = ("auto", "whisper", "basic", "plain", "none")

MAX_UNCLOSED = 1000
"""Maximum unclosed brackets. For each of them, Whisper's normalisers read the rest of the text."""

_ENGLISH = ("en", "english", "<|en|>")

_ENGLISH_VOCABULARY = 51864
"""Vocabulary size of an English-only Whisper; multilingual ones have more. Source: openai/whisper, model.py."""

_APOSTROPHES = re.compile("[\u2018\u2019\u02bc\uff07]")


def normalizer(name: str = "auto", *, language: str | None = None, model: Path | None = None) -> Callable[[str], str]:
    """The function that normalises references and hypotheses.

    `whisper`: for English, transformers' EnglishTextNormalizer with the spellings in the model's normalizer.json; for
    other languages, BasicTextNormalizer. `basic`: BasicTextNormalizer. `plain`: lower case; all but letters, digits and
    apostrophes become spaces. `none`: texts stay unchanged. `auto`: whisper for a Whisper model, else plain.

    `language` is a code or a name such as "en" or "english". By default it is taken from the model's generation config.
    A multilingual Whisper whose config names no language is not treated as English. `model` is the directory of a
    checkpoint. If it has no normalizer.json, British and American spellings remain different words.

    Raises RequestError for an unknown name, HeaderError for a damaged normalizer.json. The function raises DataError
    for a text that transformers cannot normalise.

    Example:
        >>> normalizer("plain")("Good morning, ALL!").split()
        ['good', 'morning', 'all']
    """
    if name not in NORMALIZERS:
        raise RequestError(f"normalizer must be {listed(NORMALIZERS, 'or')}, got {shown(name)}")
    if name == "auto":
        name = "whisper" if _json_of(model, "config.json").get("model_type") == "whisper" else "plain"
    if name == "none":
        return str
    if name == "plain":
        return plain
    if name == "whisper" and _is_english(language, model):
        return _english(_json_of(model, "normalizer.json"), model)
    return _basic()


def plain(text: str) -> str:
    """Convert to lower case and replace all but letters, digits and apostrophes by spaces. Combining marks stay with
    their letters. Composed and decomposed letters become equal, and so do typographic and typewriter apostrophes.

    Example:
        >>> plain("Uh, the visitors’ well-known CAFÉ")
        "uh  the visitors' well known café"
    """
    text = _APOSTROPHES.sub("'", unicodedata.normalize("NFC", text.lower()))
    return "".join(c if c == "'" or c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text)


def _is_english(language: str | None, model: Path | None) -> bool:
    if language is not None:
        return language.strip().casefold() in _ENGLISH
    generation = _json_of(model, "generation_config.json")
    if isinstance(generation.get("language"), str):
        return _is_english(generation["language"], model)
    if isinstance(generation.get("is_multilingual"), bool):
        return not generation["is_multilingual"]
    config = _json_of(model, "config.json")
    return config.get("model_type") != "whisper" or config.get("vocab_size") == _ENGLISH_VOCABULARY


def _basic() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return _checked(BasicTextNormalizer())


def _english(spellings: dict[str, Any], model: Path | None) -> Callable[[str], str]:
    for word, spelling in spellings.items():
        if not isinstance(spelling, str):
            raise HeaderError(f"{model}/normalizer.json: {shown(word)} is {shown(spelling)}, expected a spelling")
    return _english_normalizer(tuple(sorted(spellings.items())))


@lru_cache(maxsize=4)
def _english_normalizer(spellings: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    """Cached, because a search requests it several times and transformers takes a second to create it."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return _checked(EnglishTextNormalizer(dict(spellings)))


def _checked(function: Callable[[str], Any]) -> Callable[[str], str]:
    """Guard a normaliser of transformers. Its time grows with the square of unclosed brackets and of consecutive
    spaces, and it fails on numbers of thousands of digits."""

    def normalize(text: str) -> str:
        text = " ".join(text.split())
        if max(_unclosed(text, "<[", ">]"), _unclosed(text, "(", ")")) > MAX_UNCLOSED:
            raise DataError(
                f"the text {shown(text)} has more than {MAX_UNCLOSED} brackets that are never closed; choose another "
                f"{option('normalizer')}"
            )
        try:
            return str(function(text))
        except Exception as error:  # of any kind: the text is untrusted, and the code is not ours
            raise DataError(
                f"the text {shown(text)} cannot be normalised: {error}; choose another {option('normalizer')}"
            ) from error

    return normalize


def _unclosed(text: str, opening: str, closing: str) -> int:
    """The number of opening brackets after the last closing one."""
    last = max(text.rfind(bracket) for bracket in closing)
    return sum(text.count(bracket, last + 1) for bracket in opening)


def _json_of(model: Path | None, name: str) -> dict[str, Any]:
    """A small JSON file of a model; empty if there is none."""
    if model is None or not (model / name).exists():
        return {}
    with open(open_regular(model / name, "a JSON file", HeaderError), "rb") as file:
        return load_json(file.read(MAX_JSON + 1), str(model), name)
