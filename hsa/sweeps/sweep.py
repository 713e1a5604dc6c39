"""`hsa.sweep`: many merges of three sources from one reading of their targets, and an index of what is where.

A sweep that was killed is resumed by running it again: `hsa.sweeps.resume` says which points are there already.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hsa.actions.apply import apply_to
from hsa.actions.keywords import SWEEP, Arguments, split
from hsa.actions.patch import PatchSources, open_patch_sources
from hsa.actions.request import Request
from hsa.actions.signatures import declared_keywords
from hsa.arguments import check_flags, check_functions, check_values
from hsa.engine.open_patch import expected_bytes
from hsa.engine.patch_writer import PatchSpec, write_patches
from hsa.engine.pipeline import Options
from hsa.errors import MachineError, RequestError, one_line, shown
from hsa.findings import Findings, counted
from hsa.methods.registry import method_named
from hsa.methods.settings import check_value
from hsa.methods.tensors import Outcome, Summary
from hsa.option_names import option, with_current_spelling
from hsa.outputs import sweep_index
from hsa.outputs.grid_point import GridPoint, axes
from hsa.outputs.merge_warnings import raise_if_strict, source_findings
from hsa.outputs.patch_reader import SUFFIX, open_patch
from hsa.outputs.provenance import load as load_provenance
from hsa.outputs.recording import source_record
from hsa.outputs.report import NO_DIGESTS
from hsa.outputs.sweep_index import SweepEntry, entry_of
from hsa.sources.hub.client import Hub
from hsa.sweeps import grid
from hsa.sweeps.resume import SWEEP_STAGING, ExistingPoints, check_directory
from hsa.system import fsio
from hsa.system.memory import PeakMemory
from hsa.system.signals import deferred
from hsa.system.staging import StagingDirectory
from hsa.system.threads import default_threads
from hsa.system.types import Progress

PASS_POINTS = 128
"""Patches that are written in one pass over the targets: each keeps two files open."""

SPARE_FILES = 64
"""Open files that a sweep leaves for everything but its points."""


@dataclass(frozen=True)
class SweepReport:
    """A finished sweep. Sizes are bytes, `seconds` wall time; `made` and `skipped` are names of points, `entries` those
    of the index, which also lists points of earlier sweeps to the same directory. `extents` say how much each point
    that was made merges, `extent_range` how far they lie apart, where the
    method tells it."""

    output: Path
    seconds: float
    bytes_read: int
    bytes_read_by_source: Mapping[str, int]
    bytes_written: int
    bytes_fetched: int
    peak_memory_bytes: int
    made: tuple[str, ...]
    skipped: tuple[str, ...]
    entries: tuple[SweepEntry, ...]
    extents: Mapping[str, Summary]
    extent_range: str | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        made = f"{len(self.made)} points made, {len(self.skipped)} skipped"
        return one_line(f"<hsa.SweepReport of {self.output}: {made}{counted(self.warnings)}>")

    def as_dict(self) -> dict[str, Any]:
        """What `hsa sweep --json` prints."""
        return {
            "output": str(self.output),
            "seconds": self.seconds,
            "bytes_read": self.bytes_read,
            "bytes_read_by_source": dict(self.bytes_read_by_source),
            "bytes_written": self.bytes_written,
            "bytes_fetched": self.bytes_fetched,
            "peak_memory_bytes": self.peak_memory_bytes,
            "made": list(self.made),
            "skipped": list(self.skipped),
            "points": [entry.as_dict() for entry in self.entries],
            "extents": {name: extent.as_dict() for name, extent in self.extents.items()},
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


@declared_keywords(SWEEP)
@fsio.map_os_errors()
def sweep(
    *arguments: Any,
    full: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
    **keywords: Any,
) -> SweepReport:
    """Merge with every combination of the given parameters, reading the targets of the sources once.

    Args:
        {sources}
        output: the directory to write: a patch for every point (`hsa.apply` makes checkpoints of them), or with `full`
            a checkpoint directory for every point, and `index.json` and `index.csv`. Points that stand there already
            are verified and skipped.
        method: the name of the method.
        {settings}
        {options}
        full: write checkpoints.
        jobs: patches written in one pass, for each of which sources are read again, 128 unless told; or checkpoints
            written at a time, 1 unless told and at most as many as there are threads.
        progress: called now and then with bytes done and bytes in all.

    Raises what `hsa.merge` raises; with `strict`, no point of the pass in which there are warnings is written. Points
    that were finished before an error stay.

    Example:
        >>> report = hsa.sweep("whisper-small", "m1", "m2", "sweep", lam=[0.1, 0.3, 0.5])
    """
    given = split(SWEEP, arguments, keywords)
    points = _points(given)
    check_flags(full=full)
    check_functions(progress=progress)
    request = Request(given.sources, given.output, _widest(points), given.ids, **given.options)
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or not 1 <= jobs <= PASS_POINTS):
        raise RequestError(f"{option('jobs')} must be a whole number from 1 to {PASS_POINTS}, got {shown(jobs)}")
    started = time.perf_counter()
    memory, tally, hub = PeakMemory(), fsio.Tally(), Hub(bars=progress is not None)
    with ExitStack() as stack:
        patch_sources = open_patch_sources(
            [point.settings for point in points], request, tally, hub, stack, rows_only=not full
        )
        raise_if_strict(patch_sources.findings, strict=request.strict)
        directory = check_directory(request, patch_sources.sources)
        with deferred():
            staging = stack.enter_context(StagingDirectory(directory / SWEEP_STAGING, directory, sync=request.sync))
        existing = ExistingPoints(request, points, patch_sources, directory, tally)
        work = _Sweep(existing, staging, memory, full=full, jobs=jobs)
        work.run(progress)
        memory.sample()
    method = method_named(given.method)
    extents = {point.name: work.extents[point.name] for point in points if point in work.made}
    return SweepReport(
        output=directory,
        seconds=time.perf_counter() - started,
        bytes_read=tally.read,
        bytes_read_by_source=dict(tally.read_by),
        bytes_written=tally.written,
        bytes_fetched=sum(hub.fetched.values()),
        peak_memory_bytes=memory.peak,
        made=tuple(point.name for point in points if point in work.made),
        skipped=tuple(work.skipped),
        entries=tuple(sorted(work.entries.values(), key=lambda entry: entry.order)),
        extents=extents,
        extent_range=method.summary_range(extents),
        notes=(
            *hub.notes,
            *patch_sources.findings.notes,
            *existing.notes,
            *work.findings.notes,
            *((NO_DIGESTS,) if full and not request.digest else ()),
        ),
        warnings=(*patch_sources.findings.warnings, *work.findings.warnings),
    )


def _points(arguments: Arguments) -> tuple[GridPoint, ...]:
    """The points of the grid. RequestError unless the axes have lists of values, none of them per tensor."""
    owner = method_named(arguments.method).Settings
    values = {axis.name: arguments.settings[axis.name] for axis in axes(owner) if axis.name in arguments.settings}
    check_values(**values)
    for axis in axes(owner):
        for value in values.get(axis.name, ()):
            if isinstance(value, Mapping):
                name = option(axis.name)
                raise RequestError(f"{name} of a sweep takes numbers, not values per tensor: {shown(value)}")
            check_value(axis, value)
    others = {name: value for name, value in arguments.settings.items() if name not in values}
    return grid.points(owner, values, others)


def _widest(points: Sequence[GridPoint]) -> Any:
    """The settings of the point with the most targets: each choice of an axis holds the targets of those before it."""

    def width(point: GridPoint) -> list[int]:
        chosen = [axis for axis in axes(type(point.settings)) if axis.about.choices]
        return [axis.about.choices.index(getattr(point.settings, axis.name)) for axis in chosen]

    return max(points, key=width).settings


class _Sweep:
    """Builds the missing points: as patches in the staging directory, which are then published, or applied."""

    def __init__(
        self,
        existing: ExistingPoints,
        staging: StagingDirectory,
        memory: PeakMemory,
        *,
        full: bool,
        jobs: int | None,
    ) -> None:
        self.existing, self.staging, self.memory, self.full = existing, staging, memory, full
        self.request, self.patch_sources, self.directory = existing.request, existing.patch_sources, existing.directory
        self.threads = self.request.threads or default_threads()
        self.jobs = min(jobs or 1, self.threads) if full else 1
        self.size = (
            min(PASS_POINTS, _max_open_files() // 2) if full else min(jobs or PASS_POINTS, _max_open_files() // 2)
        )
        self.made: set[GridPoint] = set()
        self.skipped: list[str] = []
        self.findings = Findings()
        self.extents: dict[str, Summary] = {}
        self.entries: dict[str, SweepEntry] = {}
        self._lock = threading.Lock()

    def run(self, progress: Progress | None) -> None:
        points = self._skip_existing_points()
        self._check_space(points)
        for first in range(0, len(points), self.size):
            part = points[first : first + self.size]
            self._run_pass(part, None if progress is None else _PassProgress(progress, first, len(part), len(points)))
        self._write_index()

    def _skip_existing_points(self) -> list[GridPoint]:
        """Resume: list the points that an earlier run left whole, and return those that are still to be built."""
        self.entries = {entry.place: entry for entry in self.existing.other_entries(full=self.full)}
        missing = []
        for point in self.existing.points:
            entry = self.existing.checkpoint(point) if self.full else self.existing.patch(point)
            if entry is None:
                missing.append(point)
            else:
                self.entries[entry.place] = entry
                self.skipped.append(point.name)
        return missing

    def _run_pass(self, points: Sequence[GridPoint], progress: _PassProgress | None) -> None:
        sources = self.patch_sources.sources
        patches = write_patches(
            [PatchSpec(self.patch_sources.targets(point.settings), f"{point.name}{SUFFIX}") for point in points],
            sources,
            self.patch_sources.settings,
            self.patch_sources.files,
            self.staging,
            self.threads,
            self.existing.tally,
            self.memory,
            progress,
        )
        sources.check_unchanged()
        for point, patch in zip(points, patches, strict=True):
            self.extents[point.name] = method_named(point.settings.method).summary(patch.outcomes)
        self.findings = (
            self.findings + _findings_of_pass(points, [patch.outcomes for patch in patches], self.patch_sources)
        ).once
        raise_if_strict(self.findings, strict=self.request.strict)
        if self.jobs > 1:
            with ThreadPoolExecutor(self.jobs) as pool:
                try:
                    list(pool.map(with_current_spelling(self._publish), points))
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        else:
            for point in points:
                self._publish(point)

    def _publish(self, point: GridPoint) -> None:
        """Move a patch from the staging directory into place, or apply it there; add the point to the index."""
        name = f"{point.name}{SUFFIX}"
        notes: Sequence[str] = ()
        with ExitStack() as stack:
            patch = open_patch(self.staging.file(name), self.existing.tally, stack)
            entry = entry_of(point, patch)
            if self.full:
                options = Options(max(1, self.threads // self.jobs), self.request.digest, self.request.sync)
                primary, small = self.patch_sources.sources.anchor_checkpoint, self.patch_sources.small
                destination = self.directory / point.name
                _, notes = apply_to(
                    patch, primary, small, destination, options, self.existing.tally, self.memory, overwrite=True
                )
                self.staging.file(name).unlink()
                entry = replace(entry, place=point.name, blake3=load_provenance(destination).digest)
            else:
                self.staging.publish_file(name, self.directory / name)
        with self._lock:
            self.entries[entry.place] = entry
            self.made.add(point)
            self.findings += Findings(tuple(notes))

    def _write_index(self) -> None:
        sources = {source.role: source_record(source, "") for source in self.patch_sources.sources}
        architecture = self.patch_sources.sources.architecture
        for name, data in sweep_index.render(self.entries.values(), sources, architecture).items():
            path = self.directory / name
            if path.is_file() and path.read_bytes() == data:
                continue
            self.staging.write(name, data, self.existing.tally)
            self.staging.publish_file(name, path)

    def _check_space(self, points: Sequence[GridPoint]) -> None:
        """MachineError where the points cannot fit on the disk."""
        sources = self.patch_sources.sources
        patches = points[: self.size] if self.full else points
        needed = sum(expected_bytes(self.patch_sources.targets(point.settings)) for point in patches)
        if self.full:
            needed += len(points) * sum(ref.nbytes for ref in sources.anchor_checkpoint.tensors.values())
        free = fsio.free_bytes(self.directory)
        if needed > free:
            raise MachineError(
                f"{len(points)} points need {needed} bytes and {free} are free in {self.directory}; free some space, "
                f"or choose another output"
            )


def _findings_of_pass(
    points: Sequence[GridPoint], outcomes: Sequence[Sequence[Outcome]], patch_sources: PatchSources
) -> Findings:
    """What there is to say of the points of one pass."""
    findings = Findings()
    doubtful = []
    for point, point_outcomes in zip(points, outcomes, strict=True):
        method = method_named(point.settings.method)
        findings += source_findings(
            point_outcomes, patch_sources.sources, patch_sources.earlier_merges, point.settings
        ) + method.decision_findings(point_outcomes)
        result = method.result_findings(point_outcomes)
        findings += Findings(result.notes)
        if result.warnings:
            doubtful.append(f"{point.name}: {'; '.join(result.warnings)}")
    if doubtful:
        more = f" (and so do {len(doubtful) - 1} more points)" if len(doubtful) > 1 else ""
        findings += Findings(warnings=(f"{doubtful[0]}{more}",))
    return findings.once


def _max_open_files() -> int:
    """How many more files this process may open, with some to spare for everything else; at least two."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(2, (1 << 20 if soft == resource.RLIM_INFINITY else soft) - SPARE_FILES)


@dataclass(frozen=True)
class _PassProgress:
    """The progress of one pass as a part of the whole sweep's, in bytes of all points as if they were equal."""

    progress: Progress
    before: int
    points: int
    every: int

    def __call__(self, done: int, total: int) -> None:
        point_bytes = total / self.points
        self.progress(int(self.before * point_bytes) + done, int(self.every * point_bytes))
