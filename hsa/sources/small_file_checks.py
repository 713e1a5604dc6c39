"""Check the small files beside the weights: whether they can be loaded, and whether they fit the model.

A file that transformers, tokenizers or faster-whisper cannot load is an error. A file that they load although it
contradicts the model is only reported: a merge warns of it, and `hsa verify` notes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hsa.architectures.base import Features
from hsa.errors import SourceError, shown
from hsa.sources.checkpoint import MAX_TEXT, Checkpoint
from hsa.system.strict_json import MAX_MARKS, count_marks, parse_json, refuse_byte_order_mark

GENERATION_CONFIG = "generation_config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARY, MERGES, ADDED_TOKENS = "vocab.json", "merges.txt", "added_tokens.json"
TOKENIZER_FILES = (
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    VOCABULARY,
    MERGES,
    "normalizer.json",
    "special_tokens_map.json",
    ADDED_TOKENS,
)
CHECKED_FILES = (GENERATION_CONFIG, PREPROCESSOR, PROCESSOR, *TOKENIZER_FILES)

MAX_VOCABULARY_MARKS = 1 << 19
"""The most brackets, braces and commas of a vocabulary file. Whisper's tokenizer.json has 100,000, or twice as many if
merges are written as pairs."""

_WHAT = {
    GENERATION_CONFIG: "generation config",
    PREPROCESSOR: "feature extractor config",
    PROCESSOR: "processor config",
    TOKENIZER_JSON: "tokenizer",
    TOKENIZER_CONFIG: "tokenizer config",
    VOCABULARY: "vocabulary",
    "normalizer.json": "normalizer",
    "special_tokens_map.json": "map of special tokens",
    ADDED_TOKENS: "map of added tokens",
}
_VOCABULARIES = (TOKENIZER_JSON, VOCABULARY, ADDED_TOKENS)
_KEPT = ("model", "vocab", "added_tokens", "id")
"""Names in vocabulary files whose values are checked. The other values take no memory."""

_GENERIC_TOKENIZERS = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
"""Classes, without the suffix Fast, that accept any tokenizer files."""

MAX_NAMED = 8
"""The most keys that a message names."""

MAX_NUMBER = 1 << 31
"""Larger numbers are meaningless here, and are not used in calculations."""

_NO_MERGE = re.compile(rb"^(?!\Z)(?!#version)(?![^ \n]+ [^ \n]+$)", re.MULTILINE)
"""The start of a line of merges.txt that is not two tokens separated by a space; tokenizers refuses it."""


@dataclass(frozen=True)
class TokenIds:
    """A summary of a map from tokens to ids: the number of tokens, and the largest id (-1 if there is none)."""

    count: int
    largest: int


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that the small files must fit: the family's feature extractor, mel bins, frames of features, rows of
    the embedding. Unknown ones are None. `title` is the family's name for readers."""

    title: str
    features: Features | None
    mel_bins: int | None
    frames: int | None
    rows: int | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelSizes:
        """Return the sizes given by a checkpoint's `config.json`, and by its embedding [vocabulary, width] if any."""
        architecture, embedding = checkpoint.architecture, checkpoint.embedding
        config = {**architecture.defaults, **checkpoint.config}
        features = architecture.features
        positions = None if features is None else _count(config.get(features.positions))
        rows = embedding.shape[0] if embedding is not None and embedding.shape else checkpoint.config.get("vocab_size")
        return cls(
            title=architecture.title,
            features=features,
            mel_bins=None if features is None else _count(config.get(features.mel_bins)),
            frames=None if features is None or positions is None else features.frames_per_position * positions,
            rows=_count(rows),
        )


def read_small_file(name: str, data: bytes, where: str) -> Any:
    """Parse one of `CHECKED_FILES` and keep what is checked; for merges.txt, whether it ends in a blank line.

    `where` names source and path in messages. Raises SourceError if the file cannot be loaded.

    Example:
        >>> read_small_file("vocab.json", b'{"a": 0, "b": 1}', "base: vocab.json")
        TokenIds(count=2, largest=1)
    """
    if name == MERGES:
        _check_merges(data, where)
        return data.endswith((b"\n\n", b"\n\r\n"))
    what = _WHAT[name]
    if name in _VOCABULARIES:
        document = parse_json(data, where, what, _condense, max_bytes=MAX_TEXT, max_marks=MAX_VOCABULARY_MARKS)
    else:
        document = parse_json(data, where, what, dict, max_bytes=MAX_TEXT, max_marks=MAX_MARKS)
    problem = _problem(name, document)
    if problem is not None:
        raise SourceError(f"{where}: {what} {problem}; the file is damaged, copy it again")
    return document


def read_any_small_file(name: str, data: bytes, where: str) -> Any:
    """Parse a small file of a model of any family, if it is one of `CHECKED_FILES` and in Whisper's format.

    Returns None otherwise, since its model may read it differently. Raises SourceError if the file is not JSON although
    its name says so.

    Example:
        >>> read_any_small_file("vocab.json", b'{"eng": {"a": 0}}', "base: vocab.json") is None
        True
    """
    limit, make = (MAX_VOCABULARY_MARKS, _condense) if name in _VOCABULARIES else (MAX_MARKS, dict)
    if not name.endswith(".json") or len(data) > MAX_TEXT or count_marks(data) > limit:
        return None
    what = _WHAT.get(name, "file")
    document = parse_json(data, where, what, make, max_bytes=MAX_TEXT, max_marks=limit)
    return document if name in _WHAT and _problem(name, document) is None else None


def contradictions(documents: Mapping[str, Any], sizes: ModelSizes) -> Iterator[str]:
    """Yield the contradictions of small files with the model or one another. `documents` maps names to the results of
    `read_small_file`."""
    features = {name: extractor for name in (PREPROCESSOR, PROCESSOR) if (extractor := features_of(documents, name))}
    for name, extractor in features.items():
        if sizes.features is not None:
            yield from _check_features(name, extractor, sizes, sizes.features)
    if len(features) == 2:
        old, new = features.values()
        shared = [key for key in new if key in old and not isinstance(new[key], (dict, list))]
        differing = [shown(key) for key in shared if old[key] != new[key]]
        if differing:
            yield (
                f"{PREPROCESSOR} and the feature extractor in {PROCESSOR} differ in "
                f"{', '.join(differing[:MAX_NAMED])}: transformers 5 reads the latter, "
                f"transformers 4 and faster-whisper the former"
            )
    ids = {name: largest for name, document in documents.items() if (largest := _largest_id(name, document)) >= 0}
    if ids and sizes.rows is not None and max(ids.values()) >= sizes.rows:
        name = max(ids, key=lambda each: ids[each])
        yield (
            f"{name} has token ids up to {shown(ids[name])} and the embedding only {sizes.rows} rows: the model can "
            f"neither read nor write the tokens beyond; use the tokenizer that it was trained with"
        )
    yield from _check_tokenizer_classes(documents)
    if documents.get(MERGES) and TOKENIZER_JSON not in documents:
        yield f"{MERGES} ends in a blank line, with which transformers 5 does not load the tokenizer; remove that line"


def features_of(documents: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Return the feature extractor in `preprocessor_config.json`, or the one in `processor_config.json`, where
    transformers 5 keeps it; None if there is none."""
    document = documents.get(name)
    if name == PREPROCESSOR or document is None:
        return document
    nested = document.get("feature_extractor", document.get("audio_processor"))
    return nested if isinstance(nested, dict) else None


def _condense(pairs: list[tuple[str, Any]]) -> Any:
    if all(type(value) is int for _, value in pairs):
        return TokenIds(len(pairs), max((value for _, value in pairs), default=-1))
    return {name: value for name, value in pairs if name in _KEPT}


def _problem(name: str, document: Any) -> str | None:
    """Return the reason why a JSON file cannot be loaded, or None."""
    if name in (VOCABULARY, ADDED_TOKENS):
        if not isinstance(document, TokenIds):
            return "must map tokens to whole numbers"
        return "holds no token" if name == VOCABULARY and not document.count else None
    if name == TOKENIZER_JSON:
        model = document.get("model") if isinstance(document, dict) else None
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        has_tokens = (
            vocabulary.count if isinstance(vocabulary, TokenIds) else isinstance(vocabulary, list) and vocabulary
        )
        return None if has_tokens else "has no model with a vocabulary"
    if not isinstance(document, dict):
        return f"must be a JSON object, found {type(document).__name__}"
    if name == PROCESSOR:
        for key in ("feature_extractor", "audio_processor"):
            if not isinstance(document.get(key, {}), (dict, type(None))):
                return f"has {key} = {shown(document[key])}, expected a JSON object"
    return None


def _check_merges(data: bytes, where: str) -> None:
    refuse_byte_order_mark(data, where, "UTF-8 text")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{where} is not UTF-8 text ({error.reason} at byte {error.start}); copy it again") from error
    bad_line = _NO_MERGE.search(data.rstrip(b"\r\n"))
    if bad_line is not None:
        number = data.count(b"\n", 0, bad_line.start()) + 1
        line = data[bad_line.start() : bad_line.start() + 80].partition(b"\n")[0].decode("utf-8", "replace")
        raise SourceError(
            f"{where}: line {number} is {shown(line)}, expected two tokens with a space between; the file is damaged, "
            f"copy it again"
        )


def _check_features(name: str, features: Mapping[str, Any], sizes: ModelSizes, expected: Features) -> Iterator[str]:
    if features.get("feature_extractor_type", expected.extractor) != expected.extractor:
        yield (
            f"{name} is for a {shown(features['feature_extractor_type'])}, and {sizes.title} takes the features of a "
            f"{expected.extractor}"
        )
        return
    keys = ("feature_size", "sampling_rate", "hop_length", "chunk_length")
    size, rate, hop, seconds = (features.get(key, expected.defaults[key]) for key in keys)
    if sizes.mel_bins is not None and size != sizes.mel_bins:
        missing = f"no feature_size, which means {size}"
        setting = f"feature_size {shown(size)}" if "feature_size" in features else missing
        yield (
            f"{name} has {setting}, and the model takes {sizes.mel_bins} mel bins ({expected.mel_bins} in "
            f"config.json): use the feature extractor that it was trained with"
        )
    numbers = all(isinstance(value, (int, float)) and 0 < value < MAX_NUMBER for value in (rate, hop, seconds))
    if sizes.frames is None or not numbers:
        return
    frames = rate * seconds // hop
    if frames != sizes.frames:
        times = "twice" if expected.frames_per_position == 2 else f"{expected.frames_per_position} times"
        yield (
            f"{name} makes {frames:g} frames of features (chunk_length {seconds:g} at sampling_rate {rate:g}, "
            f"hop_length {hop:g}), and the model takes {sizes.frames} ({times} {expected.positions} in config.json)"
        )


def _largest_id(name: str, document: Any) -> int:
    """Return the largest token id in a file; -1 if it names none."""
    if isinstance(document, TokenIds):
        return document.largest
    if name == TOKENIZER_CONFIG:
        decoder = document.get("added_tokens_decoder")
        return max((_token_id(key) for key in decoder), default=-1) if isinstance(decoder, dict) else -1
    if name != TOKENIZER_JSON:
        return -1
    vocabulary, added = document["model"]["vocab"], document.get("added_tokens")
    largest = vocabulary.largest if isinstance(vocabulary, TokenIds) else len(vocabulary) - 1
    entries = added if isinstance(added, list) else []
    return max(largest, *(_token_id(entry.get("id")) for entry in entries if isinstance(entry, dict)), -1)


def _token_id(value: Any) -> int:
    if isinstance(value, str) and len(value) <= 18 and value.isdecimal():
        return int(value)
    return value if type(value) is int else -1


def _check_tokenizer_classes(documents: Mapping[str, Any]) -> Iterator[str]:
    """Report a processor_config.json that names another tokenizer class than the tokenizer's own config."""
    processor, tokenizer = documents.get(PROCESSOR) or {}, documents.get(TOKENIZER_CONFIG) or {}
    nested = processor.get("tokenizer")
    in_processor = processor.get("tokenizer_class") or (
        nested.get("tokenizer_class") if isinstance(nested, dict) else None
    )
    in_tokenizer = tokenizer.get("tokenizer_class")
    if not isinstance(in_processor, str) or not isinstance(in_tokenizer, str):
        return
    classes = {name.removesuffix("Fast") for name in (in_processor, in_tokenizer)}
    if len(classes) == 2 and not classes.intersection(_GENERIC_TOKENIZERS):
        yield (
            f"{PROCESSOR} names the tokenizer class {shown(in_processor)} and {TOKENIZER_CONFIG} "
            f"{shown(in_tokenizer)}: they may be of two models"
        )


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < MAX_NUMBER else None
