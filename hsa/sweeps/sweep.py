"""`hsa.sweep`: many merges of three sources from one reading of their targets, and an index of what is where.

A sweep that was killed is resumed by running it again: `hsa.sweeps.resume` says which points are there already.
"""

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
from hsa.actions.patch import PatchSources, open_patch_sources
from hsa.actions.request import Request
from hsa.architectures.base import PRESETS, Preset
from hsa.arguments import check_flags, check_functions, check_values
from hsa.engine.open_patch import expected_bytes
from hsa.engine.patch_writer import PatchSpec, write_patches
from hsa.engine.pipeline import Options
from hsa.errors import MachineError, RequestError, one_line, shown
from hsa.findings import Findings, counted
from hsa.methods.grid_point import GridPoint
from hsa.methods.hsa import HsaSettings
from hsa.option_names import option, with_current_spelling
from hsa.outputs import sweep_index
from hsa.outputs.extent import Extent
from hsa.outputs.merge_warnings import change_findings, raise_if_strict, source_findings
from hsa.outputs.patch_reader import SUFFIX, open_patch
from hsa.outputs.provenance import load as load_provenance
from hsa.outputs.recording import source_record
from hsa.outputs.report import NO_DIGESTS, selection_findings
from hsa.outputs.sweep_index import SweepEntry, entry_of
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
        settings=HsaSettings(targets=widest, num_heads=num_heads, num_layers=num_layers),
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
        patch_sources = open_patch_sources(list(configs.values()), request, tally, hub, stack, rows_only=not full)
        raise_if_strict(patch_sources.findings, strict=strict)
        directory = check_directory(request, patch_sources.sources)
        with deferred():
            staging = stack.enter_context(StagingDirectory(directory / SWEEP_STAGING, directory, sync=sync))
        existing = ExistingPoints(request, configs, patch_sources, directory, tally)
        work = _Sweep(existing, staging, memory, full=full, jobs=jobs)
        work.run(progress)
        memory.sample()
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
        extents={point.name: work.extents[point.name] for point in points if point in work.made},
        notes=(
            *hub.notes,
            *patch_sources.findings.notes,
            *existing.notes,
            *work.findings.notes,
            *((NO_DIGESTS,) if full and not digest else ()),
        ),
        warnings=(*patch_sources.findings.warnings, *work.findings.warnings),
    )


def _check_grid(**values: Sequence[Any]) -> None:
    """RequestError unless these are lists of values that `hsa.merge` takes, none of them per tensor."""
    check_values(**values)
    for name, numbers in values.items():
        for value in numbers:
            if isinstance(value, Mapping):
                raise RequestError(f"{option(name)} of a sweep takes numbers, not values per tensor: {shown(value)}")
            HsaSettings(**{name: value})


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
        self.extents: dict[str, Extent] = {}
        self.entries: dict[str, SweepEntry] = {}
        self._lock = threading.Lock()

    def run(self, progress: Callable[[int, int], None] | None) -> None:
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
        for point in self.existing.configs:
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
            [PatchSpec(self.existing.configs[point], f"{point.name}{SUFFIX}") for point in points],
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
        self.extents |= {point.name: Extent.of(patch.outcomes) for point, patch in zip(points, patches, strict=True)}
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
        sources, configs = self.patch_sources.sources, self.existing.configs
        patches = points[: self.size] if self.full else points
        needed = sum(expected_bytes(configs[point], sources) for point in patches)
        if self.full:
            needed += len(points) * sum(ref.nbytes for ref in sources.anchor_checkpoint.tensors.values())
        free = fsio.free_bytes(self.directory)
        if needed > free:
            raise MachineError(
                f"{len(points)} points need {needed} bytes and {free} are free in {self.directory}; free some space, "
                f"or choose another output"
            )


def _findings_of_pass(
    points: Sequence[GridPoint], outcomes: Sequence[Sequence[TargetOutcome]], patch_sources: PatchSources
) -> Findings:
    """What there is to say of the points of one pass."""
    findings = Findings()
    unchanged = []
    for point, point_outcomes in zip(points, outcomes, strict=True):
        findings += source_findings(
            point_outcomes, patch_sources.sources, patch_sources.earlier_merges, point.targets
        ) + selection_findings(point_outcomes)
        if (change := change_findings(point_outcomes)).warnings:
            unchanged.append(f"{point.name}: {change.warnings[0]}")
    if unchanged:
        more = f" (and so do {len(unchanged) - 1} more points)" if len(unchanged) > 1 else ""
        findings += Findings(warnings=(f"{unchanged[0]}{more}",))
    return findings.once


def _max_open_files() -> int:
    """How many more files this process may open, with some to spare for everything else; at least two."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(2, (1 << 20 if soft == resource.RLIM_INFINITY else soft) - SPARE_FILES)


@dataclass(frozen=True)
class _PassProgress:
    """The progress of one pass as a part of the whole sweep's, in bytes of all points as if they were equal."""

    progress: Callable[[int, int], None]
    before: int
    points: int
    every: int

    def __call__(self, done: int, total: int) -> None:
        point_bytes = total / self.points
        self.progress(int(self.before * point_bytes) + done, int(self.every * point_bytes))
