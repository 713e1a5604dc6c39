"""Every error that hsa raises on purpose.

    HsaError                       exit code 2 unless said otherwise
    ├── StrictError                a warning that `strict` turned into an error
    ├── RequestError               the request is bad: an option, a parameter, a destination
    │   ├── DestinationError       the output may not be written there
    │   └── BackendUnavailable     a backend or device requested by name is not available
    ├── SourceError                an input is bad
    │   ├── HeaderError            a safetensors header or an index is malformed
    │   ├── MismatchError          the sources do not fit together
    │   ├── NonFiniteError         NaN or Inf in a target tensor or in a result
    │   ├── PatchError             a file is not a patch, is damaged, or was made for another primary
    │   ├── ProvenanceError        hsa_merge.json of an output is missing, damaged, or not as expected
    │   └── SourceChanged          a source changed while it was read
    ├── DataError                  a set of utterances is bad: its manifest, a reference, a hypothesis
    │   └── AudioError             audio is missing, is not audio, or has no samples where the manifest says
    └── MachineError               exit code 1: disk full, out of memory, or an I/O error

A message is one line: what is wrong, where, what was expected, and what to do.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from pathlib import PurePath
from types import FrameType, MappingProxyType
from typing import Any

__all__ = [
    "AudioError",
    "BackendUnavailable",
    "DataError",
    "DestinationError",
    "HeaderError",
    "HsaError",
    "HsaWarning",
    "MachineError",
    "MismatchError",
    "NonFiniteError",
    "PatchError",
    "ProvenanceError",
    "RequestError",
    "SourceChanged",
    "SourceError",
    "StrictError",
    "shown",
]


class HsaError(Exception):
    """Base class of every public error; `exit_code` is what the command line returns.

    Example:
        >>> try:
        ...     hsa.merge("not-there", "m1", "m2", "merged")
        ... except hsa.HsaError as error:
        ...     print(error.exit_code)
        2
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class StrictError(HsaError):
    """A warning that `strict` turned into an error; nothing was written."""


class RequestError(HsaError):
    """A bad request: an option or a parameter out of range, or options that exclude each other."""


class DestinationError(RequestError):
    """The output may not be written there."""


class BackendUnavailable(RequestError):
    """A backend or device requested by name is not available on this machine."""


class SourceError(HsaError):
    """A bad input: one of the sources of a merge."""


class HeaderError(SourceError):
    """A safetensors header, or an index of shards, that is malformed."""


class MismatchError(SourceError):
    """Sources that do not fit together."""


class NonFiniteError(SourceError):
    """NaN or Inf in a target tensor, or in a merged or cast value."""


class PatchError(SourceError):
    """A file that is not a patch, or a patch that is damaged or was made for another primary."""


class ProvenanceError(SourceError):
    """The provenance of an output is missing, damaged, or of another version."""


class SourceChanged(SourceError):
    """A source changed while it was read; nothing was written."""


class DataError(HsaError):
    """A bad set of utterances: its manifest, a reference or a hypothesis."""


class AudioError(DataError):
    """Audio that is missing, is not audio, has no samples, or ends earlier than the manifest says."""


class MachineError(HsaError):
    """The machine failed: disk full, out of memory, or an I/O error."""

    exit_code = 1


class HsaWarning(UserWarning):
    """A possible mistake, in one line, issued by Python calls that have no report to put it in.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", HsaWarning)  # refuse what is only warned of
    """


def warn(text: str) -> None:
    """Issue an HsaWarning that points at the line that called this package."""
    frame: FrameType | None = sys._getframe(1)
    level = 2  # the level of that frame, as warnings counts from this one
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("hsa", "contextlib"):
        frame, level = frame.f_back, level + 1
    warnings.warn(one_line(text), HsaWarning, stacklevel=level)


MAX_MESSAGE = 4000
"""The most characters of a message that are shown; a name read from a file may be as long as the file."""


def one_line(text: str) -> str:
    """Escape every control character of a text, so that names from files cannot forge lines. A very long text is cut to
    its two ends."""
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} [...] {text[-MAX_MESSAGE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


MAX_SHOWN_DEPTH, MAX_SHOWN_ITEMS = 3, 6
"""The nesting depth, and the number of items in each container, that `shown` looks at."""

MAX_SHOWN_BITS = 256
"""The most bits of an integer that `shown` writes out; the time for larger ones grows quadratically."""

_SHORT = {("torch", "dtype"), ("torch", "device")}
"""Types, by module and name, whose `str` is always short; the plain types are handled separately."""


def is_text(value: str) -> bool:
    """Whether a string can be encoded as UTF-8. File names may contain lone surrogates, which cannot.

    Example:
        >>> is_text("größe"), is_text("caf\\udce9")
        (True, False)
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any, limit: int = 80) -> str:
    """Format a value from a file or a caller for a message, in at most `limit` characters and bounded time.

    Unlike `repr`, it never walks a whole nested value, never writes out a huge number, and never calls the `__repr__`
    of an object that is not a plain value. numpy's numbers are shown like Python's, a path like its string.

    Example:
        >>> shown({"k": [1, 2]})
        "{'k': [1, 2]}"
    """
    text = _text(value, limit, MAX_SHOWN_DEPTH)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def listed(texts: Iterable[str], last: str = "and") -> str:
    """Join texts as a list in a sentence.

    Example:
        >>> listed(["base", "model1", "model2"])
        'base, model1 and model2'
    """
    *some, end = texts
    return f"{', '.join(some)} {last} {end}" if some else end


def _text(value: Any, limit: int, depth: int) -> str:
    """The start of a value's repr: at least `limit` characters, or all of it if it is shorter."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        bits = int.bit_length(value)
        return int.__repr__(value) if bits <= MAX_SHOWN_BITS else f"<a whole number of {bits} bits>"
    for kind in (float, complex):
        if isinstance(value, kind):
            return kind.__repr__(value)
    if isinstance(value, (str, PurePath)):
        return repr(str(value)[:limit])
    if isinstance(value, (bytes, bytearray)):
        return repr(bytes(memoryview(value)[:limit]))
    if isinstance(value, (dict, MappingProxyType, list, tuple, set, frozenset)):
        return _items(value, limit, depth)
    return _other(value, limit, depth)


def _items(value: Any, limit: int, depth: int) -> str:
    is_mapping = isinstance(value, (dict, MappingProxyType))
    items = islice(value.items() if is_mapping else value, MAX_SHOWN_ITEMS if depth > 0 else 0)
    if is_mapping:
        pieces = [f"{_text(key, limit, depth - 1)}: {_text(item, limit, depth - 1)}" for key, item in items]
    else:
        pieces = [_text(item, limit, depth - 1) for item in items]
    if len(pieces) < len(value):
        pieces.append("...")
    start, end = "()" if isinstance(value, tuple) else "[]" if isinstance(value, list) else "{}"
    comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
    return f"{start}{', '.join(pieces)}{comma}{end}"


def _other(value: Any, limit: int, depth: int) -> str:
    kind = type(value)
    numpy = sys.modules.get("numpy")  # if a value has one of its types, it is imported
    if numpy is not None:
        for scalar, plain in ((numpy.bool_, bool), (numpy.integer, int), (numpy.floating, float)):
            if isinstance(value, scalar):
                return repr(plain(value))
    if isinstance(value, Decimal):
        return str(value) if sys.getsizeof(value) <= 256 else "<a decimal number of many digits>"
    if isinstance(value, Fraction):
        return f"{_text(value.numerator, limit, depth)}/{_text(value.denominator, limit, depth)}"
    if isinstance(value, type):
        return f"<class {value.__name__[:limit]}>"
    if (kind.__module__, kind.__name__) in _SHORT:
        return str(value)
    return f"<{kind.__name__[:limit]}>"
