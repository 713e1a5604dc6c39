"""The reports that `hsa.merge` and its dry run return, and the warnings of a finished computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.errors import one_line
from hsa.findings import Findings, counted
from hsa.methods.registry import AnyMethod, method_named
from hsa.methods.settings import Settings
from hsa.methods.tensors import Outcome, Summary, TensorRecord, TensorTask

NO_DIGESTS = (
    "without whole-file digests a later verification cannot tell whether copied tensors and the small files are still "
    "what was written, only whether the targets follow from the sources"
)


@dataclass(frozen=True)
class MergeReport:
    """A finished merge.

    Sizes are bytes, `seconds` wall time. `bytes_read_by_source` splits `bytes_read` by role. From sources other than
    the anchor, only headers, configs and targets are read where nothing else is needed. `bytes_fetched` counts the
    bytes received now from the Hub: 0 for local sources and for cached files. `tensors` is keyed by tensor name as the
    anchor stores it. `extent` says how much was merged and, with HSA, how the task vectors relate. `unlinked` are the
    sources that the card does not link to the Hub because they have no hub id. `doubtful` says that the sources hardly
    belong together: they are swapped, given twice, unrelated or merged already, as `warnings` explain.

    Example:
        >>> report = hsa.merge("whisper-small", "m1", "m2", "merged")
        >>> report.output.name, report.backend
        ('merged', 'cpu')
    """

    output: Path
    seconds: float
    bytes_read: int
    bytes_read_by_source: Mapping[str, int]
    bytes_written: int
    bytes_fetched: int
    peak_memory_bytes: int
    backend: str
    device: str
    route: str
    settings: Settings
    tensors: Mapping[str, TensorRecord]
    extent: Summary
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    unlinked: tuple[str, ...] = ()
    doubtful: bool = False

    def __repr__(self) -> str:
        return one_line(f"<hsa.MergeReport of {self.output}: {self.extent.text}{counted(self.warnings)}>")

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings under their names in records."""
        return self.settings.as_dict()

    @property
    def selected_heads(self) -> int | None:
        """The number of merged heads; None if the method merges whole tensors."""
        return self.extent.counts().get("selected_heads")

    @property
    def total_heads(self) -> int | None:
        """The number of heads of the targets; None if the method merges whole tensors."""
        return self.extent.counts().get("total_heads")

    @property
    def hint(self) -> str | None:
        """With the method's defaults: what would merge more. None with doubtful sources, which no setting can fix."""
        return None if self.doubtful else method_named(self.settings.method).hint(self.settings, self.extent)

    @property
    def narrowest(self) -> TensorRecord | None:
        """The tensor with the smallest margin; None if no tensor has one."""
        name = self.extent.margins().get("min_margin_tensor")
        return None if name is None else self.tensors[name]

    def as_dict(self) -> dict[str, Any]:
        """The content that `hsa merge --json` prints."""
        return {
            "output": str(self.output),
            "seconds": self.seconds,
            "bytes_read": self.bytes_read,
            "bytes_read_by_source": dict(self.bytes_read_by_source),
            "bytes_written": self.bytes_written,
            "bytes_fetched": self.bytes_fetched,
            "peak_memory_bytes": self.peak_memory_bytes,
            "backend": self.backend,
            "device": self.device,
            "route": self.route,
            "target_tensors": len(self.tensors),
            **self.extent.counts(),
            **self.extent.margins(),
            **self.extent.as_dict(),
            "hint": self.hint,
            "parameters": self.parameters,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "unlinked": list(self.unlinked),
        }


@dataclass(frozen=True)
class PlanReport:
    """The effect of a planned merge. Only headers and small files were read, and nothing was written.

    Sizes are bytes. The bytes to write exclude the model card and the provenance, which are made at the end.
    `bytes_fetched` came from the Hub for this plan; `bytes_to_fetch` is the size of the weights that the merge would
    fetch. `doubtful` says that base is itself an output of hsa.
    """

    output: Path
    route: str
    backend: str
    device: str
    settings: Settings
    targets: tuple[TensorTask, ...]
    files: Mapping[str, int]
    bytes_to_read: int
    bytes_to_write: int
    bytes_fetched: int
    bytes_to_fetch: int
    free_bytes: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    doubtful: bool = False

    def __repr__(self) -> str:
        return one_line(f"<hsa.PlanReport of {self.output}: {self.text}{counted(self.warnings)}>")

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings under their names in records."""
        return self.settings.as_dict()

    @property
    def method(self) -> AnyMethod:
        """The method of the merge."""
        return method_named(self.settings.method)

    @property
    def extent(self) -> Summary:
        """How much will be merged, as far as the settings determine it."""
        return self.method.planned_summary(self.targets, self.settings)

    @property
    def heads_to_merge(self) -> int | None:
        """The number of heads to merge if none tie at the cut; None if the method merges whole tensors."""
        return self.extent.counts().get("heads_to_merge")

    @property
    def total_heads(self) -> int | None:
        """The number of heads of the targets; None if the method merges whole tensors."""
        return self.extent.counts().get("total_heads")

    @property
    def text(self) -> str:
        """How much will be merged, as one readable line."""
        return self.extent.text

    @property
    def hint(self) -> str | None:
        """With the method's defaults: what would merge more. None with a base that is itself a merge."""
        return None if self.doubtful else self.method.hint(self.settings, self.extent)

    def as_dict(self) -> dict[str, Any]:
        """The content that `hsa merge --dry-run --json` prints."""
        return {
            "dry_run": True,
            "output": str(self.output),
            "route": self.route,
            "backend": self.backend,
            "device": self.device,
            "target_tensors": len(self.targets),
            **self.extent.counts(),
            **self.extent.as_dict(),
            "hint": self.hint,
            "targets": {task.stored.name: self.method.planned_entry(task, self.settings) for task in self.targets},
            "files": dict(self.files),
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "bytes_fetched": self.bytes_fetched,
            "bytes_to_fetch": self.bytes_to_fetch,
            "free_bytes": self.free_bytes,
            "parameters": self.parameters,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def outcome_findings(method: AnyMethod, outcomes: Sequence[Outcome]) -> Findings:
    """The notes and warnings that need the finished computation, except those about the sources."""
    return method.result_findings(outcomes) + method.decision_findings(outcomes)
