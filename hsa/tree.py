"""`hsa.release`: a recipe to a tree of checkpoints with an index; and the same as a plan alone.

Everything is looked at before the first byte is written: sources, shapes, destinations, free space. Then each entry is
built, or, where it stands already, verified; what fails is left as it was, and the next entry follows.

When does an entry that stands count as done? Headers, sizes and names of local sources prove nothing: another training
run of the same model has the same ones. So a plan takes the record's word where parameters, settings, card fields and
sources agree as far as headers tell, and a run proves it: the merge is computed again and every byte of every file
compared. Where all three sources are commits of the Hub, which cannot change, the files' own digests are enough.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hsa import api, fsio, provenance, tree_index
from hsa.checkpoint import ROLES, Role
from hsa.errors import HsaError, MachineError, RequestError
from hsa.hub import Hub, cache_directory, find_id
from hsa.output import PROVENANCE, check_tree
from hsa.provenance import Provenance, SourceRecord
from hsa.recipe import Entry, Recipe, load
from hsa.report import MergeReport, PlanReport
from hsa.request import PathLike, Request, open_sources
from hsa.tree_index import Row, Standing

__all__ = ["EntryReport", "ReleasePlan", "ReleaseReport", "plan", "release"]

Action = Literal["build", "verify", "rebuild", "refuse"]
Progress = Callable[[str, int, int], None]

SMALL = 1 << 20
"""Bytes to keep free for an entry's card and provenance, whose sizes are known at the end alone."""

NAMED = 5
"""Problems that one message names."""

_COMMIT_LENGTH = 40


@dataclass(frozen=True)
class PlannedEntry:
    """What is to become of an entry: `standing` is how it stands now by its record, `why` what differs or is wrong.

    `replaced` are the bytes that go when it is built anew.
    """

    entry: Entry
    request: Request
    action: Action
    standing: Standing
    why: str
    plan: PlanReport
    replaced: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.entry.path,
            "action": self.action,
            "why": self.why,
            "bytes_to_write": self.plan.bytes_to_write if self.action in ("build", "rebuild") else 0,
            "bytes_to_fetch": self.plan.bytes_to_fetch if self.action in ("build", "rebuild") else 0,
            "plan": self.plan.as_dict(),
        }


@dataclass(frozen=True)
class ReleasePlan:
    """What a release would do: nothing was read but headers and small files, and nothing written.

    `short` says where the disk has too little room; a release is refused then. Sizes are bytes.
    """

    recipe: Recipe
    tree: Path
    entries: tuple[PlannedEntry, ...]
    short: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def building(self) -> tuple[PlannedEntry, ...]:
        return tuple(planned for planned in self.entries if planned.action in ("build", "rebuild"))

    @property
    def bytes_to_write(self) -> int:
        return sum(planned.plan.bytes_to_write for planned in self.building)

    @property
    def bytes_to_fetch(self) -> int:
        return sum(planned.plan.bytes_to_fetch for planned in self.building)

    def as_dict(self) -> dict[str, Any]:
        """What `hsa release --dry-run --json` prints."""
        return {
            "dry_run": True,
            "tree": str(self.tree),
            "bytes_to_write": self.bytes_to_write,
            "bytes_to_fetch": self.bytes_to_fetch,
            "entries": [planned.as_dict() for planned in self.entries],
            "notes": list(self.notes),
            "warnings": list(self.short),
        }


@dataclass(frozen=True)
class EntryReport:
    """What became of an entry; `problem` says why it failed, `merge` is the report of one that was built."""

    path: str
    result: Literal["built", "verified", "failed"]
    problem: str | None = None
    merge: MergeReport | None = None
    bytes_read: int = 0
    peak_memory_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "result": self.result,
            "problem": self.problem,
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

    @property
    def failed(self) -> tuple[EntryReport, ...]:
        return tuple(entry for entry in self.entries if entry.result == "failed")

    @property
    def ok(self) -> bool:
        return not self.failed and self.index_problem is None

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


def plan(
    recipe: PathLike,
    output: PathLike,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    backend: str = "auto",
    device: str = "auto",
    sync: bool = True,
) -> ReleasePlan:
    """What `release` would do with the same arguments; reads headers and small files, writes nothing.

    Raises RequestError for a bad recipe, or naming every merge that cannot be done (MachineError where the machine or
    the network is to blame for all of them).
    """
    how = {"threads": threads, "backend": backend, "device": device, "sync": sync}
    return _plan(load(recipe), output, how, overwrite=overwrite)


def release(
    recipe: PathLike,
    output: PathLike,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    backend: str = "auto",
    device: str = "auto",
    sync: bool = True,
    progress: Progress | None = None,
    watch: Callable[[EntryReport], None] | None = None,
) -> ReleaseReport:
    """Build the tree of a recipe: `output/<group>/<name>` for each merge, and an index over them.

    Args:
        recipe: a YAML file; see `hsa.recipe` and the README.
        output: the directory of the tree, new or of an earlier run. What the recipe does not name is left alone.
        overwrite: build entries anew that differ from the recipe or are damaged; without it they are failures.
        threads, backend, device, sync: as for `hsa.merge`, for every entry.
        progress: called now and then with an entry's path, bytes done and bytes in all.
        watch: called with what became of each entry.

    Returns the report; entries that failed are in it and stop nothing else. Raises RequestError, SourceError or
    MachineError before anything is written: for a bad recipe, merges that cannot be done, a disk too small.
    """
    started = time.perf_counter()
    planned = plan(recipe, output, overwrite=overwrite, threads=threads, backend=backend, device=device, sync=sync)
    if planned.short:
        raise MachineError(f"{planned.short[0]}; nothing was written: free some space, or choose another tree")
    reports, rows = [], []
    for each in planned.entries:
        report, row = _do(each, progress, overwrite=overwrite)
        reports.append(report)
        rows.append(row)
        if watch is not None:
            watch(report)
    written, problem = _write_index(planned, rows, sync=sync)
    seconds = time.perf_counter() - started
    return ReleaseReport(planned.tree, tuple(reports), seconds, written, problem, planned.notes)


# Planning ------------------------------------------------------------------------------------------------------------


def _plan(recipe: Recipe, output: PathLike, how: Mapping[str, Any], *, overwrite: bool) -> ReleasePlan:
    tree = check_tree(output, ())
    tree_index.check_place(tree)
    found: list[PlannedEntry] = []
    problems: list[tuple[Entry, HsaError]] = []
    for entry in recipe.entries:
        try:
            found.append(_plan_entry(entry, entry.request(tree, **how), overwrite=overwrite))
        except HsaError as error:
            problems.append((entry, error))
    if problems:
        raise _cannot(recipe, problems)
    _check_apart(recipe, found)
    return ReleasePlan(recipe, tree, tuple(found), tuple(_short(found)), tuple(_strangers(recipe, tree)))


def _plan_entry(entry: Entry, request: Request, *, overwrite: bool) -> PlannedEntry:
    looked = api.dry_run(replace(request, overwrite=True))  # whatever stands there, look at the rest
    with ExitStack() as stack:
        sources = open_sources(request, fsio.Tally(), Hub(), stack, headers_only=True)
        check_tree(Path(request.output).parents[1], [source.path for source in sources])
        records = {source.role: provenance.source_record(source, "") for source in sources}
    destination = looked.output
    if not (destination / PROVENANCE).is_file():
        return PlannedEntry(entry, request, "build", "missing", "", looked)
    replaced = sum(path.lstat().st_size for path in destination.iterdir())
    standing, why = _standing(destination, request, records)
    if standing == "complete":
        return PlannedEntry(entry, request, "verify", standing, "", looked, replaced)
    return PlannedEntry(entry, request, "rebuild" if overwrite else "refuse", standing, why, looked, replaced)


def _standing(destination: Path, request: Request, sources: Mapping[Role, SourceRecord]) -> tuple[Standing, str]:
    """How an output stands by its own record, and what is otherwise."""
    try:
        found = provenance.load(destination)
    except HsaError as error:
        return "damaged", str(error)
    expected = {**request.config.as_dict(), **request.settings("")}
    unlike = [*_other_parameters(expected, found.record.parameters), *_other_sources(sources, found.record.sources)]
    if not unlike:
        return "complete", ""
    more = f", and {len(unlike) - NAMED} more" if len(unlike) > NAMED else ""
    return "other", f"it was made otherwise than the recipe says: {'; '.join(unlike[:NAMED])}{more}"


def _other_parameters(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """What shaped the output otherwise; the backend does not, for all write the same bytes."""
    for key in sorted({*expected, *found} - {"backend", "card"}):
        if expected.get(key) != found.get(key):
            yield f"{key} is {found.get(key)!r:.60}, the recipe says {expected.get(key)!r:.60}"
    fields, written = expected["card"], found.get("card")
    written = written if isinstance(written, dict) else {}
    for key in sorted({*fields, *written}):
        if fields.get(key) != written.get(key):
            yield f"card field {key} is {written.get(key)!r:.60}, the recipe says {fields.get(key)!r:.60}"


def _other_sources(expected: Mapping[Role, SourceRecord], found: Mapping[Role, SourceRecord]) -> Iterator[str]:
    """As far as headers tell."""
    for role in ROLES:
        new, old = expected[role], found[role]
        if new.identity != old.identity:
            yield f"{role} is {_name(old)}, the recipe's is {_name(new)}"
        elif (new.kind, dict(new.files)) != (old.kind, dict(old.files)):
            yield f"the weights files of {role} are not those that it was made from"


def _name(source: SourceRecord) -> str:
    identity = source.identity
    return f"{identity.id:.120}@{identity.revision:.60}" if identity.revision else f"{identity.id:.120}"


def _cannot(recipe: Recipe, problems: Sequence[tuple[Entry, HsaError]]) -> HsaError:
    """One error of all merges that cannot be done."""
    texts = [f"{entry.path} (line {entry.line}): {error}" for entry, error in problems[:NAMED]]
    more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    machine = all(isinstance(error, MachineError) for _, error in problems)
    return (MachineError if machine else RequestError)(
        f"{recipe.where}: {len(problems)} of {len(recipe.entries)} merges cannot be done, nothing was written: "
        f"{'; '.join(texts)}{more}"
    )


def _check_apart(recipe: Recipe, found: Sequence[PlannedEntry]) -> None:
    """Links in the tree may lead two entries to one place."""
    places: dict[Path, Entry] = {}
    for each in found:
        place = each.plan.output
        for other, entry in places.items():
            if place == other or place.is_relative_to(other) or other.is_relative_to(place):
                raise RequestError(
                    f"{recipe.where}:{each.entry.line}: {each.entry.path} and {entry.path} lead to {place} and {other}; "
                    f"take the links out of the tree"
                )
        places[place] = each.entry


def _short(found: Sequence[PlannedEntry]) -> Iterator[str]:
    """Disks without room for all that is to be written; an output that is replaced goes when the new one stands."""
    used: dict[int, int] = {}
    peak: dict[int, int] = {}
    place: dict[int, Path] = {}
    fetched = max((each.plan.bytes_to_fetch for each in found if each.action != "refuse"), default=0)
    if fetched:  # of merges that may share sources, the largest alone is certain
        _, device = _existing(cache_directory(), place)
        used[device] = peak[device] = fetched
    for each in found:
        if each.action in ("build", "rebuild"):
            _, device = _existing(each.plan.output, place)
            wanted = each.plan.bytes_to_write + SMALL
            peak[device] = max(peak.get(device, 0), used.get(device, 0) + wanted)
            used[device] = used.get(device, 0) + wanted - each.replaced
    for device, needed in peak.items():
        free = fsio.free_bytes(place[device])
        if free < needed:
            yield f"{needed} bytes are needed for all merges and {free} are free in {place[device]}"


def _existing(path: Path, known: dict[int, Path]) -> tuple[Path, int]:
    """The nearest directory that exists, and its device."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    device = existing.stat().st_dev
    return known.setdefault(device, existing), device


def _strangers(recipe: Recipe, tree: Path) -> Iterator[str]:
    """Outputs in the tree that the recipe does not name."""
    named = {entry.path for entry in recipe.entries}
    found = sorted(path.parent for path in tree.glob(f"*/*/{PROVENANCE}")) if tree.is_dir() else []
    others = [path.relative_to(tree).as_posix() for path in found]
    others = [path for path in others if path not in named and not path.split("/")[1].startswith(".")]
    if others:
        yield f"{len(others)} outputs in the tree are not of this recipe and left alone, such as {others[0]}"


# Doing ---------------------------------------------------------------------------------------------------------------


def _do(planned: PlannedEntry, progress: Progress | None, *, overwrite: bool) -> tuple[EntryReport, Row]:
    """Build or verify one entry, and look at how it stands then."""
    path = planned.entry.path
    step = None if progress is None else lambda done, total: progress(path, done, total)
    read = peak = 0
    standing = planned.standing
    try:
        if planned.action == "refuse":
            raise RequestError(f"{planned.why}; give --overwrite to build it anew")
        if planned.action == "verify":
            from hsa.verification import verify

            seen = verify(planned.plan.output, threads=planned.request.threads, progress=step, **_to_compare(planned))
            read, peak = seen.bytes_read, seen.peak_memory_bytes
            if seen.ok:
                return EntryReport(path, "verified", None, None, read, peak), _row(planned, "complete")
            wrong = "; ".join(f"{problem.file}: {problem.what}" for problem in seen.problems[:NAMED])
            standing = "damaged"
            if not overwrite:
                raise RequestError(f"it stands and is not what the sources give: {wrong}; give --overwrite to rebuild")
        made = api.run(replace(planned.request, overwrite=planned.standing != "missing"), step)
    except (HsaError, OSError, MemoryError) as error:
        reason = "out of memory; give --threads 1, or free some" if isinstance(error, MemoryError) else str(error)
        return EntryReport(path, "failed", reason, None, read, peak), _row(planned, standing)
    report = EntryReport(path, "built", None, made, read + made.bytes_read, max(peak, made.peak_memory_bytes))
    return report, _row(planned, "complete")


def _to_compare(planned: PlannedEntry) -> dict[str, PathLike]:
    """The sources to compute the merge from again; none where all are commits of the Hub, which cannot change."""
    sources, claimed = planned.request.sources, planned.request.ids or {}
    found = provenance.load(planned.plan.output).record.sources
    fixed = all(
        find_id(sources[role]) is not None
        and not claimed.get(role)
        and len(found[role].identity.revision or "") == _COMMIT_LENGTH
        for role in ROLES
    )
    return {} if fixed else {role: sources[role] for role in ROLES}


def _row(planned: PlannedEntry, standing: Standing) -> Row:
    found: Provenance | None = None
    if standing == "complete":
        found = provenance.load(planned.plan.output)
    return Row(planned.entry, standing, found)


def _write_index(planned: ReleasePlan, rows: Sequence[Row], *, sync: bool) -> tuple[bool, str | None]:
    """Write the index, unless nothing stands in the tree at all; whether it was written, and what went wrong."""
    if all(row.found is None for row in rows) and not os.path.lexists(planned.tree / tree_index.INDEX):
        return False, None
    try:
        return tree_index.write(planned.tree, tree_index.render(planned.recipe, rows), sync=sync), None
    except (HsaError, OSError) as error:
        return False, str(error)
