"""Build the missing points of a sweep: as patches, which are published or applied, or as separate merges."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

from hsa.actions.apply import apply_to
from hsa.actions.patch import PatchSources
from hsa.engine.open_patch import expected_bytes
from hsa.engine.patch_writer import PatchSpec, write_patches
from hsa.engine.pipeline import Options
from hsa.errors import MachineError
from hsa.findings import Findings
from hsa.methods.registry import method_named
from hsa.methods.tensors import Outcome, Summary
from hsa.option_names import with_current_spelling
from hsa.outputs import sweep_index
from hsa.outputs.grid_point import GridPoint
from hsa.outputs.merge_warnings import raise_if_strict, source_findings
from hsa.outputs.patch_reader import SUFFIX, open_patch
from hsa.outputs.provenance import load as load_provenance
from hsa.outputs.recording import source_record
from hsa.outputs.sweep_index import SweepEntry, entry_of
from hsa.sweeps.resume import ExistingPoints
from hsa.sweeps.whole_points import WholeSources, merge_point
from hsa.system import fsio
from hsa.system.memory import PeakMemory
from hsa.system.staging import StagingDirectory
from hsa.system.threads import default_threads
from hsa.system.types import Progress

PASS_POINTS = 128
"""The most patches that are written in one pass over the targets; each keeps two files open."""

SPARE_FILES = 64
"""Open files that a sweep reserves for everything other than its points."""


class PointMaker:
    """Builds the missing points as patches in the staging directory, and then publishes or applies them."""

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

    def entries_of(self, points: Sequence[GridPoint]) -> dict[str, SweepEntry]:
        """The index entries of finished points, by the points' names."""
        places = {point.name: point.name if self.full else f"{point.name}{SUFFIX}" for point in points}
        return {name: self.entries[place] for name, place in places.items()}

    def _skip_existing_points(self) -> list[GridPoint]:
        """Resume an earlier run: add its complete points to the index, and return the points that must be built."""
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
        self._each(self._publish, points)

    def _each(self, work: Callable[[GridPoint], None], points: Sequence[GridPoint]) -> None:
        """Call `work` for each point, with up to `jobs` calls at a time."""
        if self.jobs > 1:
            with ThreadPoolExecutor(self.jobs) as pool:
                try:
                    list(pool.map(with_current_spelling(work), points))
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        else:
            for point in points:
                work(point)

    def _publish(self, point: GridPoint) -> None:
        """Move a patch from the staging directory into place, or apply it at its place. Add the point to the index."""
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
        """Raise MachineError if the points do not fit on the disk."""
        sources = self.patch_sources.sources
        patches = points[: self.size] if self.full else points
        needed = sum(expected_bytes(self.patch_sources.targets(point.settings)) for point in patches)
        if self.full:
            needed += len(points) * sum(ref.nbytes for ref in sources.anchor_checkpoint.tensors.values())
        self._require_space(len(points), needed)

    def _require_space(self, count: int, needed: int) -> None:
        free = fsio.free_bytes(self.directory)
        if needed > free:
            raise MachineError(
                f"{count} points need {needed} bytes and {free} are free in {self.directory}; free some space, "
                f"or choose another output"
            )


class WholePointMaker(PointMaker):
    """Builds the missing points as separate merges, for methods that have no patches."""

    def _run_pass(self, points: Sequence[GridPoint], progress: _PassProgress | None) -> None:
        sources = self.patch_sources
        assert isinstance(sources, WholeSources)
        sizes = [sources.plan(point.settings).bytes_to_write for point in points]
        done = dict.fromkeys(points, 0)
        threads = max(1, self.threads // self.jobs)

        def merge(point: GridPoint) -> None:
            def step(count: int) -> None:
                done[point] = count
                if progress is not None:
                    progress(sum(done.values()), sum(sizes))

            destination, tally = self.directory / point.name, self.existing.tally
            written = merge_point(point.settings, self.request, sources, destination, threads, tally, self.memory, step)
            digest = load_provenance(destination).digest
            with self._lock:
                self.extents[point.name] = written.record.method.summary(written.outcomes)
                self.entries[point.name] = SweepEntry.of(point, point.name, written.record, digest, {})
                self.made.add(point)
                found = _findings_of_pass([point], [written.outcomes], sources)
                self.findings = (self.findings + found + Findings(written.notes)).once

        self._each(merge, points)

    def _check_space(self, points: Sequence[GridPoint]) -> None:
        sources = self.patch_sources
        assert isinstance(sources, WholeSources)
        self._require_space(len(points), sum(sources.plan(point.settings).bytes_to_write for point in points))


def _findings_of_pass(
    points: Sequence[GridPoint], outcomes: Sequence[Sequence[Outcome]], patch_sources: PatchSources
) -> Findings:
    """The findings about the points of one pass."""
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
    """The number of files that this process may open for points, after a reserve for everything else; at least two."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(2, (1 << 20 if soft == resource.RLIM_INFINITY else soft) - SPARE_FILES)


@dataclass(frozen=True)
class _PassProgress:
    """The progress of one pass as part of the whole sweep, in bytes, as if all points had equal sizes."""

    progress: Progress
    before: int
    points: int
    every: int

    def __call__(self, done: int, total: int) -> None:
        point_bytes = total / self.points
        self.progress(int(self.before * point_bytes) + done, int(self.every * point_bytes))
