"""Exact numerics in numpy, for every method: block by block, in scratch memory that stays in the cache.

numpy's float32 operations are IEEE operations one at a time: nothing is contracted to a fused multiply-add,
so the merged bytes are those of the formula as written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsa.backends.array_block import TILE, ArrayBlock, Scratch
from hsa.backends.base import Merged, NotFinite, TaskBuffers, buffers_cost, changed_ranges, merge_one_by_one
from hsa.backends.kept_values import KeptValues
from hsa.backends.sampling import Sampler, sampler_of
from hsa.errors import HsaError, SourceError
from hsa.methods.base import BASE, Block, Method, NotFiniteSums
from hsa.methods.copied import COPIED, untouched_groups
from hsa.methods.settings import Settings
from hsa.methods.tensors import DistanceSums, TensorTask
from hsa.planning.file_layout import Computed
from hsa.system import lapack
from hsa.system.dtypes import STORAGE, Array, Float32, all_finite, narrow, widen

RUN = 1 << 18
"""Elements of neighbouring groups that are computed together for patches. With two threads, operations on the elements
of two heads took two thirds of the time per head; on those of twelve heads, as long per head as on one."""


_AS_IT_IS: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True)
class TouchedGroups:
    """A decision whose touched groups are computed, and the uint8 array for only these groups' rows (columns)."""

    decision: Any
    groups: tuple[int, ...]
    out: Array


class CpuBackend:
    """Exact numerics on the CPU."""

    name = "cpu"
    device = "cpu"
    group_bytes = 0

    def worker(self, method: Method[Any, Any], settings: Settings) -> CpuWorker:
        return CpuWorker(method, settings)

    def empty(self, nbytes: int) -> Array:
        return np.empty(nbytes, np.uint8)

    def cost(self, task: TensorTask) -> int:
        return buffers_cost(task)


@contextmanager
def _applying_a_record(task: TensorTask) -> Iterator[None]:
    """Raise SourceError if a recorded decision cannot be applied.

    `from_dict` sees only the record and not the sources, so a record may hold a decision that does not fit them.
    """
    try:
        yield
    except (NotFinite, HsaError, MemoryError):
        raise
    except Exception as error:
        raise SourceError(f"the recorded decision for {task.output_name} cannot be applied: {error}") from error


class CpuWorker:
    """One thread's scratch memory, and the arithmetic of a method on it.

    `values` caches what the method computes from sources that stay in memory; None if they do not.
    """

    def __init__(
        self,
        method: Method[Any, Any],
        settings: Settings,
        scratch: Scratch | None = None,
        values: KeptValues | None = None,
    ) -> None:
        self.method, self.settings = method, settings
        self._values = values
        self._scratch = scratch or Scratch()
        self._numerics: AbstractContextManager[None] = lapack.one_thread if "lapack" in method.libraries else _AS_IT_IS

    def with_settings(self, settings: Settings) -> CpuWorker:
        """A worker for other settings that shares this one's memory; use only one of the two at a time."""
        return CpuWorker(self.method, settings, self._scratch, self._values)

    def merge_all(self, jobs: Sequence[TaskBuffers]) -> list[Merged]:
        """Merge targets one after another."""
        return merge_one_by_one(jobs, self.merge)

    def merge(self, job: TaskBuffers) -> Merged:
        """Measure, decide and apply one tensor. Raises NotFinite."""
        measured = COPIED if job.copied else self.measure(job.task, job.sources)
        decision = self.decide(job.task, measured, job.sources)
        if job.recorded is None:
            return self._applied(job, decision, decision)
        with _applying_a_record(job.task):
            return self._applied(job, decision, self.method.applied(job.recorded, decision))

    def _applied(self, job: TaskBuffers, decision: Any, applied: Any) -> Merged:
        sampler = sampler_of(job.task)
        self.apply(job.task, applied, job.sources, job.out, sampler)
        untouched = untouched_groups(self.method, job.task.partition.groups, applied)
        return Merged(decision, changed_ranges(job.task, untouched), None if sampler is None else sampler.sums)

    def measure(self, task: TensorTask, sources: Mapping[str, Array]) -> Any:
        """Measure one tensor in the first pass, whatever the settings. Buffers: uint8. Raises NotFinite."""
        return self._pass(task, sources, 0, None) if task.passes else None

    def decide(self, task: TensorTask, measured: Any, sources: Mapping[str, Array]) -> Any:
        """The decision for a tensor after its first pass; the remaining passes are made here. COPIED if that was
        measured."""
        if measured is COPIED:
            return COPIED
        decision = self.method.decide(task, measured, self.settings, None)
        for number in range(1, task.passes):
            measured = self._pass(task, sources, number, decision)
            decision = self.method.decide(task, measured, self.settings, decision)
        return decision

    @np.errstate(all="ignore")
    def apply(
        self,
        task: TensorTask,
        decision: Any,
        sources: Mapping[str, Array],
        out: Array,
        sampler: Sampler | None = None,
    ) -> None:
        """Write one tensor merged by a decision. Buffers: uint8; `out` may be the anchor's. Raises NotFinite.

        `sampler` sums up a sample of its elements."""
        views = self._views(task, sources)
        in_place = out is sources[task.anchor]
        result = views[task.anchor] if in_place else out.view(STORAGE[task.out_code]).reshape(task.matrix)
        untouched = untouched_groups(self.method, task.partition.groups, decision)
        check = not (task.passes or self.method.checks_sources)
        block = ArrayBlock(self._scratch, task, views, values=self._values)
        for group in range(task.partition.groups):
            if group in untouched and in_place and sampler is None:
                continue
            for place in task.blocks(group, TILE):
                block.move(group, place)
                if group in untouched:
                    if sampler is not None:
                        sampler.copied(block)
                    if in_place:
                        continue
                    self._cast(task.stored.code, views[task.anchor][place], task.out_code, result[place], group)
                    continue
                if check:
                    _check_block(block, group)
                with self._numerics:
                    self._apply_block(block, decision, result[place], in_place=in_place, sampler=sampler)
                if not all_finite(task.out_code, result[place]):
                    raise NotFinite(None, group)

    @np.errstate(all="ignore")
    def touched(self, task: TensorTask, sources: Mapping[str, Array], wanted: Sequence[TouchedGroups]) -> None:
        """Compute the touched groups of one tensor for many decisions. Buffers: uint8. Raises NotFinite.

        The values are those of `apply`, bit for bit.
        """
        views = self._views(task, sources)
        rows, columns = task.matrix
        axis, width = task.partition.axis, task.group_size
        outs = []
        for each in wanted:
            span = len(each.groups) * width
            shape = (span, columns) if axis == 0 else (rows, span)
            outs.append(each.out.view(STORAGE[task.out_code]).reshape(shape))
        places = [{group: place for place, group in enumerate(each.groups)} for each in wanted]
        most = max(1, RUN // (rows * columns // task.partition.groups))
        block = ArrayBlock(self._scratch, task, views, shared=True)
        for first, count in _group_runs([place.keys() for place in places], task.partition.groups, most):
            for where in task.blocks(first, TILE if count == 1 else RUN, count):
                block.move(first, where)
                for each, out, place in zip(wanted, outs, places, strict=True):
                    if first in place:
                        shift = (place[first] - first) * width
                        part = out[_shifted(where[0], shift * (axis == 0)), _shifted(where[1], shift * (axis == 1))]
                        self._apply_block(block, each.decision, part, in_place=False)
                        if not all_finite(task.out_code, part):
                            raise NotFinite(None, first + _group_not_finite(task.out_code, part, count, axis))

    @np.errstate(all="ignore")
    def each_block(
        self, task: TensorTask, sources: Mapping[str, Array], look: Callable[[Block], Any]
    ) -> list[list[Any]]:
        """Call `look` on every block, and return its results by group."""
        block = ArrayBlock(self._scratch, task, self._views(task, sources), values=self._values)
        return [
            [look(block.move(group, place)) for place in task.blocks(group, TILE)]
            for group in range(task.partition.groups)
        ]

    @np.errstate(all="ignore")
    def each_part(
        self, piece: Computed, sources: Mapping[str, Array], look: Callable[[Block], Any], *, check: bool
    ) -> list[Any]:
        """Call `look` on every block of a slice, in order, and return its results. Buffers: uint8.

        With `check`, the sources of each block are checked first. `look` may request a task vector again after it used
        its room. Raises NotFinite.
        """
        block, given = self._part(piece, sources, shared=True), []
        for place in piece.task.part_blocks(piece.count, TILE):
            block.move(0, place)
            if check:
                _check_block(block, None)
            given.append(look(block))
        return given

    @np.errstate(all="ignore")
    def slice(
        self, piece: Computed, sources: Mapping[str, Array], out: Array, decision: Any, recorded: Any
    ) -> DistanceSums | None:
        """Compute a slice of a tensor by a decision, or cast it. Buffers: uint8.

        Returns the sums over the slice's part of the sample, or None if it has none. Raises NotFinite.
        """
        if recorded is None:
            return self._slice(piece, sources, out, decision)
        with _applying_a_record(piece.task):
            return self._slice(piece, sources, out, self.method.applied(recorded, decision))

    def _slice(self, piece: Computed, sources: Mapping[str, Array], out: Array, decision: Any) -> DistanceSums | None:
        task, sampler = piece.task, sampler_of(piece.task)
        block = self._part(piece, sources)
        result = out.view(STORAGE[task.out_code]).reshape(_part_shape(piece))
        computed = task.merged and decision is not COPIED
        for place in task.part_blocks(piece.count, TILE):
            block.move(0, place)
            if computed and not task.passes and not self.method.checks_sources:
                _check_block(block, None)
            if computed:
                self._apply_block(block, decision, result[place], in_place=False, sampler=sampler)
            else:
                self._copy_block(block, result[place])
                if sampler is not None:
                    sampler.copied(block)
            if not all_finite(task.out_code, result[place]):
                _check_block(block, None)
                raise NotFinite(None, None)
        return None if sampler is None else sampler.sums

    @np.errstate(all="ignore")
    def measure_slice(self, piece: Computed, sources: Mapping[str, Array], number: int, so_far: Any) -> list[Any]:
        """Measure the blocks of a slice in one pass, in order. Buffers: uint8. Raises NotFinite."""
        block = self._part(piece, sources)
        places = piece.task.part_blocks(piece.count, TILE)
        return [self._look(block.move(0, place), number, so_far) for place in places]

    def _part(self, piece: Computed, sources: Mapping[str, Array], *, shared: bool = False) -> ArrayBlock:
        """The block that moves over a slice."""
        task, shape = piece.task, _part_shape(piece)
        views = {role: raw.view(STORAGE[task.sources[role].code]).reshape(shape) for role, raw in sources.items()}
        return ArrayBlock(self._scratch, task, views, piece.first, shared=shared)

    def _look(self, block: ArrayBlock, number: int, so_far: Any) -> Any:
        """Measure a block in one pass. The first pass also checks the block's sources, unless the method does so."""
        if number == 0 and not self.method.checks_sources:
            _check_block(block, block.group)
        with self._numerics:
            return self.method.measure(block, number, so_far)

    def _apply_block(
        self, block: ArrayBlock, decision: Any, out: Array, *, in_place: bool, sampler: Sampler | None = None
    ) -> None:
        """Write a block's merged values, rounded to the output's element type; `in_place` overwrites the anchor's
        values."""
        code, last = block.task.out_code, self.method.writes_out_last
        if sampler is not None:
            sampler.take(block)  # before the anchor is overwritten
        direct = code == "F32" and (last or not in_place)
        values = out if direct else block.spare() if last else self._scratch.get("out", block.shape)
        self.method.apply(block, decision, values)
        if sampler is not None:
            sampler.add(values)
        if not direct:
            self._narrow(code, values, out)

    def _pass(self, task: TensorTask, sources: Mapping[str, Array], number: int, so_far: Any) -> Any:
        """Measure a tensor in one pass."""

        def look(block: Block) -> Any:
            assert isinstance(block, ArrayBlock)
            return self._look(block, number, so_far)

        try:
            return self.method.gather(task, self.each_block(task, sources, look))
        except NotFiniteSums as error:
            raise NotFinite(self._damaged_source(task, sources, error.group), error.group) from None

    def _damaged_source(self, task: TensorTask, sources: Mapping[str, Array], group: int) -> str | None:
        """The source that holds NaN or Inf in a group; None if the task vectors themselves overflow."""
        for role, view in self._views(task, sources).items():
            code = task.sources[role].code
            if not all(all_finite(code, np.ascontiguousarray(view[place])) for place in task.blocks(group, TILE)):
                return role
        return None

    def _views(self, task: TensorTask, sources: Mapping[str, Array]) -> dict[str, Array]:
        return {role: raw.view(STORAGE[task.sources[role].code]).reshape(task.matrix) for role, raw in sources.items()}

    def _copy_block(self, block: ArrayBlock, out: Array) -> None:
        """Write the anchor's values of a block, rounded to the output's element type."""
        values = self._scratch.get("out", block.shape)
        np.copyto(values, block.weights(block.task.anchor))
        self._narrow(block.task.out_code, values, out)

    def _cast(self, code: str, raw: Array, out_code: str, out: Array, group: int) -> None:
        """Copy the anchor's elements, rounded where the result has another element type. Raises NotFinite."""
        if out_code == code:
            np.copyto(out, raw)
            if not all_finite(out_code, out):
                raise NotFinite(None, group)
            return
        values = self._scratch.get("out", raw.shape)
        wide = widen(code, raw, values)
        if wide is not values:
            np.copyto(values, wide)
        self._store(out_code, values, out, group)

    def _narrow(self, code: str, values: Float32, out: Array) -> None:
        narrow(code, values, out, self._scratch.get("bits", values.shape, np.uint32))

    def _store(self, code: str, values: Float32, out: Array, group: int) -> None:
        self._narrow(code, values, out)
        if not all_finite(code, out):
            raise NotFinite(None, group)


def _part_shape(piece: Computed) -> tuple[int, int]:
    """The rows and columns of a slice; see `Layout`."""
    if not piece.task.by_rows:
        return 1, piece.count
    columns = piece.task.matrix[1]
    return (piece.count // columns if columns else 0), columns


def _check_block(block: ArrayBlock, group: int | None) -> None:
    """Raise NotFinite if a source of the block holds NaN or Inf; the models are checked before base."""
    for role in (*block.models, BASE):
        if role in block.task.sources and not all_finite(block.task.sources[role].code, block.raw(role)):
            raise NotFinite(role, group)


def _group_runs(selections: Sequence[Collection[int]], groups: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield runs of at most `most` groups that are in the same selections: the first group and the number of groups."""
    first = 0
    while first < groups:
        touched = [first in selection for selection in selections]
        stop = first + 1
        while stop < groups and stop - first < most and [stop in selection for selection in selections] == touched:
            stop += 1
        if any(touched):
            yield first, stop - first
        first = stop


def _shifted(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)


def _group_not_finite(code: str, part: Array, count: int, axis: int) -> int:
    """The number of the first of a part's adjacent groups that holds NaN or Inf."""
    return next(n for n, group in enumerate(np.split(part, count, axis)) if not all_finite(code, group.copy()))
