"""`hsa.sweep`: many parameter settings of one triple from one reading of its targets, and an index of what is where."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hsa.actions.apply import apply_to
from hsa.actions.patch import OpenedSources, open_for_patches
from hsa.actions.request import Request
from hsa.architectures.base import Preset
from hsa.arguments import check_flags, check_functions, check_values
from hsa.engine.open_patch import expected_bytes
from hsa.engine.patch_writer import PatchSpec, write_patches
from hsa.engine.pipeline import Options
from hsa.errors import MachineError, RequestError, one_line, shown
from hsa.findings import Findings, counted
from hsa.methods.config import MergeConfig
from hsa.methods.grid_point import GridPoint
from hsa.option_names import option, with_current_spelling
from hsa.outputs import sweep_index
from hsa.outputs.extent import Extent
from hsa.outputs.merge_warnings import change_findings, raise_if_strict, source_findings
from hsa.outputs.patch_reader import SUFFIX, open_patch
from hsa.outputs.provenance import load
from hsa.outputs.recording import source_record
from hsa.outputs.report import NO_DIGESTS, selection_findings
from hsa.outputs.sweep_index import PRESETS, SweepEntry, entry_of
from hsa.planning.outcome import TargetOutcome
from hsa.sources.hub.client import Hub
from hsa.sources.roles import Role
from hsa.sweeps import grid
from hsa.sweeps.resume import SWEEP_STAGING, ExistingPoints, check_directory
from hsa.system import fsio
from hsa.system.memory import PeakMemory
from hsa.system.signals import deferred
from hsa.system.staging import StagingDirectory
from hsa.system.threads import default_threads
from hsa.system.types import PathLike

PASS_POINTS = 128
"""Patches that are written in one pass over the targets: each keeps two files open."""

SPARE_FILES = 64
"""Open files that a sweep leaves for everything but its points."""


@dataclass(frozen=True)
class SweepReport:
    """A finished sweep. Sizes are bytes, `seconds` wall time; `made` and `skipped` are names of points, `entries` those
    of the index, which also lists points of earlier sweeps to the same directory. `extents` say how much each point
    that was made merges."""

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
    extents: Mapping[str, Extent]
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


@fsio.map_os_errors()
def sweep(
    *,
    base: PathLike,
    primary: PathLike,
    secondary: PathLike,
    output: PathLike,
    k: Sequence[float] = (0.6,),
    lam: Sequence[float] = (0.5,),
    alpha: Sequence[float] = (0.2,),
    targets: Sequence[Preset] = ("encoder-qkv",),
    num_heads: int | None = None,
    num_layers: int | None = None,
    full: bool = False,
    jobs: int | None = None,
    threads: int | None = None,
    assets_from: Role = "primary",
    max_shard_size: str | int | None = None,
    base_id: str | None = None,
    primary_id: str | None = None,
    secondary_id: str | None = None,
    card: Mapping[str, str] | None = None,
    digest: bool = True,
    sync: bool = True,
    overwrite: bool = False,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SweepReport:
    """Merge with every combination of the given parameters, reading the targets of the three sources once.

    Args:
        output: the directory to write: a patch for every point (`hsa.apply` makes checkpoints of them), or with `full`
            a checkpoint directory for every point, and `index.json` and `index.csv`. Points that stand there already
            are verified and skipped.
        k, lam, alpha, targets: the values of the grid; see `hsa.merge`.
        jobs: patches written in one pass, for each of which sources are read again, 128 unless told; or checkpoints
            written at a time, 1 unless told and at most as many as there are threads.
        digest: for checkpoints, record digests of whole files.
        overwrite: make points anew that stand there and were made otherwise.
        strict: make warnings errors; no point of the pass in which there are any is written then.
        The others are those of `hsa.merge`.

    Raises what `hsa.merge` raises. Points that were finished before an error stay.
    """
    _check_grid(targets=targets, k=k, lam=lam, alpha=alpha)
    check_flags(full=full)
    check_functions(progress=progress)
    points = grid.points(targets, k, lam, alpha)
    configs = {point: point.config(num_heads, num_layers) for point in points}
    widest = max((point.targets for point in points), key=PRESETS.index)
    request = Request(
        sources={"base": base, "primary": primary, "secondary": secondary},
        output=output,
        config=MergeConfig(targets=widest, num_heads=num_heads, num_layers=num_layers),
        threads=threads,
        assets_from=assets_from,
        max_shard_size=max_shard_size,
        ids={"base": base_id, "primary": primary_id, "secondary": secondary_id},
        card=card,
        digest=digest,
        sync=sync,
        overwrite=overwrite,
        strict=strict,
    )
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or not 1 <= jobs <= PASS_POINTS):
        raise RequestError(f"{option('jobs')} must be a whole number from 1 to {PASS_POINTS}, got {shown(jobs)}")
    started = time.perf_counter()
    memory, tally, hub = PeakMemory(), fsio.Tally(), Hub(bars=progress is not None)
    with ExitStack() as stack:
        opened = open_for_patches(list(configs.values()), request, tally, hub, stack, rows_only=not full)
        raise_if_strict(opened.found, strict=strict)
        directory = check_directory(request, opened.sources)
        with deferred():
            staging = stack.enter_context(StagingDirectory(directory / SWEEP_STAGING, directory, sync=sync))
        existing = ExistingPoints(request, configs, opened, directory, tally)
        run = _Sweep(existing, staging, memory, full=full, jobs=jobs)
        run.go(progress)
        memory.sample()
    return SweepReport(
        output=directory,
        seconds=time.perf_counter() - started,
        bytes_read=tally.read,
        bytes_read_by_source=dict(tally.read_by),
        bytes_written=tally.written,
        bytes_fetched=sum(hub.fetched.values()),
        peak_memory_bytes=memory.peak,
        made=tuple(point.name for point in points if point in run.made),
        skipped=tuple(run.skipped),
        entries=tuple(sorted(run.entries.values(), key=lambda entry: entry.order)),
        extents={point.name: run.extents[point.name] for point in points if point in run.made},
        notes=(
            *hub.notes,
            *opened.found.notes,
            *existing.notes,
            *run.found.notes,
            *((NO_DIGESTS,) if full and not digest else ()),
        ),
        warnings=(*opened.found.warnings, *run.found.warnings),
    )


def _check_grid(**values: Sequence[Any]) -> None:
    """RequestError unless these are lists of values that `hsa.merge` takes, none of them per tensor."""
    check_values(**values)
    for name, each in values.items():
        for value in each:
            if isinstance(value, Mapping):
                raise RequestError(f"{option(name)} of a sweep takes numbers, not values per tensor: {shown(value)}")
            MergeConfig(**{name: value})


class _Sweep:
    """The work of a sweep. Points in the staging directory are patches; they are published, or applied and removed."""

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
        self.request, self.opened, self.directory = existing.request, existing.opened, existing.directory
        self.threads = self.request.threads or default_threads()
        self.jobs = min(jobs or 1, self.threads) if full else 1
        self.size = min(PASS_POINTS, _open_files() // 2) if full else min(jobs or PASS_POINTS, _open_files() // 2)
        self.made: set[GridPoint] = set()
        self.skipped: list[str] = []
        self.found = Findings()
        self.extents: dict[str, Extent] = {}
        self.entries: dict[str, SweepEntry] = {}
        self._listing = threading.Lock()

    def go(self, progress: Callable[[int, int], None] | None) -> None:
        self.entries = {entry.place: entry for entry in self.existing.others(full=self.full)}
        ahead = []
        for point in self.existing.configs:
            entry = self.existing.checkpoint(point) if self.full else self.existing.patch(point)
            if entry is None:
                ahead.append(point)
            else:
                self.entries[entry.place] = entry
                self.skipped.append(point.name)
        self._check_space(ahead)
        for first in range(0, len(ahead), self.size):
            part = ahead[first : first + self.size]
            self._pass(part, None if progress is None else _Share(progress, first, len(part), len(ahead)))
        self._write_index()

    def _pass(self, points: Sequence[GridPoint], progress: _Share | None) -> None:
        sources = self.opened.sources
        made = write_patches(
            [PatchSpec(self.existing.configs[point], f"{point.name}{SUFFIX}") for point in points],
            sources,
            self.opened.settings,
            self.opened.files,
            self.staging,
            self.threads,
            self.existing.tally,
            self.memory,
            progress,
        )
        sources.check_unchanged()
        self.extents |= {point.name: Extent.of(found.outcomes) for point, found in zip(points, made, strict=True)}
        self.found = (self.found + _told(points, [found.outcomes for found in made], self.opened)).once
        raise_if_strict(self.found, strict=self.request.strict)
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
        """Put the point of a patch in the staging directory where it belongs, and list it."""
        file = f"{point.name}{SUFFIX}"
        left: Sequence[str] = ()
        with ExitStack() as stack:
            patch = open_patch(self.staging.file(file), self.existing.tally, stack)
            entry = entry_of(point, patch)
            if self.full:
                options = Options(max(1, self.threads // self.jobs), self.request.digest, self.request.sync)
                primary, small = self.opened.sources.primary, self.opened.small
                destination = self.directory / point.name
                _, left = apply_to(
                    patch, primary, small, destination, options, self.existing.tally, self.memory, overwrite=True
                )
                self.staging.file(file).unlink()
                entry = replace(entry, place=point.name, blake3=load(destination).digest)
            else:
                self.staging.publish_file(file, self.directory / file)
        with self._listing:
            self.entries[entry.place] = entry
            self.made.add(point)
            self.found += Findings(tuple(left))

    def _write_index(self) -> None:
        sources = {source.role: source_record(source, "") for source in self.opened.sources}
        for name, data in sweep_index.render(self.entries.values(), sources).items():
            place = self.directory / name
            if place.is_file() and place.read_bytes() == data:
                continue
            self.staging.write(name, data, self.existing.tally)
            self.staging.publish_file(name, place)

    def _check_space(self, points: Sequence[GridPoint]) -> None:
        """MachineError where the points cannot fit on the disk."""
        sources, configs = self.opened.sources, self.existing.configs
        patches = points[: self.size] if self.full else points
        needed = sum(expected_bytes(configs[point], sources) for point in patches)
        if self.full:
            needed += len(points) * sum(ref.nbytes for ref in sources.primary.tensors.values())
        free = fsio.free_bytes(self.directory)
        if needed > free:
            raise MachineError(
                f"{len(points)} points need {needed} bytes and {free} are free in {self.directory}; free some space, "
                f"or choose another output"
            )


def _told(points: Sequence[GridPoint], outcomes: Sequence[Sequence[TargetOutcome]], opened: OpenedSources) -> Findings:
    """What there is to say of the points of one pass."""
    found = Findings()
    still = []
    for point, merged in zip(points, outcomes, strict=True):
        found += source_findings(merged, opened.sources, opened.earlier_merges, point.targets) + selection_findings(
            merged
        )
        if (change := change_findings(merged)).warnings:
            still.append(f"{point.name}: {change.warnings[0]}")
    if still:
        more = f" (and so do {len(still) - 1} more points)" if len(still) > 1 else ""
        found += Findings(warnings=(f"{still[0]}{more}",))
    return found.once


def _open_files() -> int:
    """How many more files this process may open, with some to spare for everything else; at least two."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(2, (1 << 20 if soft == resource.RLIM_INFINITY else soft) - SPARE_FILES)


@dataclass(frozen=True)
class _Share:
    """The progress of one pass as a part of the whole sweep's, in bytes of all points as if they were equal."""

    progress: Callable[[int, int], None]
    before: int
    points: int
    every: int

    def __call__(self, done: int, total: int) -> None:
        each = total / self.points
        self.progress(int(self.before * each) + done, int(self.every * each))
