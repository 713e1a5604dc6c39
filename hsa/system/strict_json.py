"""Read JSON strictly: no repeated names, no NaN, bounded in size and depth."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable
from typing import Any

from hsa.errors import HeaderError, shown

MAX_JSON = 8 << 20
"""The largest header, or other JSON, that is parsed, in bytes: fifty times what large-v3 takes. The safetensors library
accepts 100 MB, which takes gigabytes once it is parsed."""


MAX_MARKS = 1 << 17
"""The most brackets, braces and commas of a JSON text. Every value needs one, so they bound the memory for parsing: a
few hundred bytes each at most. A header of large-v3 has ten thousand."""


MAX_DEPTH = 64
"""The most levels of a JSON document. A deeper one could be read but not be written again."""


_MARKS_OF_ORDER = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


_NO_NUMBER = re.compile(rb'"([^"\\]{1,80})"\s*:\s*-?(?:NaN|Infinity)')


def load_json(text: bytes, where: str, what: str, max_marks: int = MAX_MARKS) -> dict[str, Any]:
    """Parse a JSON object from UTF-8 bytes, without repeated names or NaN; HeaderError says where it is malformed."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            names: set[str] = set()
            repeated = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
            raise HeaderError(f"{where}: {what} names {shown(repeated, 200)} twice")
        return members

    def integer(digits: str) -> int | float:
        return int(digits) if digits != "-0" else -0.0

    def real(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            raise ValueError(f"{digits:.40} is out of range")
        return value

    document = parse_json(text, where, what, unique, integer, real, max_bytes=MAX_JSON, max_marks=max_marks)
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
    make_object: Callable[[list[tuple[str, Any]]], Any],
    make_int: Callable[[str], int | float] | None = None,
    make_float: Callable[[str], float] | None = None,
    *,
    max_bytes: int,
    max_marks: int,
) -> Any:
    """Parse any JSON value from UTF-8 bytes.

    `make_object` turns the pairs of each object into the value to keep; `make_int` and `make_float` do so for the
    digits of numbers. Raises HeaderError for NaN, a byte-order mark, too many bytes or marks, and malformed text.
    """

    def constant(name: str) -> None:
        match = _NO_NUMBER.search(text)
        location = f" under {shown(match[1].decode('utf-8', 'replace'))}" if match else ""
        raise HeaderError(
            f"{where}: {what} is not valid JSON: it holds {name}{location}, which Python writes and JSON does not "
            f"have; write a finite number or null there"
        )

    refuse_byte_order_mark(text, f"{where}: {what}")
    if len(text) > max_bytes or count_marks(text) > max_marks:
        raise HeaderError(
            f"{where}: {what} of {len(text)} bytes with {count_marks(text)} brackets, braces and commas, at most "
            f"{max_bytes} and {max_marks} are read; it is no {what} of a checkpoint"
        )
    if not text:
        raise _malformed(where, what, ValueError("it is empty"))
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=make_object,
            parse_constant=constant,
            parse_int=make_int,
            parse_float=make_float,
        )
    except (ValueError, RecursionError) as error:
        raise _malformed(where, what, error) from error


def _malformed(where: str, what: str, error: Exception) -> HeaderError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return HeaderError(f"{where}: {what} is not valid JSON ({reason}); the file is damaged, copy it again")


def refuse_byte_order_mark(text: bytes, where: str, expected: str = "valid JSON") -> None:
    """Raise HeaderError if a text begins with a byte-order mark; transformers does not read such a text either."""
    if text.startswith(_MARKS_OF_ORDER):
        raise HeaderError(
            f"{where} is not {expected}: it begins with a byte-order mark, as some Windows programs write it, and "
            f"transformers does not read it either; save the file as UTF-8 without a byte-order mark"
        )


def count_marks(text: bytes) -> int:
    """Count the brackets, braces and commas of a JSON text, including those within strings."""
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
