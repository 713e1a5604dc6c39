"""`hsa.release`: build a tree of checkpoints with an index from a recipe.

Everything is checked before the first byte is written (`hsa.releases.plan`). Then each entry is built or, if it exists,
verified (`hsa.releases.entries`), in this process or as a Ray task (`hsa.releases.on_ray`). A failed entry is left
unchanged, and the release continues with the next one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.actions.keywords import RELEASE, run_options
from hsa.actions.signatures import declared_keywords
from hsa.arguments import check_functions, check_paths
from hsa.errors import HsaError, MachineError, one_line
from hsa.outputs.release_index import INDEX
from hsa.releases import index, on_ray
from hsa.releases.entries import EntryReport, Progress, build_or_verify
from hsa.releases.index import Row
from hsa.releases.plan import ReleasePlan, plan_release
from hsa.system.types import PathLike

__all__ = ["EntryReport", "ReleaseReport", "release"]


@dataclass(frozen=True)
class ReleaseReport:
    """A finished release. Sizes are in bytes; `seconds` is wall time.

    `index_written` is false if the index was already current; `index_problem` says why it could not be written.

    Example:
        >>> report = hsa.release("recipe.yaml", output="tree")
        >>> report.index_written, report.index_problem
        (True, None)
    """

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
        """The exit code of the command line: 2 if all failures are warnings that `strict` turned into errors."""
        codes = [entry.exit_code for entry in self.failed] + ([1] if self.index_problem is not None else [])
        return min(codes, default=0)

    def count(self, result: str) -> int:
        return sum(entry.result == result for entry in self.entries)

    def as_dict(self) -> dict[str, Any]:
        """The report as `hsa release --json` prints it."""
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
    ray: bool | str = False,
    **keywords: Any,
) -> ReleaseReport:
    """Build the tree of a recipe: `output/<group>/<name>` for each merge, and an index of them.

    Args:
        recipe: a YAML file; see `hsa.releases.recipe` and docs/release.md.
        output: the directory of the tree, new or of an earlier run. Files that the recipe does not name are left alone.
        {options}
        progress: called now and then with an entry's path, the bytes done and the total bytes; not with `ray`.
        watch: called with the report of each entry as soon as the entry has ended.
        ray: build the entries as Ray tasks, several at a time, on the cluster at this address (`HOST:PORT`). With True,
            use the cluster that the environment names or that runs on this machine; if there is none, start Ray on this
            machine. The sources and the tree must be on a filesystem that all nodes share; sources may also be hub ids.
            The tree is the same, byte for byte. `threads` is then per entry, and each entry requests that many CPUs
            from Ray: 4 by default, or all of the largest node if it has fewer.

    With `strict`, a warning that headers cause stops the release before anything is written, and a later warning makes
    its entry fail.

    Returns the report. A failed entry is reported there and does not stop the others. Raises RequestError, SourceError
    or MachineError before anything is written: for a bad recipe, merges that cannot be done, or too little disk space.

    Example:
        >>> report = hsa.release("recipe.yaml", output="tree")
        >>> len(report.entries)
        1
    """
    started = time.perf_counter()
    check_paths(recipe=recipe, output=output)
    check_functions(progress=progress, watch=watch)
    how = run_options(RELEASE, keywords)
    if ray is not False:
        on_ray.check(ray)
    release_plan = plan_release(recipe, output, **keywords)
    if release_plan.short:
        raise MachineError(f"{release_plan.short[0]}; nothing was written: free some space, or choose another tree")
    results: list[tuple[EntryReport, Row]] = []
    if ray is False:
        for planned in release_plan.entries:
            results.append(build_or_verify(planned, progress, overwrite=how.overwrite))
            if watch is not None:
                watch(results[-1][0])
    else:
        results = on_ray.build_all(release_plan, ray, overwrite=how.overwrite, watch=watch)
    reports, rows = [report for report, _ in results], [row for _, row in results]
    index_written, index_problem = _write_index(release_plan, rows, sync=how.sync)
    seconds = time.perf_counter() - started
    return ReleaseReport(release_plan.tree, tuple(reports), seconds, index_written, index_problem, release_plan.notes)


def _write_index(release_plan: ReleasePlan, rows: Sequence[Row], *, sync: bool) -> tuple[bool, str | None]:
    """Write the index, unless the tree is empty. Return whether it was written, and what went wrong."""
    if all(row.provenance is None for row in rows) and not os.path.lexists(release_plan.tree / INDEX):
        return False, None
    try:
        return index.write(release_plan.tree, index.render(release_plan.recipe, rows), sync=sync), None
    except (HsaError, OSError) as error:
        return False, str(error)
