"""A locked, hidden directory in which files are made before they appear where they belong.

A run that is killed leaves at most such a directory, which the next run recognises by its name, locks and clears.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from hsa.errors import DestinationError, MachineError
from hsa.system import fsio
from hsa.system.descriptors import list_directory, open_file, reason

NAME_MAX = 255
"""Bytes of the longest file name, on every common filesystem."""

W = TypeVar("W", bound="StagingDirectory")

STAGING, ASIDE = ".hsa-staging", ".hsa-replaced"
"""Suffixes of the hidden names beside a destination: where its files are made, and where the old ones step aside."""

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def beside(destination: Path, suffix: str) -> Path:
    """A hidden name beside the destination, or a digest of one that would be too long."""
    name = f".{destination.name}{suffix}"
    if len(os.fsencode(name)) > NAME_MAX:
        name = f".{sha256(os.fsencode(destination.name)).hexdigest()}{suffix}"
    return destination.with_name(name)


class StagingDirectory:
    """The locked directory `path`, for what will stand at `destination`. Leaving the block removes it.

    Raises DestinationError when another run holds the lock, MachineError when the disk fails.
    """

    def __init__(self, path: Path, destination: Path, *, sync: bool) -> None:
        self.path, self.destination, self.sync = path, destination, sync
        self.closed = False
        self._made: list[Path] = []
        with fsio.writing(self.path):
            try:
                self._make_parents()
                self._lock = self._acquire()
            except BaseException:
                self._sweep()
                self._remove_parents()
                raise

    def __enter__(self: W) -> W:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.closed:
            self._discard()

    def file(self, name: str) -> Path:
        return self.path / name

    def write(self, name: str, data: bytes, tally: fsio.Tally) -> None:
        """Write a small file whole, and fsync it."""
        path = self.file(name)
        fd = fsio.create(path, len(data))
        try:
            with fsio.writing(path, len(data)):
                fsio.write_all(fd, memoryview(data), 0, tally)
                if self.sync:
                    fsio.sync(fd)
        finally:
            os.close(fd)

    def publish_file(self, name: str, place: Path) -> None:
        """Put a finished file at its place, in one step; an older one there is replaced. Lasting when `sync`."""
        with fsio.writing(place):
            fsio.rename(self.file(name), place)
            self.settle(place.parent)

    def settle(self, directory: Path) -> None:
        """Make the entries of a directory, and its own where this run made it, last."""
        if self.sync:
            for each in {directory, *(path.parent for path in self._made)}:
                fsio.sync_directory(each)

    def _recover(self) -> None:
        """Finish what a killed run left beside the directory that is now locked and fresh."""

    def _make_parents(self) -> None:
        missing = [parent for parent in self.path.parents if not parent.exists()]
        for parent in reversed(missing):
            self._made.append(parent)
            try:
                parent.mkdir()
            except FileExistsError:
                self._made.pop()

    def _remove_parents(self) -> None:
        for parent in reversed(self._made):
            try:
                parent.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return

    def _acquire(self) -> int:
        """Make and lock the staging directory, after removing what a killed run left there."""
        for _ in range(100):
            try:
                self.path.mkdir()
                made = True
            except FileExistsError:
                made = False
            try:
                held = self._lock_staging(made=made)
            except FileNotFoundError:  # the run that held it has just ended
                continue
            except OSError:
                if made:  # it could not even be opened, so that nothing later can remove it through a descriptor
                    with suppress(OSError):
                        self.path.rmdir()
                raise
            if held is not None:
                return held
        raise MachineError(f"{self.path} keeps changing under this run; choose another output")

    def _sweep(self) -> None:
        """Remove the staging directory when an interrupt left it without anybody who holds it."""
        with suppress(OSError):
            held = lock(self.path, made=False)
            if held is not None:
                try:
                    clear(held)
                    self.path.rmdir()
                finally:
                    os.close(held)

    def _lock_staging(self, *, made: bool) -> int | None:
        """The staging directory locked, where this run made it; None when a leftover was removed, or is gone by now."""
        if not stat.S_ISDIR(self.path.lstat().st_mode):
            raise DestinationError(f"{self.path} is in the way and is no staging directory of hsa; move it away")
        held = lock(self.path, made=made)
        if held is None:
            raise DestinationError(
                f"another run is writing to {self.destination} (it holds {self.path}); wait for it to end, or "
                f"choose another output; where the filesystem has no locks, remove what a killed run left"
            )
        try:
            if same(held, self.path):
                if made:
                    self._recover()
                    return held
                self._remove_leftover(held)
        except BaseException:
            os.close(held)
            raise
        os.close(held)
        return None

    def _remove_leftover(self, held: int) -> None:
        """Remove a killed run's directory, so that a fresh one has this run's owner and mode; it is locked."""
        try:
            clear(held)
            self.path.rmdir()
        except OSError as error:
            owner = os.fstat(held).st_uid
            raise MachineError(
                f"{self.path}, which a killed run of uid {owner} left, cannot be removed: {reason(error)}; remove it "
                f"with that user's rights, or choose another output"
            ) from error

    def _discard(self) -> None:
        """Remove the staging directory, unless an interrupt came when it had already become the destination."""
        self.closed = True
        try:
            if same(self._lock, self.path):
                clear(self._lock)
                self.path.rmdir()
                self._remove_parents()
        except OSError as error:
            raise MachineError(
                f"{self.path} could not be removed: {reason(error)}; remove it, or the next run will"
            ) from error
        finally:
            os.close(self._lock)


def lock(path: Path, *, made: bool) -> int | None:
    """The directory open and locked, or None when somebody else holds it.

    On a filesystem without locks, the one who `made` the directory holds it.
    """
    fd = open_file(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS and made:
            return fd
        os.close(fd)
        if error.errno in _NO_LOCKS or isinstance(error, BlockingIOError):
            return None
        raise
    return fd


def same(fd: int, path: Path) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    opened = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def clear(fd: int) -> None:
    """Remove everything in the directory that is open as `fd`, following no link."""
    for name in list_directory(fd):
        if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                clear(inner)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=fd)
        else:
            os.unlink(name, dir_fd=fd)
