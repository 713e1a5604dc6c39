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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from hsa import fsio
from hsa.backends import Backend, Merged, NotFinite, Worker
from hsa.checkpoint import Role, Sources, TensorRef
from hsa.dtypes import Array, size
from hsa.errors import MachineError, NonFiniteError
from hsa.layout import Computed, Copied, Literal, Merge, OutputFile, Segment, Slice
from hsa.memory import PeakMemory
from hsa.output import Staging
from hsa.plan import MergePlan
from hsa.target import Target

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


@dataclass(frozen=True)
class TargetOutcome:
    """A merged target, and the BLAKE3 digest of its bytes in each source."""

    target: Target
    merged: Merged
    digests: Mapping[Role, str]


@dataclass(frozen=True)
class Outcome:
    """What a run produced: the targets in plan order, and the digest of each weights file (empty without digests)."""

    targets: tuple[TargetOutcome, ...]
    digests: Mapping[str, str]


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
    """Compute a segment, or (with no segment) assemble and write a piece."""

    file: _File
    number: int
    start: int
    stop: int
    segment: Segment | None = None


@dataclass
class _Result:
    """A computed segment: its bytes, the ranges that differ from primary, and who still has to write it."""

    pieces_left: int
    data: Array | None = None
    changed: tuple[tuple[int, int], ...] = ()


@dataclass
class _Local:
    """One thread's own memory."""

    worker: Worker
    piece: mmap.mmap
    raw: dict[str, Array] = field(default_factory=dict)

    def scratch(self, slot: str, nbytes: int) -> Array:
        held = self.raw.get(slot)
        if held is None or held.size < nbytes:
            held = self.raw[slot] = np.empty(nbytes, np.uint8)
        return held[:nbytes]


class _Stopped(Exception):
    """Another thread failed; this one has nothing to add."""


def execute(
    plan: MergePlan,
    sources: Sources,
    backend: Backend,
    staging: Staging,
    options: Options,
    tally: fsio.Tally,
    memory: PeakMemory,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Write every weights file of the plan into the staging directory.

    `progress` is called from this thread with the bytes done so far. Raises NonFiniteError, SourceChanged,
    MachineError; KeyboardInterrupt and the like stop the threads first.
    """
    run = _Run(plan, sources, backend, staging, options, tally, memory)
    try:
        return run.go(progress)
    finally:
        run.close()


class _Run:
    def __init__(
        self,
        plan: MergePlan,
        sources: Sources,
        backend: Backend,
        staging: Staging,
        options: Options,
        tally: fsio.Tally,
        memory: PeakMemory,
    ) -> None:
        self.plan, self.sources, self.backend, self.staging = plan, sources, backend, staging
        self.options, self.tally, self.memory = options, tally, memory
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.done = 0
        self.results: dict[int, _Result] = {}
        self.spare: list[Array] = []
        self.outcomes: dict[str, TargetOutcome] = {}
        self.files: list[_File] = []
        self.piece = CACHED_PIECE
        self.tasks: Iterator[_Task] = iter(())

    def go(self, progress: Callable[[int], None] | None) -> Outcome:
        for file in self.plan.files:
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
        if self.options.sync:
            for written in self.files:
                with fsio.writing(self.staging.file(written.plan.name)):
                    fsio.sync(written.fd)
        digests = {file.plan.name: file.hasher.hexdigest() for file in self.files if file.hasher is not None}
        ordered = tuple(self.outcomes[target.projection.name] for target in self.plan.targets)
        return Outcome(ordered, digests)

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
        direct = fsio.reopen_direct(path) if self.options.sync and not cloned else None
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
        source = self.sources.primary.shards[file.twin].source
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
        """Every task in file order, computations right before the piece in which their result begins."""
        for file in self.files:
            computed = iter([segment for segment in file.plan.segments if isinstance(segment.content, Computed)])
            upcoming = next(computed, None)
            for number, start in enumerate(range(0, file.plan.size, self.piece)):
                stop = min(start + self.piece, file.plan.size)
                while upcoming is not None and upcoming.offset < stop:
                    first, last = upcoming.offset // self.piece, (upcoming.stop - 1) // self.piece
                    self.results[id(upcoming)] = _Result(pieces_left=last - first + 1)
                    yield _Task(file, number, start, stop, upcoming)
                    upcoming = next(computed, None)
                yield _Task(file, number, start, stop)

    def _piece(self) -> mmap.mmap:
        try:
            return mmap.mmap(-1, self.piece)
        except OSError as error:
            raise MachineError(f"out of memory: {self.piece} bytes were needed; give a smaller --threads") from error

    def _work(self) -> None:
        try:
            local = _Local(self.backend.worker(), self._piece())
            while True:
                with self.changed:
                    if self.failure is not None:
                        return
                    task = next(self.tasks, None)
                if task is None:
                    return
                if task.segment is not None:
                    self._compute(task.segment, local)
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

    def _compute(self, segment: Segment, local: _Local) -> None:
        content = segment.content
        changed: tuple[tuple[int, int], ...] = ((0, content.nbytes),)
        if isinstance(content, Merge):
            out, changed = self._merge(content.target, local)
        else:
            assert isinstance(content, Slice)
            out = self._slice(content, local)
        with self.changed:
            result = self.results[id(segment)]
            result.data, result.changed = out, changed
            self.changed.notify_all()

    def _merge(self, target: Target, local: _Local) -> tuple[Array, tuple[tuple[int, int], ...]]:
        from blake3 import blake3

        in_place = target.load_codes is None and target.out_code == target.primary.code
        raw: dict[Role, Array] = {
            "base": local.scratch("base", target.base.nbytes),
            "secondary": local.scratch("secondary", target.secondary.nbytes),
        }
        primary = self._buffer(target.primary.nbytes) if in_place else local.scratch("primary", target.primary.nbytes)
        raw["primary"] = primary
        refs: dict[Role, TensorRef] = {
            "base": target.base,
            "primary": target.primary,
            "secondary": target.secondary,
        }
        digests: dict[Role, str] = {}
        for role, ref in refs.items():
            self.sources.of(role).read_into(ref, raw[role].data)
            digests[role] = blake3(raw[role].data).hexdigest()
        rows, columns = target.matrix
        out = primary if in_place else self._buffer(rows * columns * size(target.out_code))
        try:
            merged = local.worker.merge(target, raw["base"], primary, raw["secondary"], out)
        except NotFinite as error:
            raise self._not_finite(error, refs, target.out_code) from None
        with self.changed:
            self.outcomes[target.projection.name] = TargetOutcome(target, merged, digests)
        return out, merged.changed

    def _slice(self, piece: Slice, local: _Local) -> Array:
        start = piece.first * size(piece.primary.code)
        primary = local.scratch("primary", piece.count * size(piece.primary.code))
        self.sources.of(piece.role).read_into(piece.primary, primary.data, start)
        base = None
        if piece.base is not None:
            base = local.scratch("base", piece.count * size(piece.base.code))
            self.sources.base.read_into(piece.base, base.data, piece.first * size(piece.base.code))
        out = self._buffer(piece.nbytes)
        try:
            local.worker.slice(piece, primary, base, out)
        except NotFinite as error:
            refs: dict[Role, TensorRef] = {piece.role: piece.primary}
            if piece.base is not None:
                refs["base"] = piece.base
            raise self._not_finite(error, {"primary": piece.primary, **refs}, piece.code) from None
        return out

    def _not_finite(self, error: NotFinite, refs: Mapping[Role, TensorRef], code: str) -> NonFiniteError:
        head = "" if error.head is None else f", head {error.head}"
        scripted = self.plan.config.numerics == "reference"
        if error.role is not None:
            ref = refs[error.role]
            read = ", as the script's loader reads it (or give --load-dtype float32)" if scripted else ""
            return NonFiniteError(
                f"{self.sources.of(error.role).file_of(ref)}: tensor {ref.name}{head} holds NaN or Inf{read}; a merge "
                f"with it would be damaged, use a sound checkpoint"
            )
        ref = refs["primary"]
        wider = "--load-dtype float32" if scripted else "--dtype float32 or bfloat16"
        remedy = f"compute in a wider type ({wider})" if code == "F16" else "do the three belong together?"
        return NonFiniteError(
            f"{self.sources.primary.file_of(ref)}: tensor {ref.name}{head}: the result overflows {code}; {remedy}"
        )

    def _buffer(self, nbytes: int) -> Array:
        """An uninitialised buffer, reused where one of that size is spare."""
        with self.changed:
            for position, spare in enumerate(self.spare):
                if spare.size == nbytes:
                    return self.spare.pop(position)
        return np.empty(nbytes, np.uint8)

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
                    self.sources.of(content.role).read_into(content.tensor, part, low - segment.offset)
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
                    self.spare.append(result.data)
                    del self.spare[: -2 * self.options.threads]
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
                self._store_direct(file, start, view)
            else:
                fsio.write_all(file.fd, view, start, self.tally)
                if self.options.sync:
                    fsio.start_writeback(file.fd, start, len(view))

    def _store_direct(self, file: _File, start: int, view: memoryview) -> None:
        assert file.direct is not None
        try:
            fsio.write_all(file.direct, view, start, self.tally)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a filesystem says that wants another alignment
                raise
            fsio.write_all(file.fd, view, start, self.tally)
