"""Plan to bytes: read, compute, digest and write, overlapped, in bounded memory.

The output is a row of pieces. Threads draw work in file order: first the tensors that begin in a piece, then
the piece itself, which is assembled from copied ranges and computed tensors, digested in order, and written.
A piece waits only for work that was drawn before it, so the threads cannot wait on one another in a circle,
and no more than the tensors of the pieces in flight are in memory.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hsa import fsio
from hsa.checkpoint import Checkpoint, Role
from hsa.compute import Computation
from hsa.dtypes import Array
from hsa.errors import MachineError
from hsa.lanes import Lanes
from hsa.layout import Computed, Copied, Literal, Merge, OutputFile, Segment
from hsa.memory import PeakMemory
from hsa.output import Staging

DIRECT_PIECE = 4 << 20
"""Bytes of a piece that is written past the page cache."""

CACHED_PIECE = 1 << 20
"""Bytes of a piece that is written through it: small enough to be digested from a core's own cache."""


class Hasher(Protocol):
    """What this module uses of blake3."""

    def update(self, data: Any, /) -> Any: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class Options:
    """How a run goes about it: `threads` at work, whole-file digests, fsync."""

    threads: int
    digest: bool = True
    sync: bool = True


class Desk(Protocol):
    """One thread's place at a calculator."""

    def compute(self, contents: Sequence[Computed]) -> list[Computation]:
        """Compute targets as a group, or one slice. Raises NonFiniteError, SourceChanged, MachineError."""


class Calculator(Protocol):
    """What computes the segments of a plan that are no copies: `hsa.compute.Calculator`, or `hsa.graft.Grafter`.

    `group_bytes` are the targets that a desk takes in one go."""

    @property
    def group_bytes(self) -> int: ...

    def desk(self) -> Desk: ...

    def give_back(self, buffer: Array) -> None:
        """Take back the memory of a computation that was written."""


@dataclass
class _File:
    """An output file while it is written."""

    plan: OutputFile
    fd: int
    direct: int | None
    cloned: bool
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
    """Compute segments, or (with none) assemble and write a piece."""

    file: _File
    number: int
    start: int
    stop: int
    segments: tuple[Segment, ...] = ()


@dataclass
class _Result:
    """A computed segment: its bytes, the ranges that differ from primary, and who still has to write it."""

    pieces_left: int
    data: Array | None = None
    changed: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class _Local:
    """One thread's own memory."""

    desk: Desk
    piece: mmap.mmap


class _Stopped(Exception):
    """Another thread failed; this one has nothing to add."""


def execute(
    files: Sequence[OutputFile],
    sources: Mapping[Role, Checkpoint],
    calculator: Calculator,
    staging: Staging,
    options: Options,
    tally: fsio.Tally,
    memory: PeakMemory,
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Write the weights files into the staging directory. Returns the digest of each, empty without digests.

    `progress` is called from this thread with the bytes done so far. Raises NonFiniteError, SourceChanged,
    MachineError; KeyboardInterrupt and the like stop the threads first.
    """
    run = _Run(files, sources, calculator, staging, options, tally, memory)
    try:
        return run.go(progress)
    finally:
        run.close()


class _Run:
    def __init__(
        self,
        files: Sequence[OutputFile],
        sources: Mapping[Role, Checkpoint],
        calculator: Calculator,
        staging: Staging,
        options: Options,
        tally: fsio.Tally,
        memory: PeakMemory,
    ) -> None:
        self.planned, self.sources, self.staging = files, sources, staging
        self.options, self.tally, self.memory = options, tally, memory
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.done = 0
        self.results: dict[int, _Result] = {}
        self.calculator = calculator
        self.files: list[_File] = []
        self.piece = CACHED_PIECE
        self.lanes = None if options.sync else Lanes()
        self.tasks: Iterator[_Task] = iter(())

    def go(self, progress: Callable[[int], None] | None) -> dict[str, str]:
        for file in self.planned:
            self.files.append(self._create(file))
        if self.files and all(file.direct is not None for file in self.files):
            self.piece = DIRECT_PIECE
        self.tasks = self._all_tasks()
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.options.threads)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.02)
                    self.memory.sample()
                    if progress is not None:
                        progress(self.done)
        except BaseException as error:
            self._fail(error)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            if isinstance(error, RuntimeError) and not all(thread.ident is not None for thread in threads):
                raise MachineError(f"cannot start {len(threads)} threads: {error}; give a smaller --threads") from error
            raise
        if self.failure is not None:
            raise self.failure
        if progress is not None:
            progress(self.done)
        if self.options.sync:
            for written in self.files:
                with fsio.writing(self.staging.file(written.plan.name)):
                    fsio.sync(written.fd)
        return {file.plan.name: file.hasher.hexdigest() for file in self.files if file.hasher is not None}

    def close(self) -> None:
        files, self.files = self.files, []
        for file in files:
            with fsio.writing(self.staging.file(file.plan.name)):  # a network filesystem may fail only here
                os.close(file.fd)
                if file.direct is not None:
                    os.close(file.direct)

    def _create(self, file: OutputFile) -> _File:
        path = self.staging.file(file.name)
        fd, cloned = self._clone(file), True
        if fd is None:
            fd, cloned = fsio.create(path, file.size), False
        direct = None if cloned else fsio.reopen_direct(path)
        hasher: Hasher | None = None
        if self.options.digest:
            from blake3 import blake3

            hasher = blake3()
        return _File(file, fd, direct, cloned, hasher, [segment.offset for segment in file.segments])

    def _clone(self, file: OutputFile) -> int | None:
        """Start the file as a clone of primary's shard, where the filesystem shares blocks."""
        if file.twin is None:
            return None
        path = self.staging.file(file.name)
        source = self.sources["primary"].shards[file.twin].source
        fd = fsio.create(path, 0)
        with fsio.writing(path, file.size):
            try:
                if fsio.clone(source.fd, fd):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            path.unlink()
        return None

    def _all_tasks(self) -> Iterator[_Task]:
        """Every task in file order, computations right before the piece in which the first of their results begins."""
        for file in self.files:
            ahead = deque(segment for segment in file.plan.segments if isinstance(segment.content, Computed))
            for number, start in enumerate(range(0, file.plan.size, self.piece)):
                stop = min(start + self.piece, file.plan.size)
                while ahead and ahead[0].offset < stop:
                    group = self._draw_group(ahead)
                    for segment in group:
                        first, last = segment.offset // self.piece, (segment.stop - 1) // self.piece
                        self.results[id(segment)] = _Result(pieces_left=last - first + 1)
                    yield _Task(file, number, start, stop, group)
                yield _Task(file, number, start, stop)

    def _draw_group(self, ahead: deque[Segment]) -> tuple[Segment, ...]:
        """The next segment, and the targets after it that the backend takes in the same go."""
        group = [ahead.popleft()]
        total = group[0].content.nbytes
        while ahead and isinstance(group[0].content, Merge) and isinstance(ahead[0].content, Merge):
            total += ahead[0].content.nbytes
            if total > self.calculator.group_bytes:
                break
            group.append(ahead.popleft())
        return tuple(group)

    def _piece(self) -> mmap.mmap:
        try:
            return mmap.mmap(-1, self.piece)
        except OSError as error:
            raise MachineError(f"out of memory: {self.piece} bytes were needed; give a smaller --threads") from error

    def _work(self) -> None:
        try:
            local = _Local(self.calculator.desk(), self._piece())
            while True:
                with self.changed:
                    if self.failure is not None:
                        return
                    task = next(self.tasks, None)
                if task is None:
                    return
                if task.segments:
                    self._compute(task.segments, local)
                else:
                    self._write(task, local)
        except _Stopped:
            return
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            if self.failure is None:
                self.failure = error
            self.changed.notify_all()

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Wait, holding the condition, until `ready`."""
        while not ready():
            if self.failure is not None:
                raise _Stopped
            self.changed.wait()
        if self.failure is not None:
            raise _Stopped

    def _compute(self, segments: Sequence[Segment], local: _Local) -> None:
        computed = local.desk.compute([segment.content for segment in segments])  # type: ignore[misc]
        with self.changed:
            for segment, found in zip(segments, computed, strict=True):
                result = self.results[id(segment)]
                result.data, result.changed = found.data, found.changed
            self.changed.notify_all()

    def _write(self, task: _Task, local: _Local) -> None:
        file, start, stop = task.file, task.start, task.stop
        view = memoryview(local.piece)[: stop - start]
        segments = list(file.overlapping(start, stop))
        used: list[tuple[Segment, _Result]] = []
        for segment in segments:
            low, high = max(start, segment.offset), min(stop, segment.stop)
            part = view[low - start : high - start]
            content = segment.content
            if isinstance(content, Literal):
                part[:] = memoryview(content.data)[low - segment.offset : high - segment.offset]
            elif isinstance(content, Copied):
                if not file.cloned or file.hasher is not None:
                    self.sources[content.role].read_into(content.tensor, part, low - segment.offset)
            else:
                result = self._result(segment)
                assert result.data is not None
                part[:] = result.data.data[low - segment.offset : high - segment.offset]
                used.append((segment, result))
        if file.hasher is not None:
            with self.changed:
                self._wait(lambda: file.digested == task.number)
            file.hasher.update(view)
            with self.changed:
                file.digested += 1
                self.changed.notify_all()
        self._store(file, start, view, used)
        with self.changed:
            for segment, result in used:
                result.pieces_left -= 1
                if result.pieces_left == 0:
                    assert result.data is not None
                    self.calculator.give_back(result.data)
                    del self.results[id(segment)]
            self.done += stop - start
            self.changed.notify_all()

    def _result(self, segment: Segment) -> _Result:
        with self.changed:
            result = self.results[id(segment)]
            self._wait(lambda: result.data is not None)
            return result

    def _store(self, file: _File, start: int, view: memoryview, used: list[tuple[Segment, _Result]]) -> None:
        path = self.staging.file(file.plan.name)
        with fsio.writing(path, file.plan.size):
            if file.cloned:
                for segment, result in used:
                    for first, last in result.changed:
                        low = max(0, segment.offset + first - start)
                        high = min(len(view), segment.offset + last - start)
                        if low < high:
                            fsio.write_all(file.fd, view[low:high], start + low, self.tally)
            elif file.direct is not None and len(view) % fsio.ALIGNMENT == 0:
                if self.lanes is None:
                    self._store_direct(file, start, view)
                else:
                    with self.lanes.write(len(view)) as lane:
                        (self._store_direct if lane == "direct" else self._store_cached)(file, start, view)
            else:
                self._store_cached(file, start, view)

    def _store_cached(self, file: _File, start: int, view: memoryview) -> None:
        fsio.write_all(file.fd, view, start, self.tally, fsio.CACHED_STEP)
        if self.options.sync:
            fsio.start_writeback(file.fd, start, len(view))

    def _store_direct(self, file: _File, start: int, view: memoryview) -> None:
        assert file.direct is not None
        try:
            fsio.write_all(file.direct, view, start, self.tally)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a filesystem says that wants another alignment
                raise
            self._store_cached(file, start, view)
