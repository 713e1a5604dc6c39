"""Every error that hsa raises on purpose.

    HsaError                       exit code 2 unless said otherwise
    ├── RequestError               the request is bad: an option, a parameter, a destination
    │   ├── DestinationError       the output may not be written there
    │   └── BackendUnavailable     a backend or device was asked for by name and cannot be had
    ├── SourceError                an input is bad
    │   ├── HeaderError            a safetensors header or an index is malformed
    │   ├── MismatchError          the three sources do not fit together
    │   ├── NonFiniteError         NaN or Inf in a target tensor or in a result
    │   ├── PatchError             a patch file that is none, damaged, or made for another primary
    │   ├── ProvenanceError        hsa_merge.json of an output is missing, damaged, or not what it should be
    │   └── SourceChanged          a source changed while it was read
    └── MachineError               exit code 1: disk full, out of memory, input or output failed

A message is one line: what is wrong, where, what was expected, and what to do.
"""

from __future__ import annotations

import reprlib
from typing import Any

__all__ = [
    "BackendUnavailable",
    "DestinationError",
    "HeaderError",
    "HsaError",
    "MachineError",
    "MismatchError",
    "NonFiniteError",
    "PatchError",
    "ProvenanceError",
    "RequestError",
    "SourceChanged",
    "SourceError",
]


class HsaError(Exception):
    """Base class of every public error; `exit_code` is what the command line returns."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RequestError(HsaError):
    """A bad request: an option or a parameter out of range, or options that exclude each other."""


class DestinationError(RequestError):
    """The output may not be written there."""


class BackendUnavailable(RequestError):
    """A backend or device was asked for by name and this machine cannot give it."""


class SourceError(HsaError):
    """A bad input: base, primary or secondary."""


class HeaderError(SourceError):
    """A safetensors header, or an index of shards, that is malformed."""


class MismatchError(SourceError):
    """Sources that do not fit together."""


class NonFiniteError(SourceError):
    """NaN or Inf in a target tensor, or in a merged or cast value."""


class PatchError(SourceError):
    """A patch file is none, is damaged, or was made for another primary."""


class ProvenanceError(SourceError):
    """The provenance of an output is missing, damaged, or of another version."""


class SourceChanged(SourceError):
    """A source changed while it was read; nothing was written."""


class MachineError(HsaError):
    """The machine failed: disk full, out of memory, an input or output error."""

    exit_code = 1


MAX_MESSAGE = 4000
"""Characters of a message that are shown: a name in a file may be as long as the file."""


def one_line(text: str) -> str:
    """The text with every control character escaped, so that names from files cannot forge lines; of a very long one
    its two ends."""
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} [...] {text[-MAX_MESSAGE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class _BoundedRepr(reprlib.Repr):
    """A repr whose cost does not depend on the value: few levels, few items, and numbers that are never written out
    beyond a few hundred bits."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = 6
        self.maxstring = self.maxlong = limit
        self.maxother = limit

    def repr_str(self, x: str, level: int) -> str:
        return self._cut(repr(x[: self.maxstring + 1]))

    def repr_bytes(self, x: bytes, level: int) -> str:
        return self._cut(repr(x[: self.maxstring + 1]))

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 256 else f"<a whole number of {x.bit_length()} bits>"

    def repr_instance(self, x: Any, level: int) -> str:
        return repr(x) if type(x) in (float, bool, type(None), complex) else f"<{type(x).__name__}>"

    def _cut(self, text: str) -> str:
        return text if len(text) <= self.maxstring else f"{text[: self.maxstring]}..."


def shown(value: Any, limit: int = 80) -> str:
    """A value from a file or a caller for a message, in at most `limit` characters and bounded time.

    Unlike `repr`, it never walks a whole nested value, never writes out a huge number, and never calls the `__repr__`
    of an object that is not a plain value.

    Example:
        >>> shown({"k": [1, 2]})
        "{'k': [1, 2]}"
    """
    text = _BoundedRepr(limit).repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
