"""The reports that `hsa.merge` and its dry run return, and what a finished computation warns of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.errors import one_line
from hsa.findings import Findings, counted
from hsa.methods.hsa import HsaSettings, settings_of
from hsa.methods.selection import TIE_RISK, count_heads, narrowest
from hsa.methods.tensors import Outcome, TensorTask
from hsa.outputs.extent import Extent, merge_more_hint, planned_weight_range, weight_dict, weight_text
from hsa.outputs.merge_warnings import change_findings
from hsa.outputs.provenance import TargetRecord

NO_DIGESTS = (
    "without whole-file digests a later verification cannot tell whether copied tensors and the small files are still "
    "what was written, only whether the targets follow from the sources"
)


@dataclass(frozen=True)
class TensorReport:
    """One merged tensor: stack and layer, the heads selected, every head's score, and the margin of the cut.

    `scores` are L2 norms (not squared), one per head. `margin` is None where no head or every head is selected.
    """

    name: str
    stack: str
    layer: int
    kind: str
    part: str
    heads: int
    keep: int
    selected: tuple[int, ...]
    scores: tuple[float, ...]
    margin: float | None
    coefficient: float

    @classmethod
    def of(cls, target: TargetRecord) -> TensorReport:
        projection = target.projection
        return cls(
            target.name,
            projection.stack,
            projection.layer,
            f"{projection.block}.{projection.module}",
            projection.part,
            target.heads,
            target.keep,
            target.selected,
            target.scores,
            target.margin,
            target.coefficient,
        )


@dataclass(frozen=True)
class MergeReport:
    """A finished merge.

    Sizes are bytes, `seconds` wall time. `bytes_read_by_source` splits `bytes_read` by role: of base and secondary only
    headers, configs and targets are read where nothing else is needed. `bytes_fetched` came from the Hub: bytes of
    files that were received now, 0 for local sources and for what the caches hold. `tensors` is keyed by tensor name as
    primary stores it. `extent` says how much was merged, and how the task vectors lie. `unlinked` are the sources that
    the card does not link to the Hub, for want of a hub id. `doubtful` says that the sources hardly belong together:
    that they are exchanged, given twice, unrelated or merged already, as `warnings` tell.
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
    parameters: Mapping[str, Any]
    tensors: Mapping[str, TensorReport]
    extent: Extent
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    unlinked: tuple[str, ...] = ()
    doubtful: bool = False

    def __repr__(self) -> str:
        return one_line(f"<hsa.MergeReport of {self.output}: {self.extent.text}{counted(self.warnings)}>")

    @property
    def selected_heads(self) -> int:
        return count_heads(self.tensors.values()).selected

    @property
    def hint(self) -> str | None:
        """With HSA's defaults: what would merge more. None with doubtful sources, which no parameter mends."""
        return None if self.doubtful else merge_more_hint(HsaSettings.from_dict(self.parameters), self.extent.weights)

    @property
    def total_heads(self) -> int:
        return count_heads(self.tensors.values()).total

    @property
    def narrowest(self) -> TensorReport | None:
        """The tensor with the smallest margin; None where no tensor has one."""
        return narrowest(self.tensors.values())

    def as_dict(self) -> dict[str, Any]:
        """What `hsa merge --json` prints."""
        narrowest = self.narrowest
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
            "selected_heads": self.selected_heads,
            "total_heads": self.total_heads,
            "min_margin": narrowest.margin if narrowest else None,
            "min_margin_tensor": narrowest.name if narrowest else None,
            **self.extent.as_dict(),
            "hint": self.hint,
            "parameters": dict(self.parameters),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "unlinked": list(self.unlinked),
        }


@dataclass(frozen=True)
class PlanReport:
    """What a merge would do: nothing was read but headers and small files, and nothing written.

    Sizes are bytes; those to write leave out the model card and the provenance, which are made at the end.
    `bytes_fetched` came from the Hub for this plan, `bytes_to_fetch` are what the merge would fetch of weights.
    `doubtful` says that base is itself an output of hsa.
    """

    output: Path
    route: str
    backend: str
    device: str
    parameters: Mapping[str, Any]
    settings: HsaSettings
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
    def heads_to_merge(self) -> int:
        """How many heads will be merged where none tie at the cut."""
        return sum(settings_of(task, self.settings)[0] for task in self.targets)

    @property
    def total_heads(self) -> int:
        return sum(task.partition.groups for task in self.targets)

    @property
    def text(self) -> str:
        """How much will be merged, in one line for people."""
        return weight_text(planned_weight_range(self.targets, self.settings), self.heads_to_merge, self.total_heads)

    @property
    def hint(self) -> str | None:
        """With HSA's defaults: what would merge more. None with a base that is itself a merge."""
        return (
            None
            if self.doubtful
            else merge_more_hint(
                HsaSettings.from_dict(self.parameters), planned_weight_range(self.targets, self.settings)
            )
        )

    def as_dict(self) -> dict[str, Any]:
        """What `hsa merge --dry-run --json` prints."""
        return {
            "dry_run": True,
            "output": str(self.output),
            "route": self.route,
            "backend": self.backend,
            "device": self.device,
            "target_tensors": len(self.targets),
            "heads_to_merge": self.heads_to_merge,
            "total_heads": self.total_heads,
            "secondary_weight": weight_dict(planned_weight_range(self.targets, self.settings)),
            "hint": self.hint,
            "targets": {
                task.stored.name: {"heads": task.partition.groups, "keep": settings_of(task, self.settings)[0]}
                for task in self.targets
            },
            "files": dict(self.files),
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "bytes_fetched": self.bytes_fetched,
            "bytes_to_fetch": self.bytes_to_fetch,
            "free_bytes": self.free_bytes,
            "parameters": dict(self.parameters),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def outcome_findings(outcomes: Sequence[Outcome]) -> Findings:
    """Notes and warnings that only the finished computation can give, besides those of the sources."""
    return change_findings(outcomes) + selection_findings(outcomes)


def selection_findings(outcomes: Sequence[Outcome]) -> Findings:
    """Narrow margins and ties between the heads that are merged and those that are not."""
    notes, warnings = [], []
    close = [o for o in outcomes if o.decision.margin is not None and o.decision.margin < TIE_RISK]
    if close:
        warnings.append(
            f"{len(close)} tensors have a margin below {TIE_RISK:g}, such as {close[0].task.stored.name}: another "
            f"backend or machine could select other heads there"
        )
    tied = [o for o in outcomes if len(o.decision.selected) > o.decision.keep]
    if tied:
        notes.append(
            f"{len(tied)} tensors have ties at the cut, such as {tied[0].task.stored.name}: all tied heads are merged"
        )
    return Findings(tuple(notes), tuple(warnings))
