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
    HsaWarning,
    MachineError,
    MismatchError,
    NonFiniteError,
    PatchError,
    ProvenanceError,
    RequestError,
    SourceChanged,
    SourceError,
    StrictError,
)

if TYPE_CHECKING:
    from hsa.api import merge
    from hsa.applying import apply
    from hsa.config import MergeConfig
    from hsa.inspection import Inspection, inspect
    from hsa.merger import Merger
    from hsa.patches import merge_patch
    from hsa.report import MergeReport, TensorReport
    from hsa.sweeping import SweepReport, sweep
    from hsa.tree import ReleaseReport, release
    from hsa.verification import VerifyReport, verify

_LAZY = {
    "Inspection": "hsa.inspection",
    "inspect": "hsa.inspection",
    "apply": "hsa.applying",
    "merge": "hsa.api",
    "merge_patch": "hsa.patches",
    "MergeConfig": "hsa.config",
    "MergeReport": "hsa.report",
    "Merger": "hsa.merger",
    "ReleaseReport": "hsa.tree",
    "release": "hsa.tree",
    "SweepReport": "hsa.sweeping",
    "TensorReport": "hsa.report",
    "VerifyReport": "hsa.verification",
    "verify": "hsa.verification",
    "sweep": "hsa.sweeping",
}

__all__ = [
    "BackendUnavailable",
    "DestinationError",
    "HeaderError",
    "HsaError",
    "HsaWarning",
    "Inspection",
    "MachineError",
    "MergeConfig",
    "MergeReport",
    "Merger",
    "MismatchError",
    "NonFiniteError",
    "PatchError",
    "ProvenanceError",
    "ReleaseReport",
    "RequestError",
    "SourceChanged",
    "SourceError",
    "StrictError",
    "SweepReport",
    "TensorReport",
    "VerifyReport",
    "__version__",
    "apply",
    "inspect",
    "merge",
    "merge_patch",
    "release",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
