"""`hsa.sweep`: many merges of the same sources, which are opened and planned once, and an index of what is where.

A sweep that was killed is resumed by running it again: `hsa.sweeps.resume` says which points are there already.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.actions.keywords import SWEEP, Arguments, split
from hsa.actions.patch import open_patch_sources
from hsa.actions.request import Request
from hsa.actions.signatures import declared_keywords
from hsa.arguments import check_flags, check_functions, check_values
from hsa.errors import RequestError, one_line, shown
from hsa.findings import counted
from hsa.methods.registry import method_named
from hsa.methods.settings import check_value
from hsa.methods.tensors import Summary
from hsa.option_names import option
from hsa.outputs.grid_point import GridPoint, axes
from hsa.outputs.merge_warnings import raise_if_strict
from hsa.outputs.report import NO_DIGESTS
from hsa.outputs.sweep_index import SweepEntry
from hsa.sources.hub.client import Hub
from hsa.sweeps import grid
from hsa.sweeps.points import PASS_POINTS, PointMaker, WholePointMaker
from hsa.sweeps.resume import SWEEP_STAGING, ExistingPoints, check_directory
from hsa.sweeps.whole_points import has_patches, open_whole_sources, require_full
from hsa.system import fsio
from hsa.system.memory import PeakMemory
from hsa.system.signals import deferred
from hsa.system.staging import StagingDirectory
from hsa.system.types import Progress


@dataclass(frozen=True)
class SweepReport:
    """A finished sweep. Sizes are bytes, `seconds` wall time; `made` and `skipped` are names of points, `entries` those
    of the index, which also lists points of earlier sweeps to the same directory. `extents` say how much each point
    that was made merges, `extent_range` how far they lie apart, where the method tells it."""

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
            are verified and skipped. A method that has no patches needs `full`.
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
    started, method = time.perf_counter(), method_named(given.method)
    memory, tally, hub = PeakMemory(), fsio.Tally(), Hub(bars=progress is not None)
    with ExitStack() as stack:
        candidates = [point.settings for point in points]
        patches = has_patches(method, candidates)
        if patches:
            patch_sources = open_patch_sources(candidates, request, tally, hub, stack, rows_only=not full)
        else:
            require_full(method, request.settings, full=full)
            patch_sources = open_whole_sources(candidates, request, tally, hub, stack)
        raise_if_strict(patch_sources.findings, strict=request.strict)
        directory = check_directory(request, patch_sources.sources)
        with deferred():
            staging = stack.enter_context(StagingDirectory(directory / SWEEP_STAGING, directory, sync=request.sync))
        existing = ExistingPoints(request, points, patch_sources, directory, tally)
        work = (PointMaker if patches else WholePointMaker)(existing, staging, memory, full=full, jobs=jobs)
        work.run(progress)
        memory.sample()
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
