"""Headwise Selective Attention merge for Whisper fine-tunes: streamed, exact, as fast as a copy.

Importing this package imports neither torch nor triton nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hsa._version import __version__
from hsa.errors import (
    BackendUnavailable,
    DestinationError,
    HeaderError,
    HsaError,
    MachineError,
    MismatchError,
    NonFiniteError,
    ProvenanceError,
    RequestError,
    SourceChanged,
    SourceError,
)

if TYPE_CHECKING:
    from hsa.api import merge
    from hsa.config import MergeConfig
    from hsa.inspection import Inspection, inspect
    from hsa.merger import Merger
    from hsa.report import MergeReport, TensorReport

_LAZY = {
    "Inspection": "hsa.inspection",
    "inspect": "hsa.inspection",
    "merge": "hsa.api",
    "MergeConfig": "hsa.config",
    "MergeReport": "hsa.report",
    "Merger": "hsa.merger",
    "TensorReport": "hsa.report",
}

__all__ = [
    "BackendUnavailable",
    "DestinationError",
    "HeaderError",
    "HsaError",
    "Inspection",
    "MachineError",
    "MergeConfig",
    "MergeReport",
    "Merger",
    "MismatchError",
    "NonFiniteError",
    "ProvenanceError",
    "RequestError",
    "SourceChanged",
    "SourceError",
    "TensorReport",
    "__version__",
    "inspect",
    "merge",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
