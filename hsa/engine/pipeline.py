"""Execute a plan: read, compute, digest and write, overlapped, in bounded memory.

The output is a sequence of pieces. Threads draw tasks in file order: first the targets that begin in a piece or soon
after it, then the piece itself. A piece is assembled from copied ranges and computed tensors, digested in order, and
written.

The threads cannot deadlock: a piece waits only for tasks that were drawn before it, and memory is reserved in the order
of drawing. A tensor that threads share keeps its memory until its last slice is computed, and tasks that are drawn
after it wait until then. Memory holds at most the tensors of the pieces in flight and of the next `AHEAD_BYTES`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hsa.engine.compute import Computation, Ranges
from hsa.engine.consumers import FileWriter, PieceConsumer
from hsa.engine.schedule import Schedule
from hsa.planning.file_layout import Bytes, Computed, Copy, OutputFile, Segment
from hsa.sources.checkpoint import Checkpoint
from hsa.system import fsio
from hsa.system.dtypes import Array
from hsa.system.huge_pages import allocate
from hsa.system.memory import PeakMemory
from hsa.system.publish import StagedOutput

AHEAD_BYTES = 32 << 20
"""How many bytes ahead of its position a target's computation begins, so that no thread waits while others write."""


_Key = tuple[int, int]
"""The key of a computed segment: the number of its file, and its offset there."""


class Hasher(Protocol):
    """The part of blake3's interface that this module uses."""

    def update(self, data: Any, /) -> Any: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class Options:
    """The options of a run: the number of `threads`, whole-file digests, and fsync."""

    threads: int
    digest: bool = True
    sync: bool = True


class SegmentThread(Protocol):
    """One thread's access to a calculator."""

    def compute(self, contents: Sequence[Computed]) -> list[Computation]:
        """Compute a group of targets, or one slice; their memory is already reserved.

        Raises NonFiniteError, SourceChanged, MachineError.
        """


class SegmentCalculator(Protocol):
    """Computes the segments of a plan that are not copies: `compute.Calculator` or `patch_apply.PatchApplier`.

    `group_bytes` limits the targets that a thread takes at once.
    """

    @property
    def group_bytes(self) -> int: ...

    def thread(self) -> SegmentThread: ...

    def reserve(self, contents: Sequence[Computed]) -> Callable[[], None]:
        """Wait for the memory to compute these contents, and return a function that releases it.

        Called in the order of drawing, by one thread at a time.
        """

    def give_back(self, buffer: Array) -> None:
        """Take back the memory of a computation that has been written."""


@dataclass
class _FileProgress:
    """An output file while it is assembled."""

    plan: OutputFile
    number: int
    hasher: Hasher | None
    starts: list[int]
    digested: int = 0

    def overlapping(self, start: int, stop: int) -> Iterator[Segment]:
        first = bisect_right(self.starts, start) - 1
        for segment in self.plan.segments[max(0, first) :]:
            if segment.offset >= stop:
                return
            if segment.stop > start:
                yield segment


@dataclass(frozen=True)
class _Task:
    """A task: compute segments or, if there are none, assemble and write a piece."""

    file: _FileProgress
    number: int
    start: int
    stop: int
    segments: tuple[Segment, ...] = ()


@dataclass
class _ComputedSegment:
    """A computed segment: its bytes, the ranges that differ from the anchor, and how many pieces still have to write
    it."""

    pieces_left: int
    data: Array | None = None
    changed: Ranges = ()


@dataclass(frozen=True)
class _ThreadMemory:
    """One thread's own memory."""

    thread: SegmentThread
    piece: memoryview


def execute(
    files: Sequence[OutputFile],
    sources: Mapping[str, Checkpoint],
    anchor: Checkpoint,
    calculator: SegmentCalculator,
    staging: StagedOutput,
    options: Options,
    tally: fsio.Tally,
    memory: PeakMemory,
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Write the weights files into the staging directory. Returns the digest of each file; empty if digests are off.

    `progress` is called from this thread with the bytes done so far. Raises NonFiniteError, SourceChanged,
    MachineError; KeyboardInterrupt and the like stop the threads first.
    """
    consumer = FileWriter(staging, anchor, tally, sync=options.sync)
    return assemble(files, sources, calculator, consumer, options, memory, progress)


def assemble(
    files: Sequence[OutputFile],
    sources: Mapping[str, Checkpoint],
    calculator: SegmentCalculator,
    consumer: PieceConsumer,
    options: Options,
    memory: PeakMemory,
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Pass every piece of the weights files to a consumer, which writes or compares it; see `execute`."""
    try:
        return _PipelineRun(files, sources, calculator, consumer, options, memory).run(progress)
    finally:
        consumer.close()


class _PipelineRun:
    def __init__(
        self,
        files: Sequence[OutputFile],
        sources: Mapping[str, Checkpoint],
        calculator: SegmentCalculator,
        consumer: PieceConsumer,
        options: Options,
        memory: PeakMemory,
    ) -> None:
        self.output_files, self.sources, self.consumer = files, sources, consumer
        self.options, self.memory = options, memory
        self.schedule: Schedule[_Task] = Schedule()
        self.changed = self.schedule.changed
        self.done = 0
        self.results: dict[_Key, _ComputedSegment] = {}
        self.calculator = calculator
        self.files = [self._progress_of(file, number) for number, file in enumerate(files)]
        self.piece = 0

    def run(self, progress: Callable[[int], None] | None) -> dict[str, str]:
        self.piece = self.consumer.begin(self.output_files)

        def watch() -> None:
            self.memory.sample()
            if progress is not None:
                progress(self.done)

        self.schedule.run(self._all_tasks(), self.options.threads, self._thread, watch, self._reserve)
        if progress is not None:
            progress(self.done)
        self.consumer.finish()
        return {file.plan.name: file.hasher.hexdigest() for file in self.files if file.hasher is not None}

    def _progress_of(self, file: OutputFile, number: int) -> _FileProgress:
        hasher: Hasher | None = None
        if self.options.digest:
            from blake3 import blake3

            hasher = blake3()
        return _FileProgress(file, number, hasher, [segment.offset for segment in file.segments])

    def _all_tasks(self) -> Iterator[_Task]:
        """Every task in file order; computations come before the piece in which the first of their results begins.

        Whole tensors come `AHEAD_BYTES` earlier. Slices do not: they make up most of a file that has any, and cost no
        more than its pieces.
        """
        for file in self.files:
            ahead = deque(segment for segment in file.plan.segments if isinstance(segment.content, Computed))
            for number, start in enumerate(range(0, file.plan.size, self.piece)):
                stop = min(start + self.piece, file.plan.size)
                while ahead and ahead[0].offset < stop + (AHEAD_BYTES if _is_whole(ahead[0]) else 0):
                    group = self._draw_group(ahead)
                    with self.changed:
                        for segment in group:
                            first, last = segment.offset // self.piece, (segment.stop - 1) // self.piece
                            self.results[file.number, segment.offset] = _ComputedSegment(pieces_left=last - first + 1)
                    yield _Task(file, number, start, stop, group)
                yield _Task(file, number, start, stop)

    def _draw_group(self, ahead: deque[Segment]) -> tuple[Segment, ...]:
        """Take the next segment, and the whole tensors after it that the backend computes in the same group."""
        group = [ahead.popleft()]
        total = group[0].content.nbytes
        while ahead and _is_whole(group[0]) and _is_whole(ahead[0]):
            total += ahead[0].content.nbytes
            if total > self.calculator.group_bytes:
                break
            group.append(ahead.popleft())
        return tuple(group)

    def _reserve(self, task: _Task) -> Callable[[], None]:
        return self.calculator.reserve(_contents(task)) if task.segments else lambda: None

    def _thread(self) -> Callable[[_Task], None]:
        local = _ThreadMemory(self.calculator.thread(), allocate(self.piece))
        return lambda task: self._compute(task, local) if task.segments else self._write(task, local)

    def _compute(self, task: _Task, local: _ThreadMemory) -> None:
        computed = local.thread.compute(_contents(task))
        with self.changed:
            for segment, computation in zip(task.segments, computed, strict=True):
                result = self.results[task.file.number, segment.offset]
                result.data, result.changed = computation.data, computation.changed
            self.changed.notify_all()

    def _write(self, task: _Task, local: _ThreadMemory) -> None:
        file, start, stop = task.file, task.start, task.stop
        view = local.piece[: stop - start]
        segments = list(file.overlapping(start, stop))
        used: list[tuple[Segment, _ComputedSegment]] = []
        for segment in segments:
            low, high = max(start, segment.offset), min(stop, segment.stop)
            part = view[low - start : high - start]
            content = segment.content
            if isinstance(content, Bytes):
                part[:] = memoryview(content.data)[low - segment.offset : high - segment.offset]
            elif isinstance(content, Copy):
                if file.hasher is not None or not self.consumer.has_copies(file.number):
                    self.sources[content.role].read_into(content.tensor, part, low - segment.offset)
            else:
                result = self._result(file.number, segment)
                assert result.data is not None
                part[:] = result.data.data[low - segment.offset : high - segment.offset]
                used.append((segment, result))
        if file.hasher is not None:
            with self.changed:
                self.schedule.wait(lambda: file.digested == task.number)
            file.hasher.update(view)
            with self.changed:
                file.digested += 1
                self.changed.notify_all()
        self.consumer.store(file.number, start, view, _changed(used, start, len(view)))
        with self.changed:
            for segment, result in used:
                result.pieces_left -= 1
                if result.pieces_left == 0:
                    assert result.data is not None
                    self.calculator.give_back(result.data)
                    del self.results[file.number, segment.offset]
            self.done += stop - start
            self.changed.notify_all()

    def _result(self, file: int, segment: Segment) -> _ComputedSegment:
        with self.changed:
            result = self.results[file, segment.offset]
            self.schedule.wait(lambda: result.data is not None)
            return result


def _contents(task: _Task) -> list[Computed]:
    return [segment.content for segment in task.segments if isinstance(segment.content, Computed)]


def _is_whole(segment: Segment) -> bool:
    """Whether a segment is a tensor that is computed in one go."""
    return isinstance(segment.content, Computed) and segment.content.whole


def _changed(used: Sequence[tuple[Segment, _ComputedSegment]], start: int, count: int) -> Ranges:
    """The ranges of a piece that differ from the anchor's bytes, as offsets into the piece."""
    ranges = []
    for segment, result in used:
        for first, last in result.changed:
            low = max(0, segment.offset + first - start)
            high = min(count, segment.offset + last - start)
            if low < high:
                ranges.append((low, high))
    return tuple(ranges)
