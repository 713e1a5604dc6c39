"""`hsa.release`: a recipe to a tree of checkpoints with an index.

Everything is looked at before the first byte is written (`hsa.releases.plan`). Then each entry is built, or, where it
stands already, verified; what fails is left as it was, and the next entry follows.

When does an entry that stands count as done? Headers, sizes and names of local sources prove nothing: another training
run of the same model has the same ones. So the merge is computed again and every byte of every file compared. Where
all sources are commits of the Hub, which cannot change, the files' own digests are enough against damage, and
nothing is fetched again; against somebody who writes digests anew, `hsa verify --sources` is the answer.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hsa.actions.keywords import RELEASE, run_options
from hsa.actions.merge import run_merge
from hsa.actions.signatures import declared_keywords
from hsa.arguments import check_functions, check_paths
from hsa.errors import HsaError, MachineError, RequestError, StrictError, one_line
from hsa.option_names import as_keys, option, spelled
from hsa.outputs.provenance import load as load_provenance
from hsa.outputs.release_index import INDEX
from hsa.outputs.report import MergeReport
from hsa.releases import index
from hsa.releases.index import EntryState, Row
from hsa.releases.plan import MAX_NAMED, PlannedEntry, ReleasePlan, plan_release, state_of
from hsa.releases.recipe import keys
from hsa.sources.hub.repository import find_id
from hsa.sources.roles import BASE
from hsa.system.manifest import PROVENANCE
from hsa.system.threads import out_of_memory
from hsa.system.types import PathLike
from hsa.verification.verify import VerifyReport, verify

__all__ = ["EntryReport", "ReleaseReport", "release"]

Progress = Callable[[str, int, int], None]

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class EntryReport:
    """What became of an entry; `problem` says why it failed, `merge` is the report of one that was built, and
    `notes` are of one that was verified. `exit_code` is 2 where only `strict` refused it, and 1 for other failures."""

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


@dataclass(frozen=True)
class ReleaseReport:
    """A finished release. Sizes are bytes, `seconds` wall time; `index_written` is false where the index stood already,
    `index_problem` says why it could not be written."""

    tree: Path
    entries: tuple[EntryReport, ...]
    seconds: float
    index_written: bool
    index_problem: str | None
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.count(result)} {result}" for result in ("built", "verified", "failed"))
        index = "" if self.index_problem is None else "; the index could not be written"
        return one_line(f"<hsa.ReleaseReport of {self.tree}: {counts}{index}>")

    @property
    def failed(self) -> tuple[EntryReport, ...]:
        return tuple(entry for entry in self.entries if entry.result == "failed")

    @property
    def ok(self) -> bool:
        return not self.failed and self.index_problem is None

    @property
    def exit_code(self) -> int:
        """What the command line returns: 2 where warnings that `strict` made errors are all that went wrong."""
        codes = [entry.exit_code for entry in self.failed] + ([1] if self.index_problem is not None else [])
        return min(codes, default=0)

    def count(self, result: str) -> int:
        return sum(entry.result == result for entry in self.entries)

    def as_dict(self) -> dict[str, Any]:
        """What `hsa release --json` prints."""
        merges = [entry.merge for entry in self.entries if entry.merge is not None]
        return {
            "tree": str(self.tree),
            "ok": self.ok,
            "built": self.count("built"),
            "verified": self.count("verified"),
            "failed": self.count("failed"),
            "index_written": self.index_written,
            "index_problem": self.index_problem,
            "seconds": self.seconds,
            "bytes_read": sum(entry.bytes_read for entry in self.entries),
            "bytes_written": sum(merge.bytes_written for merge in merges),
            "bytes_fetched": sum(merge.bytes_fetched for merge in merges),
            "peak_memory_bytes": max(entry.peak_memory_bytes for entry in self.entries),
            "entries": [entry.as_dict() for entry in self.entries],
            "notes": list(self.notes),
        }


@declared_keywords(RELEASE)
def release(
    recipe: PathLike,
    output: PathLike,
    *,
    progress: Progress | None = None,
    watch: Callable[[EntryReport], None] | None = None,
    **keywords: Any,
) -> ReleaseReport:
    """Build the tree of a recipe: `output/<group>/<name>` for each merge, and an index over them.

    Args:
        recipe: a YAML file; see `hsa.releases.recipe` and the README.
        output: the directory of the tree, new or of an earlier run. What the recipe does not name is left alone.
        {options}
        progress: called now and then with an entry's path, bytes done and bytes in all.
        watch: called with what became of each entry.

    With `strict`, what headers tell stops the release; an entry whose merge warns is not written, and is a failure.

    Returns the report; entries that failed are in it and stop nothing else. Raises RequestError, SourceError or
    MachineError before anything is written: for a bad recipe, merges that cannot be done, a disk too small.
    """
    started = time.perf_counter()
    check_paths(recipe=recipe, output=output)
    check_functions(progress=progress, watch=watch)
    how = run_options(RELEASE, keywords)
    release_plan = plan_release(recipe, output, **keywords)
    if release_plan.short:
        raise MachineError(f"{release_plan.short[0]}; nothing was written: free some space, or choose another tree")
    reports, rows = [], []
    for planned in release_plan.entries:
        report, row = _build_or_verify(planned, progress, overwrite=how.overwrite)
        reports.append(report)
        rows.append(row)
        if watch is not None:
            watch(report)
    index_written, index_problem = _write_index(release_plan, rows, sync=how.sync)
    seconds = time.perf_counter() - started
    return ReleaseReport(release_plan.tree, tuple(reports), seconds, index_written, index_problem, release_plan.notes)


def _build_or_verify(planned: PlannedEntry, progress: Progress | None, *, overwrite: bool) -> tuple[EntryReport, Row]:
    """Build or verify one entry, and look at how it stands then."""
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
        if state == "missing":
            state = _state_after_failure(planned)
        code = 2 if isinstance(error, StrictError) else 1
        return EntryReport(path, "failed", reason, None, bytes_read, peak_memory, exit_code=code), _row(planned, state)
    report = EntryReport(
        path,
        "built",
        None,
        merge_report,
        bytes_read + merge_report.bytes_read,
        max(peak_memory, merge_report.peak_memory_bytes),
    )
    return report, _row(planned, "complete")


def _overwrite_hint() -> str:
    return f"give {option('overwrite', True)} to build it again"


def _state_after_failure(planned: PlannedEntry) -> EntryState:
    """How an entry stands that was not there and could not be built: another run may have built it just now."""
    if not (planned.plan.output / PROVENANCE).is_file():
        return "missing"
    try:
        return state_of(planned.plan.output, planned.request)[0]
    except HsaError:  # its sources cannot be opened any more
        return "other"


def _describe_problems(state: EntryState, report: VerifyReport) -> str:
    texts = [f"{problem.file}: {problem.what}" for problem in report.problems[:MAX_NAMED]]
    more = f"; and {len(report.problems) - MAX_NAMED} more" if len(report.problems) > MAX_NAMED else ""
    cause = "it was made from other sources" if state == "other" else "it is damaged"
    return f"{cause}: {'; '.join(texts)}{more}"


def _sources_to_compare(planned: PlannedEntry) -> dict[str, Any]:
    """The sources to compute the merge from again, with the ids that the recipe gives them; none where all are commits
    of the Hub, which cannot change."""
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


def _write_index(release_plan: ReleasePlan, rows: Sequence[Row], *, sync: bool) -> tuple[bool, str | None]:
    """Write the index, unless nothing stands in the tree at all; whether it was written, and what went wrong."""
    if all(row.provenance is None for row in rows) and not os.path.lexists(release_plan.tree / INDEX):
        return False, None
    try:
        return index.write(release_plan.tree, index.render(release_plan.recipe, rows), sync=sync), None
    except (HsaError, OSError) as error:
        return False, str(error)
