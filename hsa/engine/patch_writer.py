"""From sources to patch files, many points at once: each target is read and scored once, and blended for every point.

Threads draw targets in the order of the files. Where a target's rows go is known once the heads of all targets before
it are selected, so a thread waits for those that drew before it, and for nobody else. What is in memory is the targets
under way, within the budget of a merge, and a fixed share of rows for each thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from hsa.backends.base import NotFinite
from hsa.backends.cpu import Blend, CpuBackend, CpuWorker
from hsa.engine.compute import Calculator, not_finite_error
from hsa.engine.open_patch import FinishedPatch, OpenPatch, expected_row_bytes, patch_target
from hsa.errors import RequestError
from hsa.methods.geometry import Norms
from hsa.methods.hsa import HsaSettings
from hsa.methods.selection import Selection, select
from hsa.outputs import distances
from hsa.outputs.distances import Distances
from hsa.outputs.patch_format import patch_obstacles
from hsa.planning.equal_sources import equal_pairs
from hsa.planning.outcome import MergedTarget, TargetOutcome
from hsa.planning.plan import find_targets
from hsa.planning.target import Target
from hsa.sources.roles import Role
from hsa.sources.source_set import Sources
from hsa.system import fsio
from hsa.system.digests import digest_of
from hsa.system.dtypes import BITS, Array
from hsa.system.huge_pages import allocate
from hsa.system.memory import PeakMemory
from hsa.system.staging import StagingDirectory
from hsa.system.threads import supervise

ROWS_BYTES = 12 << 20
"""Memory of a thread for merged rows that are to be written."""


@dataclass(frozen=True)
class PatchSpec:
    """One patch to make: its parameters, and the name of its file in the staging directory."""

    config: HsaSettings
    name: str


def check_patchable(config: HsaSettings, sources: Sources) -> None:
    """RequestError where a patch cannot hold the merge; see `patch_obstacles`."""
    for why in patch_obstacles(config, sources.anchor_checkpoint.kind):
        raise RequestError(f"a patch holds the rows of merged heads alone, and {why}; write a whole checkpoint")


@dataclass(frozen=True)
class _TargetJob:
    """A target, for the files in whose points it is one."""

    number: int
    targets: tuple[tuple[OpenPatch, Target], ...]

    @property
    def representative(self) -> Target:
        return self.targets[0][1]


@dataclass(frozen=True)
class _Rows:
    """The rows of a target in one file: their place, and how they come about."""

    file: OpenPatch
    target: Target
    selection: Selection
    offset: int
    nbytes: int


class _Stopped(Exception):
    """Another thread failed; this one has nothing to add."""


def write_patches(
    points: Sequence[PatchSpec],
    sources: Sources,
    settings: Mapping[str, Any],
    files: Mapping[str, str],
    staging: StagingDirectory,
    threads: int,
    tally: fsio.Tally,
    memory: PeakMemory,
    progress: Callable[[int, int], None] | None = None,
) -> list[FinishedPatch]:
    """Write a patch for every point into the staging directory, and fsync it where that one says so.

    `settings` and `files` are what a merge's provenance says beside its own parameters, and the digests of the small
    files that it would write. `progress` gets bytes done and in all. Raises as a merge does.
    """
    with ExitStack() as stack:
        run = _PatchRun(points, sources, settings, files, staging, tally, memory, stack)
        run.run(threads, progress)
        return run.finish()


class _PatchRun:
    def __init__(
        self,
        points: Sequence[PatchSpec],
        sources: Sources,
        settings: Mapping[str, Any],
        files: Mapping[str, str],
        staging: StagingDirectory,
        tally: fsio.Tally,
        memory: PeakMemory,
        stack: ExitStack,
    ) -> None:
        self.sources, self.staging, self.tally, self.memory = sources, staging, tally, memory
        self.backend = CpuBackend()
        self.calculator = Calculator(sources, self.backend, "exact")
        self.changed = threading.Condition()
        self.drawing = threading.Lock()
        self.failure: BaseException | None = None
        self.placed = 0
        self.done = 0
        self.norms: dict[str, Norms] = {}
        self.files: list[OpenPatch] = []
        targets: dict[str, list[tuple[OpenPatch, Target]]] = {}
        for point in points:
            targets_of_point = find_targets(point.config, sources)
            file = OpenPatch.create(
                point.config, point.name, targets_of_point, sources, settings, files, staging, tally
            )
            self.files.append(file)
            stack.callback(file.close)
            for target in targets_of_point:
                targets.setdefault(target.projection.name, []).append((file, target))
        ordered = sorted(targets.values(), key=lambda group: _file_order(group[0][1]))
        self.jobs = [_TargetJob(number, tuple(group)) for number, group in enumerate(ordered)]
        self.ahead = iter(self.jobs)
        self.total = sum(expected_row_bytes(file.contents) for file in self.files)

    def run(self, threads: int, progress: Callable[[int, int], None] | None) -> None:
        """Have every target blended and written. `progress` is called from this thread."""

        def watch() -> None:
            self.memory.sample()
            if progress is not None:
                progress(min(self.done, self.total), self.total)

        supervise(threads, self._work, self._fail, watch)
        if self.failure is not None:
            raise self.failure

    def finish(self) -> list[FinishedPatch]:
        """Scores, selection and header of every file, which are known now."""
        finished = []
        for file in self.files:
            outcomes = [file.outcomes[target.name] for target in file.contents.targets]
            finished.append(file.complete(outcomes, self._distances(outcomes)))
        return finished

    def _distances(self, outcomes: Sequence[TargetOutcome]) -> dict[str, Distances]:
        return distances.by_stack(
            distances.DistanceInputs(
                outcome.target.projection.stack,
                outcome.target.coefficient,
                outcome.merged.selection.selected,
                self.norms[outcome.target.projection.name],
            )
            for outcome in outcomes
        )

    def _work(self) -> None:
        try:
            worker, memory = self.backend.worker(), _RowMemory()
            while True:
                with ExitStack() as stack:
                    with (
                        self.drawing
                    ):  # room is taken in the order of drawing: who waits for another holds none it needs
                        job = next(self.ahead, None)
                        if job is None:
                            return
                        cost = sum(job.representative.ref(role).nbytes for role in self.sources.roles)
                        stack.enter_context(self.calculator.reserve(cost))
                    self._check()
                    self._merge(job, worker, memory)
        except _Stopped:
            return
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            if self.failure is None:
                self.failure = error
            self.changed.notify_all()

    def _check(self) -> None:
        if self.failure is not None:
            raise _Stopped

    def _merge(self, job: _TargetJob, worker: CpuWorker, memory: _RowMemory) -> None:
        target = job.representative
        data: dict[Role, Array] = {}
        digests: dict[Role, str] = {}
        for role in self.sources.roles:
            data[role] = self.calculator.buffer(target.ref(role).nbytes)
            self.sources.of(role).read_into(target.ref(role), data[role].data)
            digests[role] = digest_of(data[role].data)
        arrays = data["base"], data["primary"], data["secondary"]
        equal = equal_pairs(target, data)
        try:
            scored = worker.score(target, *arrays)
            self.norms[target.projection.name] = worker.norms(target, data["primary"], data["secondary"])
            merged = {
                id(file): MergedTarget(
                    select(scored.squared, each.keep),
                    (),
                    scored.primary_differs,
                    scored.secondary_differs,
                    scored.geometry,
                )
                for file, each in job.targets
            }
            rows = self._place(job, {key: result.selection for key, result in merged.items()})
            for group in _groups(rows):
                self._blend(group, arrays, worker, memory)
        except NotFinite as error:
            refs = {role: target.ref(role) for role in self.sources.roles}
            raise not_finite_error(error, refs, target.out_code, self.sources, "exact") from None
        for file, each in job.targets:
            file.outcomes[each.primary.name] = TargetOutcome(each, merged[id(file)], digests, equal)
        for array in arrays:
            self.calculator.give_back(array)

    def _place(self, job: _TargetJob, selections: Mapping[int, Selection]) -> list[_Rows]:
        """Where the rows go in every file, once all targets before this one have their place."""
        with self.changed:
            while self.placed != job.number:
                self._check()
                self.changed.wait()
            self._check()
            rows = []
            for file, target in job.targets:
                selection = selections[id(file)]
                nbytes = patch_target(target).rows_bytes(len(selection.selected))
                rows.append(_Rows(file, target, selection, file.stop, nbytes))
                file.stop += nbytes
            self.placed += 1
            self.changed.notify_all()
        return rows

    def _blend(
        self, group: Sequence[_Rows], arrays: tuple[Array, Array, Array], worker: CpuWorker, memory: _RowMemory
    ) -> None:
        """Compute the rows of one target for some files, then digest and write them."""
        outs = memory.split([rows.nbytes for rows in group])
        blends = [
            Blend(rows.selection.selected, rows.target.c1, rows.target.c2, out)
            for rows, out in zip(group, outs, strict=True)
        ]
        worker.blend(group[0].target, *arrays, blends)
        for rows, out in zip(group, outs, strict=True):
            self._check()
            rows.file.digests[rows.target.primary.name] = digest_of(out.data)
            rows.file.write(rows.offset, out.data)
            with self.changed:
                self.done += rows.nbytes


class _RowMemory:
    """A thread's memory for rows: whole pages, so that they can be written past the page cache."""

    def __init__(self) -> None:
        self._memory = allocate(ROWS_BYTES)

    def split(self, sizes: Sequence[int]) -> list[Array]:
        """Apart arrays of these sizes, each from the start of a page; those of the last call are lost."""
        import numpy as np

        starts = [0, *accumulate(-(-size // fsio.ALIGNMENT) * fsio.ALIGNMENT for size in sizes)]
        if starts[-1] > len(self._memory):
            self._memory = allocate(starts[-1])
        whole = np.frombuffer(self._memory, np.uint8)
        return [whole[start : start + size] for start, size in zip(starts, sizes, strict=False)]


def _groups(rows: Sequence[_Rows]) -> list[list[_Rows]]:
    """Rows of as many files as fit into a thread's memory at a time, at least one."""
    groups: list[list[_Rows]] = []
    filled = 0
    for each in rows:
        size = -(-each.nbytes // fsio.ALIGNMENT) * fsio.ALIGNMENT
        if not groups or filled + size > ROWS_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(each)
        filled += size
    return groups


def _file_order(target: Target) -> tuple[int, bool, int, int]:
    """As `PatchContents.in_file_order`, of targets in the order of primary's files."""
    return (-BITS[target.out_code], len(target.shape) == 1, target.primary.shard, target.primary.offset)
