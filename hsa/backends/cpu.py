"""Exact numerics in numpy, for every method: block by block, in scratch memory that stays in the cache.

numpy's float32 operations are IEEE operations one at a time: nothing is contracted to a fused multiply-add,
so the merged bytes are those of the formula as written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsa.backends.base import Merged, NotFinite, TaskBuffers, buffers_cost, changed_ranges, merge_one_by_one
from hsa.errors import HsaError, SourceError
from hsa.methods.base import BASE, Block, Method, NotFiniteSums
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorTask
from hsa.planning.file_layout import Computed
from hsa.system.dtypes import STORAGE, Array, Float32, all_finite, narrow, widen

TILE = 1 << 17
"""Elements of a block at most: a head of any Whisper size is one. Its scratch of several MiB exceeds a core's
second-level cache, but threads hand Python's lock over four times as seldom as with blocks that fit: on two cores a
merge of large-v3 tensors takes two thirds of the time."""

RUN = 1 << 18
"""Elements of neighbouring groups that are computed at a time for patches: with two threads, operations on twice the
elements of one head took two thirds of the time for each, and on the elements of twelve again as long as on one."""

MAX_VIEWS = 64
"""Views of scratch memory that are kept."""

Place = tuple[slice, slice]


@dataclass(frozen=True)
class TouchedGroups:
    """A decision whose touched groups are to be computed, and where they go: these groups' rows (columns) alone,
    uint8."""

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


class _Scratch:
    """Buffers by what they are for, each made when it is first asked for, and made anew for a larger block. The views
    of the shapes that were asked for are kept: a tensor has two or three."""

    def __init__(self) -> None:
        self._buffers: dict[object, Array] = {}
        self._views: dict[tuple[object, tuple[int, int]], Array] = {}

    def get(self, use: object, shape: tuple[int, int], dtype: Any = np.float32) -> Array:
        """Memory of a shape; the same for one use."""
        view = self._views.get((use, shape))
        return self._make(use, shape, dtype) if view is None else view

    def _make(self, use: object, shape: tuple[int, int], dtype: Any) -> Array:
        elements = shape[0] * shape[1]
        buffer = self._buffers.get(use)
        if buffer is None or buffer.size < elements:
            self._views.clear()  # which would keep the smaller buffer
            buffer = self._buffers[use] = np.empty(max(elements, TILE), dtype)
        if len(self._views) >= MAX_VIEWS:
            self._views.clear()
        view = self._views[use, shape] = buffer[:elements].reshape(shape)
        return view


class _ArrayBlock(Block):
    """A block of arrays in memory. `views` are the tensors of all sources, in their element types, as matrices;
    `shared`: several decisions use its task vectors."""

    def __init__(
        self,
        scratch: _Scratch,
        task: TensorTask,
        views: Mapping[str, Array],
        origin: int = 0,
        *,
        shared: bool = False,
    ) -> None:
        self._scratch, self.task, self._views, self._origin = scratch, task, views, origin
        self._columns = next(iter(views.values())).shape[1]
        self.group = self.first = 0
        self.shape: tuple[int, int] = (0, 0)
        self._place: Place = (slice(0), slice(0))
        self._computed: dict[object, Float32] = {}
        self._room = "room" if shared else "task vector"

    def move(self, group: int, place: Place) -> _ArrayBlock:
        """Make it the block at a place of a group; what was computed of another block is forgotten."""
        rows, columns = place
        self.group, self._place = group, place
        self.first = self._origin + rows.start * self._columns + columns.start
        self.shape = (rows.stop - rows.start, columns.stop - columns.start)
        self._computed.clear()
        return self

    def raw(self, role: str) -> Array:
        """The source's elements as they are stored."""
        part: Array = self._views[role][self._place]
        return part

    def weights(self, role: str) -> Float32:
        weights = self._computed.get(role)
        if weights is None:
            code, raw = self.task.sources[role].code, self.raw(role)
            weights = raw if code == "F32" else widen(code, raw, self._scratch.get(("weights", role), self.shape))
            self._computed[role] = weights
        return weights

    def task_vector(self, role: str) -> Float32:
        key = ("task vector", role)
        vector = self._computed.get(key)
        if vector is None:
            out = self._scratch.get(key, self.shape)
            vector = self._computed[key] = np.subtract(self.weights(role), self.weights(BASE), out=out)
        return vector

    def room(self, role: str) -> Float32:
        return self._scratch.get((self._room, role), self.shape)

    def spare(self) -> Float32:
        """The room of the first model that has one: memory for a result that is written last of all."""
        return self.room(self.models[0])

    def wide(self) -> Array:
        return self._scratch.get("wide", self.shape, np.float64)


@contextmanager
def _applying_a_record(task: TensorTask) -> Iterator[None]:
    """SourceError where a recorded decision cannot be applied: `from_dict` sees a record alone, and not the sources,
    so a record may hold a decision that does not fit them."""
    try:
        yield
    except (NotFinite, HsaError, MemoryError):
        raise
    except Exception as error:
        raise SourceError(f"the recorded decision for {task.output_name} cannot be applied: {error}") from error


class CpuWorker:
    """One thread's scratch memory and the arithmetic of a method on it."""

    def __init__(self, method: Method[Any, Any], settings: Settings, scratch: _Scratch | None = None) -> None:
        self.method, self.settings = method, settings
        self._scratch = scratch or _Scratch()

    def with_settings(self, settings: Settings) -> CpuWorker:
        """The same worker for other settings, with the same memory: one of the two at a time."""
        return CpuWorker(self.method, settings, self._scratch)

    def merge_all(self, jobs: Sequence[TaskBuffers]) -> list[Merged]:
        """Merge targets one after another."""
        return merge_one_by_one(jobs, self.merge)

    def merge(self, job: TaskBuffers) -> Merged:
        """Measure, decide and apply one tensor. Raises NotFinite."""
        decision = self.decide(job.task, self.measure(job.task, job.sources), job.sources)
        if job.recorded is None:
            return self._applied(job, decision, decision)
        with _applying_a_record(job.task):
            return self._applied(job, decision, job.recorded)

    def _applied(self, job: TaskBuffers, decision: Any, applied: Any) -> Merged:
        self.apply(job.task, applied, job.sources, job.out)
        return Merged(decision, changed_ranges(job.task, self.method.untouched(job.task.partition.groups, applied)))

    def measure(self, task: TensorTask, sources: Mapping[str, Array]) -> Any:
        """What the first pass measures of one tensor, whatever the settings. Buffers: uint8. Raises NotFinite."""
        return self._pass(task, sources, 0, None) if task.passes else None

    def decide(self, task: TensorTask, measured: Any, sources: Mapping[str, Array]) -> Any:
        """The decision for a tensor whose first pass is done; the other passes are made here."""
        decision = self.method.decide(task, measured, self.settings, None)
        for number in range(1, task.passes):
            measured = self._pass(task, sources, number, decision)
            decision = self.method.decide(task, measured, self.settings, decision)
        return decision

    @np.errstate(all="ignore")
    def apply(self, task: TensorTask, decision: Any, sources: Mapping[str, Array], out: Array) -> None:
        """Write one tensor merged by a decision. Buffers: uint8; `out` may be the anchor's. Raises NotFinite."""
        views = self._views(task, sources)
        in_place = out is sources[task.anchor]
        result = views[task.anchor] if in_place else out.view(STORAGE[task.out_code]).reshape(task.matrix)
        untouched = self.method.untouched(task.partition.groups, decision)
        check = not (task.passes or self.method.checks_sources)
        block = _ArrayBlock(self._scratch, task, views)
        for group in range(task.partition.groups):
            if group in untouched and in_place:
                continue
            for place in task.blocks(group, TILE):
                block.move(group, place)
                if group in untouched:
                    self._cast(task.stored.code, views[task.anchor][place], task.out_code, result[place], group)
                    continue
                if check:
                    _check_block(block, group)
                self._apply_block(block, decision, result[place], in_place=in_place)
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
        block = _ArrayBlock(self._scratch, task, views, shared=True)
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
        """What `look` gives of every block, by group."""
        block = _ArrayBlock(self._scratch, task, self._views(task, sources))
        return [
            [look(block.move(group, place)) for place in task.blocks(group, TILE)]
            for group in range(task.partition.groups)
        ]

    @np.errstate(all="ignore")
    def slice(self, piece: Computed, sources: Mapping[str, Array], out: Array, recorded: Any = None) -> None:
        """Compute a slice of a tensor that is not measured, or cast it. Buffers: uint8."""
        if recorded is None:
            self._slice(piece, sources, out, None)
        else:
            with _applying_a_record(piece.task):
                self._slice(piece, sources, out, recorded)

    def _slice(self, piece: Computed, sources: Mapping[str, Array], out: Array, recorded: Any) -> None:
        task = piece.task
        views = {role: raw.view(STORAGE[task.sources[role].code]).reshape(-1, 1) for role, raw in sources.items()}
        result = out.view(STORAGE[task.out_code]).reshape(-1, 1)
        decision = recorded
        if recorded is None and task.merged:
            decision = self.method.decide(task, None, self.settings, None)
        block = _ArrayBlock(self._scratch, task, views, piece.first)
        for first in range(0, piece.count, TILE):
            place = slice(first, min(first + TILE, piece.count)), slice(0, 1)
            block.move(0, place)
            if task.merged and not self.method.checks_sources:
                _check_block(block, None)
            if task.merged:
                self._apply_block(block, decision, result[place], in_place=False)
            else:
                self._copy_block(block, result[place])
            if not all_finite(task.out_code, result[place]):
                _check_block(block, None)
                raise NotFinite(None, None)

    def _apply_block(self, block: _ArrayBlock, decision: Any, out: Array, *, in_place: bool) -> None:
        """Write the merged values of a block, rounded to the output's element type; `in_place` over the anchor's."""
        code, last = block.task.out_code, self.method.writes_out_last
        if code == "F32" and (last or not in_place):
            self.method.apply(block, decision, out)
            return
        values = block.spare() if last else self._scratch.get("out", block.shape)
        self.method.apply(block, decision, values)
        self._narrow(code, values, out)

    def _pass(self, task: TensorTask, sources: Mapping[str, Array], number: int, so_far: Any) -> Any:
        """What one pass over a tensor measures."""

        def look(block: Block) -> Any:
            if number == 0 and not self.method.checks_sources:
                assert isinstance(block, _ArrayBlock)
                _check_block(block, block.group)
            return self.method.measure(block, number, so_far)

        try:
            return self.method.gather(task, self.each_block(task, sources, look))
        except NotFiniteSums as error:
            raise NotFinite(self._damaged_source(task, sources, error.group), error.group) from None

    def _damaged_source(self, task: TensorTask, sources: Mapping[str, Array], group: int) -> str | None:
        """Which source holds NaN or Inf in a group; None where the task vectors themselves overflow."""
        for role, view in self._views(task, sources).items():
            code = task.sources[role].code
            if not all(all_finite(code, np.ascontiguousarray(view[place])) for place in task.blocks(group, TILE)):
                return role
        return None

    def _views(self, task: TensorTask, sources: Mapping[str, Array]) -> dict[str, Array]:
        return {role: raw.view(STORAGE[task.sources[role].code]).reshape(task.matrix) for role, raw in sources.items()}

    def _copy_block(self, block: _ArrayBlock, out: Array) -> None:
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


def _check_block(block: _ArrayBlock, group: int | None) -> None:
    """Raise NotFinite where a source of the block holds NaN or Inf; the models are named before base."""
    for role in (*block.models, BASE):
        if role in block.task.sources and not all_finite(block.task.sources[role].code, block.raw(role)):
            raise NotFinite(role, group)


def _group_runs(selections: Sequence[Collection[int]], groups: int, most: int) -> Iterator[tuple[int, int]]:
    """First group and number of groups of runs that the same of these selections hold, at most `most` long."""
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
    """Which of the groups side by side in a part holds NaN or Inf."""
    return next(n for n, group in enumerate(np.split(part, count, axis)) if not all_finite(code, group.copy()))
