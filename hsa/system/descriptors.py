"""Share a bounded number of file descriptors between all sources, and name the limit when too many files are open.

A source with thousands of shards has at most `MAX_OPEN` of them open. The least recently read file is closed to make
room for the next, and reopened when it is needed; its reader then checks that it is the same file.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")

MAX_OPEN = 128
"""The most source files that stay open while nobody reads them: twenty times what large-v3's three sources have."""

TOO_MANY = (errno.EMFILE, errno.ENFILE)


def reason(error: OSError) -> str:
    """Return the system's text for an error. If too many files are open, also name the limit and how to raise it.

    Example:
        >>> reason(OSError(errno.ENOENT, "No such file or directory"))
        'No such file or directory'
    """
    text = error.strerror or str(error)
    if error.errno == errno.EMFILE:
        return f"{text}: this process may open {_soft_limit()}; raise the limit (ulimit -n)"
    if error.errno == errno.ENFILE:
        return f"{text}: all programs together have as many open as the system allows (fs.file-max); close some"
    return text


def import_problem(error: ImportError) -> str | None:
    """Explain a failed import of a library if too many files are open; None for any other reason."""
    for code in TOO_MANY:
        if os.strerror(code) in str(error):
            return f"a library cannot be loaded: {reason(OSError(code, os.strerror(code)))}"
    return None


def open_file(path: str | os.PathLike[str], flags: int, mode: int = 0o777) -> int:
    """Call os.open; if too many files are open, close source files that nobody reads."""
    return _closing_idle_files(lambda: os.open(path, flags | os.O_CLOEXEC, mode))


def list_directory(directory: int) -> list[str]:
    """Call os.listdir on an open directory, which takes a second descriptor for a while; see `open_file`."""
    return _closing_idle_files(lambda: os.listdir(directory))


def _closing_idle_files(call: Callable[[], _T]) -> _T:
    while True:
        try:
            return call()
        except OSError as error:
            if error.errno not in TOO_MANY or not _POOL.release_one():
                raise


class ReopenableFile:
    """A file for reading, whose descriptor may be closed while it is not in use.

    `check` is called with the file's status each time it is opened, and raises if it is another file.
    """

    def __init__(self, path: Path, check: Callable[[os.stat_result], None]) -> None:
        self.path, self.check = path, check
        self.fd: int | None = None
        self.users = 0

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """The open file's descriptor, valid inside the block. Raises OSError, and what `check` raises."""
        fd = _POOL.take(self)
        try:
            yield fd
        finally:
            _POOL.give_back(self)

    def status(self) -> os.stat_result | None:
        """The status of the open file, None while it is closed."""
        return _POOL.status(self)

    def close(self) -> None:
        _POOL.close(self)


class _Pool:
    """The open files of all sources of this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._idle: dict[ReopenableFile, None] = {}
        self._open = 0

    def take(self, file: ReopenableFile) -> int:
        with self._lock:
            if file.fd is None:
                self._open_again(file)
            self._idle.pop(file, None)
            file.users += 1
            assert file.fd is not None
            return file.fd

    def give_back(self, file: ReopenableFile) -> None:
        with self._lock:
            file.users -= 1
            if file.users == 0 and file.fd is not None:
                self._idle[file] = None  # the last of the dict: used most recently
                self._trim(_max_open())

    def status(self, file: ReopenableFile) -> os.stat_result | None:
        with self._lock:
            return None if file.fd is None else os.fstat(file.fd)

    def close(self, file: ReopenableFile) -> None:
        with self._lock:
            self._idle.pop(file, None)
            if file.fd is not None:
                fd, file.fd = file.fd, None
                self._open -= 1
                with suppress(OSError):  # nothing was written, so nothing can be lost, and the descriptor is gone
                    os.close(fd)

    def release_one(self) -> bool:
        """Close the least recently used idle file; False if none is idle."""
        with self._lock:
            oldest = next(iter(self._idle), None)
            if oldest is not None:
                self.close(oldest)
            return oldest is not None

    def _open_again(self, file: ReopenableFile) -> None:
        fd = open_file(file.path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe must not block
        try:
            file.check(os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        file.fd = fd
        self._open += 1

    def _trim(self, limit: int) -> None:
        while self._open > limit and self.release_one():
            pass


def _max_open() -> int:
    limit = _soft_limit()
    return MAX_OPEN if limit == resource.RLIM_INFINITY else max(1, min(MAX_OPEN, limit // 4))


def _soft_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


_POOL = _Pool()
