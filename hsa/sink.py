"""Where the pieces of an output go: into files, past the page cache or through it, or onto a clone of primary's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hsa import fsio
from hsa.checkpoint import Checkpoint
from hsa.lanes import Lanes
from hsa.layout import OutputFile
from hsa.output import Staging
from hsa.ranges import Range

DIRECT_PIECE = 4 << 20
"""Bytes of a piece that is written past the page cache."""

CACHED_PIECE = 1 << 20
"""Bytes of a piece that is written through it: small enough to be digested from a core's own cache."""


class Sink(Protocol):
    """Takes the pieces of every file of a plan, from several threads; files go by their number in the plan."""

    def begin(self, files: Sequence[OutputFile]) -> int:
        """Be ready for these files; returns the bytes of a piece."""
        ...

    def holds_copies(self, number: int) -> bool:
        """Whether ranges copied from primary stand in the file already, so that they need not be assembled."""
        ...

    def store(self, number: int, start: int, view: memoryview, changed: Sequence[Range]) -> None:
        """Take a piece of a file, from byte `start` on. `changed` are its ranges that differ from primary's bytes."""
        ...

    def finish(self) -> None:
        """After the last piece: make them lasting."""
        ...

    def close(self) -> None:
        """Let go of the files, whatever happened."""
        ...


@dataclass(frozen=True)
class _File:
    """An output file while it is written."""

    plan: OutputFile
    fd: int
    direct: int | None
    cloned: bool


class FileSink:
    """Writes into a staging directory. A file with primary's own layout starts as a clone where blocks can be shared.

    Raises MachineError.
    """

    def __init__(self, staging: Staging, primary: Checkpoint, tally: fsio.Tally, *, sync: bool) -> None:
        self._staging, self._primary, self._tally, self._sync = staging, primary, tally, sync
        self._files: list[_File] = []
        self._lanes = None if sync else Lanes()

    def begin(self, files: Sequence[OutputFile]) -> int:
        for file in files:
            self._files.append(self._create(file))
        direct = bool(self._files) and all(file.direct is not None for file in self._files)
        return DIRECT_PIECE if direct else CACHED_PIECE

    def holds_copies(self, number: int) -> bool:
        return self._files[number].cloned

    def finish(self) -> None:
        for written in self._files if self._sync else ():
            with fsio.writing(self._staging.file(written.plan.name)):
                fsio.sync(written.fd)

    def close(self) -> None:
        files, self._files = self._files, []
        for file in files:
            with fsio.writing(self._staging.file(file.plan.name)):  # a network filesystem may fail only here
                os.close(file.fd)
                if file.direct is not None:
                    os.close(file.direct)

    def _create(self, file: OutputFile) -> _File:
        path = self._staging.file(file.name)
        fd, cloned = self._clone(file), True
        if fd is None:
            fd, cloned = fsio.create(path, file.size), False
        direct = None if cloned else fsio.reopen_direct(path)
        return _File(file, fd, direct, cloned)

    def _clone(self, file: OutputFile) -> int | None:
        """Start the file as a clone of primary's shard, where the filesystem shares blocks."""
        if file.twin is None:
            return None
        path = self._staging.file(file.name)
        source = self._primary.shards[file.twin].source
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

    def store(self, number: int, start: int, view: memoryview, changed: Sequence[Range]) -> None:
        file = self._files[number]
        with fsio.writing(self._staging.file(file.plan.name), file.plan.size):
            if file.cloned:
                for low, high in changed:
                    fsio.write_all(file.fd, view[low:high], start + low, self._tally)
            elif file.direct is not None and len(view) % fsio.ALIGNMENT == 0:
                if self._lanes is None:
                    self._store_direct(file, start, view)
                else:
                    with self._lanes.write(len(view)) as lane:
                        (self._store_direct if lane == "direct" else self._store_cached)(file, start, view)
            else:
                self._store_cached(file, start, view)

    def _store_cached(self, file: _File, start: int, view: memoryview) -> None:
        fsio.write_cached(file.fd, view, start, self._tally, writeback=self._sync)

    def _store_direct(self, file: _File, start: int, view: memoryview) -> None:
        assert file.direct is not None
        if not fsio.write_direct(file.direct, view, start, self._tally):
            self._store_cached(file, start, view)
