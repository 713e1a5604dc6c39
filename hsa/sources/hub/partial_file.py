"""Cache ranges of a remote file: the data in a sparse file, and beside it the list of complete ranges.

The list is replaced only after its data is on disk, so it is correct however a run ends. A damaged list counts as an
empty one. The data file never has the name of a weights file, so that no program takes a file with holes for a
checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from hsa.system import fsio
from hsa.system.ranges import Range, subtract, union

SUFFIX = ".part"
REMEDY = "set HSA_CACHE or HF_HOME to a directory that can be written"
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def _map_cache_errors(path: Path, needed: int | None = None) -> AbstractContextManager[None]:
    """Map errors of writing to the cache to errors that say how to move it."""
    return fsio.map_write_errors(path, needed, REMEDY)


def save_record(path: Path, document: Mapping[str, Any]) -> None:
    """Write a small JSON file atomically, with a digest of itself; MachineError if the disk fails."""
    text = json.dumps({**document, "sha256": _digest(document)}, indent=1).encode("ascii")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")  # on another node a pid may be the same
    with _map_cache_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(text)
                file.flush()
                fsio.sync(file.fileno())
            fsio.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsio.sync_directory(path.parent)


def load_record(path: Path) -> dict[str, Any] | None:
    """Read what `save_record` wrote; None if it is missing or damaged."""
    try:
        document = json.loads(path.read_bytes())
        if isinstance(document, dict) and document.pop("sha256", None) == _digest(document):
            return document
    except (OSError, ValueError, RecursionError):
        pass
    return None


def _digest(document: Mapping[str, Any]) -> str:
    return sha256(json.dumps(document, sort_keys=True).encode("ascii")).hexdigest()


class PartialFile:
    """Ranges of a remote file of `size` bytes that `etag` identifies, kept in `folder`.

    `ranges` are the complete ones. A process holds a lock while it adds ranges. Readers need no lock, since a complete
    range is never written again. Raises MachineError if the disk fails.
    """

    def __init__(self, folder: Path, name: str, size: int, etag: str) -> None:
        self.path = folder / f"{name}{SUFFIX}"
        self.size = size
        self.ranges: tuple[Range, ...] = ()
        self._record = folder / f"{name}.ranges.json"
        self._lock = folder / f"{name}.lock"
        self._key = {"etag": etag, "size": size}
        self._uncommitted: list[Range] = []
        self._data: int | None = None
        self._load()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the exclusive lock on the file, and reload the complete ranges. Waits for other processes that add."""
        with _map_cache_errors(self._lock):
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with _map_cache_errors(self._lock):
                _wait(lock)
            self._load()
            yield
        finally:
            self._uncommitted.clear()
            data, self._data = self._data, None
            os.close(lock)
            if data is not None:
                with _map_cache_errors(self.path):
                    os.close(data)

    def missing(self, ranges: Iterable[Range]) -> tuple[Range, ...]:
        return subtract(ranges, self.ranges)

    def write(self, offset: int, data: bytes) -> None:
        """Write fetched bytes at their offset, inside `locked`. They count only after `commit`."""
        with _map_cache_errors(self.path, len(data)):
            if self._data is None:
                self._data = self._open_data()
            view, position = memoryview(data), offset
            while view:
                done = os.pwrite(self._data, view, position)
                view, position = view[done:], position + done
        self._uncommitted.append((offset, offset + len(data)))

    def commit(self) -> None:
        """Make recent writes durable, and add them to the list."""
        if self._data is None or not self._uncommitted:
            return
        with _map_cache_errors(self.path):
            fsio.sync(self._data)
        ranges = union((*self.ranges, *self._uncommitted))
        save_record(self._record, {**self._key, "ranges": ranges})
        self.ranges = ranges
        self._uncommitted.clear()

    def _open_data(self) -> int:
        """Open the data file for writing. Data without a list is worthless and is replaced by a new file."""
        if not self.ranges:
            self._record.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            os.ftruncate(fd, self.size)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _load(self) -> None:
        self.ranges = ()
        document = load_record(self._record)
        if document is None or {name: document.get(name) for name in self._key} != self._key:
            return
        try:
            complete = self.path.stat().st_size == self.size
        except OSError:
            return
        if complete:
            self.ranges = union((start, stop) for start, stop in document["ranges"])


def _wait(lock: int) -> None:
    """Lock an open file. On a filesystem without locks, two runs may fetch the same bytes at the same time."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
