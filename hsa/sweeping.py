"""`hsa.sweep`: many parameter settings of one triple from one reading of its targets, and an index of what is where."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa import fsio, grid, sweep_index
from hsa.applying import apply_to
from hsa.checkpoint import ROLES, Role, Sources
from hsa.config import MergeConfig, Preset
from hsa.errors import DestinationError, HsaError, MachineError, RequestError
from hsa.grid import GridPoint
from hsa.hub import Hub
from hsa.memory import PeakMemory
from hsa.output import ASIDE, PROVENANCE, check_destination
from hsa.patch_reader import digest_range, open_patch
from hsa.patches import SUFFIX, Opened, open_for_patches
from hsa.patching import Point, expected_bytes, make_patches
from hsa.pipeline import Options
from hsa.plan import find_targets
from hsa.provenance import PROGRAM, Origin, libraries, load, source_record, tensors_digest
from hsa.report import NO_DIGESTS, findings
from hsa.request import PathLike, Request
from hsa.signals import deferred
from hsa.sweep_index import Entry
from hsa.threads import default_threads
from hsa.workbench import STAGING, Workbench

PASS_POINTS = 128
"""Patches that are written in one pass over the targets: each keeps two files open."""

BENCH = f".sweep{STAGING}"
PRESETS: tuple[Preset, ...] = ("encoder-qkv", "attention-qkv", "attention-all")
"""Each holds the targets of those before it."""


@dataclass(frozen=True)
class SweepReport:
    """A finished sweep. Sizes are bytes, `seconds` wall time; `made` and `skipped` are names of points, `entries` those
    of the index, which also lists points of earlier sweeps to the same directory."""

    output: Path
    seconds: float
    bytes_read: int
    bytes_read_by_source: Mapping[str, int]
    bytes_written: int
    bytes_fetched: int
    peak_memory_bytes: int
    made: tuple[str, ...]
    skipped: tuple[str, ...]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

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
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


@fsio.explained()
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
    progress: Callable[[int, int], None] | None = None,
) -> SweepReport:
    """Merge with every combination of the given parameters, reading the targets of the three sources once.

    Args:
        output: the directory to write: a patch for every point (`hsa.apply` makes checkpoints of them), or with `full`
            a checkpoint directory for every point, and `index.json` and `index.csv`. Points that stand there already
            are verified and skipped.
        k, lam, alpha, targets: the values of the grid; see `hsa.merge`.
        jobs: patches written in one pass, or checkpoints written at a time; 128 and 1 unless told.
        digest: for checkpoints, record digests of whole files.
        overwrite: make points anew that stand there and were made otherwise.
        The others are those of `hsa.merge`.

    Raises what `hsa.merge` raises. Points that were finished before an error stay.
    """
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
    )
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or not 1 <= jobs <= PASS_POINTS):
        raise RequestError(f"jobs must be a whole number from 1 to {PASS_POINTS}, got {jobs!r}")
    started = time.perf_counter()
    memory, tally, hub = PeakMemory(), fsio.Tally(), Hub(bars=progress is not None)
    with ExitStack() as stack:
        opened = open_for_patches(list(configs.values()), request, tally, hub, stack, rows_only=not full)
        directory = _check_directory(request, opened.sources)
        with deferred():
            bench = stack.enter_context(Workbench(directory / BENCH, directory, sync=sync))
        run = _Sweep(request, configs, opened, directory, bench, tally, memory, full=full, jobs=jobs)
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
        made=tuple(point.name for point in points if point.name in run.made),
        skipped=tuple(run.skipped),
        entries=tuple(sorted(run.entries.values(), key=lambda entry: entry.order)),
        notes=(*hub.notes, *opened.notes, *run.notes, *((NO_DIGESTS,) if full and not digest else ())),
        warnings=(*opened.warnings, *run.warnings),
    )


def _check_directory(request: Request, sources: Sources) -> Path:
    """The directory of a sweep: new, empty, or an earlier sweep's. Raises DestinationError."""
    folders = [source.path for source in sources]
    directory = check_destination(request.output, folders, overwrite=False, adding=True)
    held = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    foreign = [name for name in held if name != BENCH and not _is_point(directory / name)]
    if sweep_index.JSON not in held and foreign:
        raise DestinationError(
            f"output {directory} is no earlier sweep: it holds {', '.join(foreign[:3])} and no {sweep_index.JSON}; "
            f"choose another directory"
        )
    return directory


def _is_point(path: Path) -> bool:
    """Whether a directory entry is what a sweep left that was killed before its index: a point, or one being made."""
    if path.name.startswith(tuple(f".{preset}" for preset in PRESETS)):
        return path.name.endswith((STAGING, ASIDE))
    if not path.name.startswith(PRESETS):
        return False
    return (path / PROVENANCE).is_file() or path.suffix == SUFFIX


class _Sweep:
    """The work of a sweep. Points on the workbench are patches; they are published, or applied and removed."""

    def __init__(
        self,
        request: Request,
        configs: Mapping[GridPoint, MergeConfig],
        opened: Opened,
        directory: Path,
        bench: Workbench,
        tally: fsio.Tally,
        memory: PeakMemory,
        *,
        full: bool,
        jobs: int | None,
    ) -> None:
        self.request, self.configs, self.opened, self.directory = request, configs, opened, directory
        self.bench, self.tally, self.memory, self.full = bench, tally, memory, full
        self.threads = request.threads or default_threads()
        self.jobs = jobs or (1 if full else PASS_POINTS)
        self.made: list[str] = []
        self.skipped: list[str] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.sources = {source.role: source_record(source, "") for source in opened.sources}
        listed = sweep_index.read(directory, self.sources)
        self.entries = {entry.name: entry for entry in listed if (directory / entry.place).exists()}
        self._digests: dict[Role, dict[str, str]] = {}
        self._listing = threading.Lock()

    def go(self, progress: Callable[[int, int], None] | None) -> None:
        standing = {point for point in self.configs if self._stands(point)}
        ahead = [point for point in self.configs if point not in standing or point.name not in self.entries]
        self.skipped = [point.name for point in self.configs if point in standing]
        self._check_space([point for point in ahead if point not in standing])
        size = PASS_POINTS if self.full else self.jobs
        for first in range(0, len(ahead), size):
            share = None
            if progress is not None:
                before, many = first, len(ahead)
                share = _Share(progress, before, min(size, many - before), many)
            self._pass(ahead[first : first + size], standing, share)
        self._write_index()

    def _pass(self, points: Sequence[GridPoint], standing: set[GridPoint], progress: _Share | None) -> None:
        sources = self.opened.sources
        made = make_patches(
            [Point(self.configs[point], f"{point.name}{SUFFIX}") for point in points],
            sources,
            self.opened.settings,
            self.opened.files,
            self.bench,
            self.threads,
            self.tally,
            self.memory,
            progress,
        )
        sources.check_unchanged()
        for found in made:
            for said, texts in zip((self.notes, self.warnings), findings(found.outcomes), strict=True):
                said += [text for text in texts if text not in said]
        if self.full and self.jobs > 1:
            with ThreadPoolExecutor(self.jobs) as pool:
                try:
                    list(pool.map(lambda point: self._publish(point, standing), points))
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        else:
            for point in points:
                self._publish(point, standing)

    def _publish(self, point: GridPoint, standing: set[GridPoint]) -> None:
        """Put the point of a patch on the workbench where it belongs, and list it."""
        file = f"{point.name}{SUFFIX}"
        with ExitStack() as stack:
            patch = open_patch(self.bench.file(file), self.tally, stack)
            entry = Entry.of(point, patch, point.name if self.full else file)
            if point in standing:
                self.bench.file(file).unlink()
            elif self.full:
                options = Options(max(1, self.threads // self.jobs), self.request.digest, self.request.sync)
                destination = self.directory / point.name
                primary, small = self.opened.sources.primary, self.opened.small
                apply_to(patch, primary, small, destination, options, self.tally, self.memory, overwrite=True)
                self.bench.file(file).unlink()
            else:
                self.bench.publish_file(file, self.directory / file)
        with self._listing:
            self.entries[point.name] = entry
            if point not in standing:
                self.made.append(point.name)
            if self.full:
                self._write_index()

    def _write_index(self) -> None:
        for name, data in sweep_index.render(list(self.entries.values()), self.sources).items():
            place = self.directory / name
            if place.is_file() and place.read_bytes() == data:
                continue
            self.bench.write(name, data, self.tally)
            self.bench.publish_file(name, place)

    def _stands(self, point: GridPoint) -> bool:
        """Whether a point is there, whole and as it would be made; a damaged one is made anew.

        Raises DestinationError where it was made otherwise, unless that may be overwritten.
        """
        place = self.directory / (point.name if self.full else f"{point.name}{SUFFIX}")
        if not place.exists():
            self.entries.pop(point.name, None)
            return False
        try:
            differs = self._checkpoint_differs(point, place) if self.full else self._patch_differs(point, place)
        except HsaError as error:
            self.notes.append(f"{place.name} is damaged and made anew: {error}")
            self.entries.pop(point.name, None)
            return False
        if not differs:
            return True
        if not self.request.overwrite:
            raise DestinationError(
                f"{place} stands there and was made otherwise: its {', '.join(differs)} differ; choose another output, "
                f"or give --overwrite to make it anew"
            )
        self.entries.pop(point.name, None)
        return False

    def _patch_differs(self, point: GridPoint, place: Path) -> list[str]:
        with ExitStack() as stack:
            patch = open_patch(place, self.tally, stack)
            patch.check_tensors({})
            contents = patch.contents
            found: Origin = (
                dict(contents.program),
                dict(contents.libraries),
                dict(contents.parameters),
                dict(contents.sources),
            )
            differs = self._differs(point, found)
            if contents.files != self.opened.files:
                differs.append("configs or tokenizer files")
            if not differs:
                self.entries[point.name] = Entry.of(point, patch, place.name)
            return differs

    def _checkpoint_differs(self, point: GridPoint, place: Path) -> list[str]:
        held = load(place)
        for name, digest in held.files.items():
            source = fsio.Source(place / name, "output", self.tally)
            try:
                if digest is not None and digest_range(source, 0, source.size) != digest:
                    raise DestinationError(f"{place / name} is not what was written")
            finally:
                source.close()
        record = held.record
        return self._differs(
            point, (dict(record.program), dict(record.libraries), dict(record.parameters), dict(record.sources))
        )

    def _differs(self, point: GridPoint, found: Origin) -> list[str]:
        """Which of program, libraries, parameters and sources are not those that the point would be made with."""
        parameters = {**self.configs[point].as_dict(), **self.opened.settings}
        expected: Origin = (PROGRAM, libraries(), parameters, self._sources(point))
        names = ("program", "libraries", "parameters", "sources")
        return [name for name, one, two in zip(names, found, expected, strict=True) if one != two]

    def _sources(self, point: GridPoint) -> dict[Role, Any]:
        """The records of the sources, with the digests of a point's targets; the targets are read for it once."""
        targets = find_targets(self.configs[point], self.opened.sources)
        found = {}
        for role in ROLES:
            source, known = self.opened.sources.of(role), self._digests.setdefault(role, {})
            lines = []
            for target in targets:
                ref, name = target.ref(role), target.projection.name
                if name not in known:
                    known[name] = digest_range(source.shards[ref.shard].source, ref.offset, ref.nbytes)
                lines.append((name, ref.code, ref.shape, known[name]))
            found[role] = source_record(source, tensors_digest(lines))
        return found

    def _check_space(self, points: Sequence[GridPoint]) -> None:
        """MachineError where the points cannot fit on the disk."""
        sources = self.opened.sources
        needed = sum(
            expected_bytes(self.configs[point], sources) for point in points[: PASS_POINTS if self.full else None]
        )
        if self.full:
            needed += len(points) * sum(ref.nbytes for ref in sources.primary.tensors.values())
        free = fsio.free_bytes(self.directory)
        if needed > free:
            raise MachineError(
                f"{len(points)} points need {needed} bytes and {free} are free in {self.directory}; free some space, "
                f"or choose another output"
            )


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
