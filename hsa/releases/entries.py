"""Build or verify one entry of a release, and report the result.

An existing entry is verified before it is skipped. Names, sizes and headers of local sources are not enough: another
training run of the same model has the same ones. So the merge is recomputed, and all files are compared byte by byte.
If all sources are commits of the Hub, which cannot change, comparing the recorded digests is enough, and nothing is
downloaded. `hsa verify --sources` also finds files whose recorded digests were forged.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from hsa.actions.merge import run_merge
from hsa.errors import HsaError, RequestError, StrictError
from hsa.option_names import as_keys, option, spelled
from hsa.outputs.provenance import load as load_provenance
from hsa.outputs.report import MergeReport
from hsa.releases.index import EntryState, Row
from hsa.releases.plan import MAX_NAMED, PlannedEntry, state_of
from hsa.releases.recipe import keys
from hsa.sources.hub.repository import find_id
from hsa.sources.roles import BASE
from hsa.system.manifest import PROVENANCE
from hsa.system.threads import out_of_memory
from hsa.verification.verify import VerifyReport, verify

Progress = Callable[[str, int, int], None]

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class EntryReport:
    """The result of an entry. `problem` says why it failed, `merge` is the report of a built entry, and `notes` are
    those of a verified entry. `exit_code` is 2 if only `strict` refused the entry, and 1 for other failures."""

    path: str
    result: Literal["built", "verified", "failed"]
    problem: str | None = None
    merge: MergeReport | None = None
    bytes_read: int = 0
    peak_memory_bytes: int = 0
    notes: tuple[str, ...] = ()
    exit_code: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "result": self.result,
            "problem": self.problem,
            "notes": list(self.notes),
            "merge": None if self.merge is None else self.merge.as_dict(),
        }


def build_or_verify(planned: PlannedEntry, progress: Progress | None, *, overwrite: bool) -> tuple[EntryReport, Row]:
    """Build or verify one entry, and return its report and its state afterwards."""
    path = planned.entry.path
    step = None if progress is None else lambda done, total: progress(path, done, total)
    bytes_read = peak_memory = 0
    state = planned.state
    try:
        if planned.action == "refuse":
            raise RequestError(f"{planned.why}; {planned.remedy or _overwrite_hint()}")
        if planned.action == "verify":
            verified_report = verify(
                planned.plan.output, threads=planned.request.threads, progress=step, **_sources_to_compare(planned)
            )
            bytes_read, peak_memory = verified_report.bytes_read, verified_report.peak_memory_bytes
            if verified_report.ok:
                verified = EntryReport(path, "verified", None, None, bytes_read, peak_memory, verified_report.notes)
                return verified, _row(planned, "complete")
            other_sources = any(problem.file in planned.request.sources for problem in verified_report.problems)
            state = "other" if other_sources else "damaged"
            if not overwrite:
                raise RequestError(f"{_describe_problems(state, verified_report)}; {_overwrite_hint()}")
        with spelled(as_keys(keys())):
            merge_report = run_merge(replace(planned.request, overwrite=planned.state != "missing"), step)
    except (HsaError, OSError, MemoryError) as error:
        reason = out_of_memory() if isinstance(error, MemoryError) else str(error)
        code = 2 if isinstance(error, StrictError) else 1
        return failed(planned, reason, state, bytes_read=bytes_read, peak_memory=peak_memory, exit_code=code)
    report = EntryReport(
        path,
        "built",
        None,
        merge_report,
        bytes_read + merge_report.bytes_read,
        max(peak_memory, merge_report.peak_memory_bytes),
    )
    return report, _row(planned, "complete")


def failed(
    planned: PlannedEntry,
    problem: str,
    state: EntryState,
    *,
    bytes_read: int = 0,
    peak_memory: int = 0,
    exit_code: int = 1,
) -> tuple[EntryReport, Row]:
    """The report of an entry that could not be built or verified, and its state afterwards; `state` is the one
    before."""
    if state == "missing":
        state = _state_after_failure(planned)
    report = EntryReport(planned.entry.path, "failed", problem, None, bytes_read, peak_memory, exit_code=exit_code)
    return report, _row(planned, state)


def _overwrite_hint() -> str:
    return f"give {option('overwrite', True)} to build it again"


def _state_after_failure(planned: PlannedEntry) -> EntryState:
    """The state of an entry that was missing and could not be built; another run may have built it meanwhile."""
    if not (planned.plan.output / PROVENANCE).is_file():
        return "missing"
    try:
        return state_of(planned.plan.output, planned.request)[0]
    except HsaError:  # its sources can no longer be opened
        return "other"


def _describe_problems(state: EntryState, report: VerifyReport) -> str:
    texts = [f"{problem.file}: {problem.what}" for problem in report.problems[:MAX_NAMED]]
    more = f"; and {len(report.problems) - MAX_NAMED} more" if len(report.problems) > MAX_NAMED else ""
    cause = "it was made from other sources" if state == "other" else "it is damaged"
    return f"{cause}: {'; '.join(texts)}{more}"


def _sources_to_compare(planned: PlannedEntry) -> dict[str, Any]:
    """The sources for recomputing the merge, with the ids from the recipe; none if all are commits of the Hub, which
    cannot change."""
    sources, ids = planned.request.sources, planned.request.ids or {}
    provenance = load_provenance(planned.plan.output)
    recorded = provenance.record.sources
    immutable = all(provenance.files.values()) and all(
        find_id(path) is not None and not ids.get(role) and _COMMIT.fullmatch(recorded[role].identity.revision or "")
        for role, path in sources.items()
    )
    if immutable:
        return {}
    base = {BASE: sources[BASE], f"{BASE}_id": ids.get(BASE)} if BASE in sources else {}
    models = [role for role in sources if role != BASE]
    return {**base, "models": [sources[role] for role in models], "model_ids": [ids.get(role) for role in models]}


def _row(planned: PlannedEntry, state: EntryState) -> Row:
    if state != "complete":
        return Row(planned.entry, state, None)
    try:
        return Row(planned.entry, state, load_provenance(planned.plan.output))
    except HsaError:  # damaged by another program since it was written or verified
        return Row(planned.entry, "damaged", None)
