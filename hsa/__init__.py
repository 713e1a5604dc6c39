"""Merge fine-tunes of speech models exactly, and find the merge that serves your data.

Importing this package imports neither torch nor triton nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hsa._version import __version__
from hsa.errors import (
    AudioError,
    BackendUnavailable,
    DataError,
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
    from hsa.actions.apply import apply
    from hsa.actions.merge import merge
    from hsa.actions.merger.merger import Merger
    from hsa.actions.patch import merge_patch
    from hsa.actions.request import Request
    from hsa.evaluation.data import data
    from hsa.evaluation.evaluate import evaluate
    from hsa.evaluation.report import Evaluation
    from hsa.evaluation.utterance import DataSet, Utterance
    from hsa.inspection.inspect import Inspection, ModelInspection, inspect
    from hsa.methods.hsa import HsaSettings
    from hsa.methods.tensors import TensorRecord
    from hsa.outputs.report import MergeReport
    from hsa.releases.release import ReleaseReport, release
    from hsa.searches.search import search
    from hsa.searches.study import Study
    from hsa.searches.trials import Trial
    from hsa.sweeps.sweep import SweepReport, sweep
    from hsa.verification.verify import VerifyReport, verify

_LAZY = {
    "DataSet": "hsa.evaluation.utterance",
    "Evaluation": "hsa.evaluation.report",
    "Utterance": "hsa.evaluation.utterance",
    "evaluate": "hsa.evaluation.evaluate",
    "data": "hsa.evaluation.data",
    "Inspection": "hsa.inspection.inspect",
    "ModelInspection": "hsa.inspection.inspect",
    "inspect": "hsa.inspection.inspect",
    "apply": "hsa.actions.apply",
    "merge": "hsa.actions.merge",
    "merge_patch": "hsa.actions.patch",
    "HsaSettings": "hsa.methods.hsa",
    "MergeReport": "hsa.outputs.report",
    "Merger": "hsa.actions.merger.merger",
    "Request": "hsa.actions.request",
    "ReleaseReport": "hsa.releases.release",
    "release": "hsa.releases.release",
    "search": "hsa.searches.search",
    "Study": "hsa.searches.study",
    "Trial": "hsa.searches.trials",
    "SweepReport": "hsa.sweeps.sweep",
    "TensorRecord": "hsa.methods.tensors",
    "VerifyReport": "hsa.verification.verify",
    "verify": "hsa.verification.verify",
    "sweep": "hsa.sweeps.sweep",
}

__all__ = [
    "AudioError",
    "BackendUnavailable",
    "DataError",
    "DataSet",
    "DestinationError",
    "Evaluation",
    "HeaderError",
    "HsaError",
    "HsaSettings",
    "HsaWarning",
    "Inspection",
    "MachineError",
    "MergeReport",
    "Merger",
    "MismatchError",
    "ModelInspection",
    "NonFiniteError",
    "PatchError",
    "ProvenanceError",
    "ReleaseReport",
    "Request",
    "RequestError",
    "SourceChanged",
    "SourceError",
    "StrictError",
    "Study",
    "SweepReport",
    "TensorRecord",
    "Trial",
    "Utterance",
    "VerifyReport",
    "__version__",
    "apply",
    "data",
    "evaluate",
    "inspect",
    "merge",
    "merge_patch",
    "release",
    "search",
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
