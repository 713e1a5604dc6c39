"""Read the lines of an untrusted text file: only UTF-8, in bounded memory, with the number of each line."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from pathlib import Path

from hsa.errors import DataError, MachineError
from hsa.evaluation.files import open_regular
from hsa.system.descriptors import reason

MAX_LINE = 1 << 20
"""Maximum bytes of a line: an hour of speech has 60 KB of text."""

MAX_FILE = 4 << 30
"""Maximum bytes of a manifest: twenty times the size for a million utterances."""

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line, with its line ending as in the file.

    A UTF-8 byte-order mark is removed. Raises DataError for a line that is not UTF-8, is too long or contains a NUL
    byte, and for a file that is too large; MachineError if reading fails.

    Example:
        >>> for number, line in read_lines(Path("text")): ...  # doctest: +SKIP
    """
    with os.fdopen(open_regular(path, "a manifest"), "rb", buffering=1 << 18) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE:
            raise DataError(f"{path} has {size} bytes, of a manifest at most {MAX_FILE} are read; split it into sets")
        number = 0
        try:
            while raw := file.readline(MAX_LINE + 1):
                number += 1
                if number == 1:
                    raw = _without_mark(raw, path)
                yield number, _text(raw, path, number)
        except OSError as error:
            raise MachineError(f"{path}: line {number + 1} cannot be read: {reason(error)}") from error


def _without_mark(raw: bytes, path: Path) -> bytes:
    if raw.startswith(_UTF16):
        raise DataError(f"{path}: line 1 begins with the mark of UTF-16; save the file as UTF-8")
    return raw.removeprefix(codecs.BOM_UTF8)


def _text(raw: bytes, path: Path, number: int) -> str:
    if len(raw) > MAX_LINE:
        raise DataError(f"{path}: line {number} has more than {MAX_LINE} bytes; expected one utterance a line")
    if b"\0" in raw:
        raise DataError(f"{path}: line {number} holds a NUL byte, expected text in UTF-8; save the file as UTF-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: line {number} is not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start + 1} of the "
            f"line); save the file as UTF-8"
        ) from error
