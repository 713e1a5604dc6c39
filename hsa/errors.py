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


def one_line(text: str) -> str:
    """The text with every control character escaped, so that names from files cannot forge lines."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
