"""Consumers of an output's pieces: they write them with direct I/O, through the page cache, or onto a clone."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hsa.planning.file_layout import OutputFile
from hsa.sources.checkpoint import Checkpoint
from hsa.system import fsio
from hsa.system.publish import StagedOutput
from hsa.system.ranges import Range
from hsa.system.write_mode import WriteModeChooser

DIRECT_PIECE = 4 << 20
"""Bytes of a piece that is written with direct I/O, which bypasses the page cache."""

CACHED_PIECE = 1 << 20
"""Bytes of a piece that is written through the page cache: small enough to be digested from a core's own cache."""


class PieceConsumer(Protocol):
    """Takes the pieces of a plan's files from several threads; files are identified by their number in the plan."""

    def begin(self, files: Sequence[OutputFile]) -> int:
        """Prepare for these files, and return the bytes of a piece."""
        ...

    def has_copies(self, number: int) -> bool:
        """Whether a file already contains the ranges copied from the anchor, so that they need not be assembled."""
        ...

    def store(self, number: int, start: int, view: memoryview, changed: Sequence[Range]) -> None:
        """Take a piece of a file, from byte `start` on; `changed` are its ranges that differ from the anchor."""
        ...

    def finish(self) -> None:
        """Make the files durable; called after the last piece."""
        ...

    def close(self) -> None:
        """Close the files, whether the run succeeded or not."""
        ...


@dataclass
class _OpenFile:
    """An output file, open from its first piece until its last; `left` counts the bytes not stored yet."""

    plan: OutputFile
    cloned: bool
    left: int
    fd: int | None = None
    direct: int | None = None


class FileWriter:
    """Writes into a staging directory. A file with the anchor's layout starts as a clone if blocks can be shared.

    All files are created up front, so that a full disk is noticed before anything is computed. Only files that threads
    are writing to are open: pieces come in the order of the files, and a file is synced and closed after its last
    piece.

    Raises MachineError.
    """

    def __init__(self, staging: StagedOutput, anchor: Checkpoint, tally: fsio.Tally, *, sync: bool) -> None:
        self._staging, self._anchor, self._tally, self._sync = staging, anchor, tally, sync
        self._files: list[_OpenFile] = []
        self._write_modes = None if sync else WriteModeChooser()
        self._lock = threading.Lock()
        self._has_direct = False

    def begin(self, files: Sequence[OutputFile]) -> int:
        for file in files:
            self._files.append(_OpenFile(file, self._create(file), file.size))
        fresh = next((file for file in self._files if not file.cloned), None)
        if fresh is not None:
            direct = fsio.reopen_direct(self._path(fresh))
            self._has_direct = direct is not None
            if direct is not None:
                os.close(direct)
        return DIRECT_PIECE if self._has_direct and not any(file.cloned for file in self._files) else CACHED_PIECE

    def has_copies(self, number: int) -> bool:
        return self._files[number].cloned

    def finish(self) -> None:
        assert all(file.fd is None and not file.left for file in self._files), "a piece was not stored"

    def close(self) -> None:
        files, self._files = self._files, []
        for file in files:
            self._close(file)

    def store(self, number: int, start: int, view: memoryview, changed: Sequence[Range]) -> None:
        file = self._files[number]
        with fsio.map_write_errors(self._path(file), file.plan.size):
            fd = self._open(file)
            if file.cloned:
                for low, high in changed:
                    fsio.write_all(fd, view[low:high], start + low, self._tally)
            elif file.direct is not None and len(view) % fsio.ALIGNMENT == 0:
                if self._write_modes is None:
                    self._store_direct(fd, file.direct, start, view)
                else:
                    with self._write_modes.write(len(view)) as mode:
                        if mode == "direct":
                            self._store_direct(fd, file.direct, start, view)
                        else:
                            self._store_cached(fd, start, view)
            else:
                self._store_cached(fd, start, view)
            with self._lock:
                file.left -= len(view)
                whole = file.left == 0
            if whole:
                if self._sync:
                    fsio.sync(fd)
                self._close(file)

    def _path(self, file: _OpenFile) -> Path:
        return self._staging.file(file.plan.name)

    def _create(self, file: OutputFile) -> bool:
        """Create a file of its full size; return whether it is a clone of the anchor's shard, as it is if blocks can be
        shared.

        The file is closed again, because there may be more files than a process may have open.
        """
        path = self._staging.file(file.name)
        if file.clone_of is not None:
            with self._anchor.shards[file.clone_of].source.descriptor() as source:
                fd = fsio.create(path, 0)
                with fsio.map_write_errors(path, file.size):
                    try:
                        cloned = fsio.clone(source, fd)
                    finally:
                        os.close(fd)
                    if cloned:
                        return True
                    path.unlink()
        fd = fsio.create(path, file.size)
        with fsio.map_write_errors(path):
            os.close(fd)
        return False

    def _open(self, file: _OpenFile) -> int:
        with self._lock:
            if file.fd is None:
                file.fd = fsio.reopen(self._path(file))
                if self._has_direct and not file.cloned:
                    file.direct = fsio.reopen_direct(self._path(file))
            return file.fd

    def _close(self, file: _OpenFile) -> None:
        with self._lock:
            fds = [fd for fd in (file.fd, file.direct) if fd is not None]
            file.fd = file.direct = None
        with fsio.map_write_errors(self._path(file)), ExitStack() as stack:  # a network filesystem may fail only here
            for fd in fds:
                stack.callback(os.close, fd)

    def _store_cached(self, fd: int, start: int, view: memoryview) -> None:
        fsio.write_cached(fd, view, start, self._tally, writeback=self._sync)

    def _store_direct(self, fd: int, direct: int, start: int, view: memoryview) -> None:
        if not fsio.write_direct(direct, view, start, self._tally):
            self._store_cached(fd, start, view)
