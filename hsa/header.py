"""The header of a safetensors file: read and checked whole before any tensor is served, and written.

Format: 8 bytes of little-endian header length, that many bytes of JSON, then the data without holes.
Source: the format description of the safetensors library.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

from hsa.dtypes import BITS
from hsa.errors import HeaderError, shown
from hsa.fsio import Source
from hsa.git_lfs import refuse_pointer

MAX_HEADER = 8 << 20
"""Bytes of a header, or of any JSON that is parsed: fifty times what large-v3 takes. The safetensors library accepts
100 MB, which takes gigabytes once it is parsed."""

MAX_MARKS = 1 << 17
"""Brackets, braces and commas of a JSON text, of which every value needs one: they bound what parsing it takes, a few
hundred bytes each at most. A header of large-v3 has ten thousand."""

MAX_DEPTH = 64
"""Levels of a JSON document; what is nested deeper could be read and not be written again."""

METADATA = "__metadata__"
"""The one name in a header that is no tensor's."""

MAX_RANK = 64
"""Dimensions; numpy's own limit."""

_MARKS_OF_ORDER = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_NO_NUMBER = re.compile(rb'"([^"\\]{1,80})"\s*:\s*-?(?:NaN|Infinity)')


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: element type, shape, and its byte range within the data."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A file's header. `raw` is the length and the JSON as they stand in the file; data begins after it. `steps` is
    what it took to read a pickle instead: its instructions and the records of its archive."""

    raw: bytes
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    steps: int = 0


def read_header(source: Source) -> Header:
    """Read and check the header of an open file; HeaderError names file, tensor, expected and found."""
    where = f"{source.label}: {source.path}"
    if source.size < 8:
        raise HeaderError(f"{where} is no safetensors file: {source.size} bytes, expected at least 8; copy it again")
    head = source.read(8)
    refuse_pointer(head, where)
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER:
        raise HeaderError(
            f"{where}: header of {length} bytes, at most {MAX_HEADER} are allowed; not a safetensors file?"
        )
    if 8 + length > source.size:
        raise HeaderError(
            f"{where} is truncated: its header ends at byte {8 + length}, the file at {source.size}; copy it again"
        )
    raw = length.to_bytes(8, "little") + source.read(length, 8)
    entries, metadata = parse(raw[8:], source.size - 8 - length, where)
    return Header(raw, entries, metadata)


def parse(text: bytes, data_size: int, where: str) -> tuple[tuple[Entry, ...], Mapping[str, str]]:
    """Entries in order of their offsets, and the metadata, of a header's JSON; HeaderError when malformed."""
    document = load_json(text, where, "header")
    metadata = document.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{where}: {METADATA} must map names to strings")
    entries = sorted((_entry(name, value, where) for name, value in document.items()), key=lambda e: (e.start, e.stop))
    position = 0
    for entry in entries:
        if entry.start != position:
            problem = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise HeaderError(
                f"{where}: tensor {entry.name} starts at data byte {entry.start}, expected {position}: it {problem}"
            )
        position = entry.stop
    if position != data_size:
        raise HeaderError(
            f"{where}: tensors end at data byte {position}, the file holds {data_size} data bytes; copy it again"
        )
    return tuple(entries), metadata


def serialize(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """A header, length included, padded with spaces so that the data is 8-byte aligned."""
    document: dict[str, Any] = {METADATA: dict(metadata)}
    for entry in entries:
        document[entry.name] = {
            "dtype": entry.code,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.stop],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def load_json(text: bytes, where: str, what: str, max_marks: int = MAX_MARKS) -> dict[str, Any]:
    """A JSON object from UTF-8 bytes: no repeated names, no NaN; HeaderError says where it is malformed."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise HeaderError(f"{where}: {what} names {shown(repeated, 200)} twice")
        return found

    def whole(digits: str) -> int | float:
        return int(digits) if digits != "-0" else -0.0

    def real(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise ValueError(f"{digits:.40} is out of range")
        return value

    document = parse_json(text, where, what, unique, whole, real, most_bytes=MAX_HEADER, most_marks=max_marks)
    try:
        if _is_deep(document):
            raise RecursionError
        if b"\\u" in text:  # an escaped lone surrogate is no text: it could not be written again
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise _malformed(where, what, error) from error
    if not isinstance(document, dict):
        raise HeaderError(f"{where}: {what} must be a JSON object, found {type(document).__name__}")
    return document


def parse_json(
    text: bytes,
    where: str,
    what: str,
    pairs: Callable[[list[tuple[str, Any]]], Any],
    whole: Callable[[str], int | float] | None = None,
    real: Callable[[str], float] | None = None,
    *,
    most_bytes: int,
    most_marks: int,
) -> Any:
    """Any JSON value from UTF-8 bytes, in which `pairs` makes of each object what is kept of it, `whole` and `real`
    of the digits of numbers.

    Raises HeaderError for NaN, a byte-order mark, more bytes or `marks` than allowed, and where it is malformed.
    """

    def constant(name: str) -> None:
        found = _NO_NUMBER.search(text)
        at = f" under {shown(found[1].decode('utf-8', 'replace'))}" if found else ""
        raise HeaderError(
            f"{where}: {what} is not valid JSON: it holds {name}{at}, which Python writes and JSON does not have; "
            f"write a finite number or null there"
        )

    refuse_byte_order_mark(text, f"{where}: {what}")
    if len(text) > most_bytes or marks(text) > most_marks:
        raise HeaderError(
            f"{where}: {what} of {len(text)} bytes with {marks(text)} brackets, braces and commas, at most "
            f"{most_bytes} and {most_marks} are read; it is no {what} of a Whisper checkpoint"
        )
    if not text:
        raise _malformed(where, what, ValueError("it is empty"))
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_int=whole, parse_float=real
        )
    except (ValueError, RecursionError) as error:
        raise _malformed(where, what, error) from error


def _malformed(where: str, what: str, error: Exception) -> HeaderError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return HeaderError(f"{where}: {what} is not valid JSON ({reason}); the file is damaged, copy it again")


def refuse_byte_order_mark(text: bytes, where: str, expected: str = "valid JSON") -> None:
    """HeaderError if a text begins with a byte-order mark, with which transformers does not read it either."""
    if text.startswith(_MARKS_OF_ORDER):
        raise HeaderError(
            f"{where} is not {expected}: it begins with a byte-order mark, as some Windows programs write it, and "
            f"transformers does not read it either; save the file as UTF-8 without a byte-order mark"
        )


def marks(text: bytes) -> int:
    """Brackets, braces and commas of a JSON text, those within strings too."""
    return text.count(b"{") + text.count(b"[") + text.count(b",")


def _is_deep(document: Any) -> bool:
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
    return bool(level)


def _entry(name: str, value: Any, where: str) -> Entry:
    label = f"{where}: tensor {name:.200}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{label}: expected exactly dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in BITS:
        raise HeaderError(f"{label}: unknown dtype {shown(code)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(size) for size in shape):
        raise HeaderError(f"{label}: shape must be a list of whole numbers of at least 0, found {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o) for o in offsets):
        raise HeaderError(f"{label}: data_offsets must be two whole numbers of at least 0, found {shown(offsets)}")
    start, stop = offsets
    if stop < start:
        raise HeaderError(f"{label}: data_offsets [{start}, {stop}] end before they start")
    bits = math.prod(shape) * BITS[code]
    if any(elements * BITS[code] >= 1 << 64 for elements in accumulate(shape, mul)):
        raise HeaderError(f"{label}: shape {shown(shape)} of {code} is larger than any file")
    if bits != (stop - start) * 8:
        raise HeaderError(
            f"{label}: shape {shape} of {code} takes {bits // 8} bytes, data_offsets [{start}, {stop}] hold "
            f"{stop - start}"
        )
    return Entry(name, code, tuple(shape), start, stop)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
