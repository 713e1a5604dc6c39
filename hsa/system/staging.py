"""A locked, hidden directory in which files are written before they are moved to their destination.

A killed run leaves at most such a directory. The next run recognises it by its name, locks and clears it.
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

STAGING, REPLACED = ".hsa-staging", ".hsa-replaced"
"""Suffixes of the hidden names beside a destination: for new files while they are made, and for old ones meanwhile."""

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def hidden_sibling(destination: Path, suffix: str) -> Path:
    """Return a hidden name beside the destination; a digest replaces a name that would be too long."""
    name = f".{destination.name}{suffix}"
    if len(os.fsencode(name)) > NAME_MAX:
        name = f".{sha256(os.fsencode(destination.name)).hexdigest()}{suffix}"
    return destination.with_name(name)


class StagingDirectory:
    """The locked directory `path`, for the future content of `destination`. Leaving the block removes it.

    Raises DestinationError if another run holds the lock, MachineError if the disk fails.
    """

    def __init__(self, path: Path, destination: Path, *, sync: bool) -> None:
        self.path, self.destination, self.sync = path, destination, sync
        self.closed = False
        self._created_parents: list[Path] = []
        with fsio.map_write_errors(self.path):
            try:
                self._make_parents()
                self._lock = self._acquire()
            except BaseException:
                self._remove_orphan()
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
            with fsio.map_write_errors(path, len(data)):
                fsio.write_all(fd, memoryview(data), 0, tally)
                if self.sync:
                    fsio.sync(fd)
        finally:
            os.close(fd)

    def publish_file(self, name: str, place: Path) -> None:
        """Move a finished file to its place atomically; an older one there is replaced. Durable if `sync`."""
        with fsio.map_write_errors(place):
            fsio.rename(self.file(name), place)
            self.sync_entries(place.parent)

    def sync_entries(self, directory: Path) -> None:
        """Make the entries of a directory durable, and the directory's own entry if this run created it."""
        if self.sync:
            for parent in {directory, *(path.parent for path in self._created_parents)}:
                fsio.sync_directory(parent)

    def _recover(self) -> None:
        """Finish what a killed run left beside the directory, which is now locked and fresh."""

    def _make_parents(self) -> None:
        missing = [parent for parent in self.path.parents if not parent.exists()]
        for parent in reversed(missing):
            self._created_parents.append(parent)
            try:
                parent.mkdir()
            except FileExistsError:
                self._created_parents.pop()
            except FileNotFoundError:  # another run has just removed the parent that it had made
                self._created_parents.pop()
                return

    def _remove_parents(self) -> None:
        for parent in reversed(self._created_parents):
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
                created = True
            except FileExistsError:
                created = False
            except FileNotFoundError:  # a failed run has just removed the parent that it had made
                self._make_parents()
                continue
            try:
                fd = self._lock_staging(created=created)
            except FileNotFoundError:  # the run that held it has just ended
                continue
            except OSError:
                if created:  # it could not be opened, so nothing can remove it later through a descriptor
                    with suppress(OSError):
                        self.path.rmdir()
                raise
            if fd is not None:
                return fd
        raise MachineError(f"{self.path} keeps changing under this run; choose another output")

    def _remove_orphan(self) -> None:
        """Remove the staging directory if an interrupt left it unlocked."""
        with suppress(OSError):
            fd = lock(self.path, created=False)
            if fd is not None:
                try:
                    remove_contents(fd)
                    self.path.rmdir()
                finally:
                    os.close(fd)

    def _lock_staging(self, *, created: bool) -> int | None:
        """Lock the staging directory if this run made it; None if a leftover was removed or is already gone."""
        if not stat.S_ISDIR(self.path.lstat().st_mode):
            raise DestinationError(f"{self.path} is in the way and is no staging directory of hsa; move it away")
        fd = lock(self.path, created=created)
        if fd is None:
            raise DestinationError(
                f"another run is writing to {self.destination} (it holds {self.path}); wait for it to end, or "
                f"choose another output; where the filesystem has no locks, remove what a killed run left"
            )
        try:
            if is_directory_at(fd, self.path):
                if created:
                    self._recover()
                    return fd
                self._remove_leftover(fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def _remove_leftover(self, fd: int) -> None:
        """Remove a killed run's directory, which is locked, so that a fresh one has this run's owner and mode."""
        try:
            remove_contents(fd)
            self.path.rmdir()
        except OSError as error:
            owner = os.fstat(fd).st_uid
            raise MachineError(
                f"{self.path}, which a killed run of uid {owner} left, cannot be removed: {reason(error)}; remove it "
                f"with that user's rights, or choose another output"
            ) from error

    def _discard(self) -> None:
        """Remove the staging directory, unless an interrupt came after it had become the destination."""
        self.closed = True
        try:
            if is_directory_at(self._lock, self.path):
                remove_contents(self._lock)
                self.path.rmdir()
                self._remove_parents()
        except OSError as error:
            raise MachineError(
                f"{self.path} could not be removed: {reason(error)}; remove it, or the next run will"
            ) from error
        finally:
            os.close(self._lock)


def lock(path: Path, *, created: bool) -> int | None:
    """Open and lock the directory; None if somebody else holds the lock.

    On a filesystem without locks, the caller that `created` the directory holds it.
    """
    fd = open_file(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS and created:
            return fd
        os.close(fd)
        if error.errno in _NO_LOCKS or isinstance(error, BlockingIOError):
            return None
        raise
    return fd


def is_directory_at(fd: int, path: Path) -> bool:
    """Whether the directory that is open as `fd` is the one at `path`."""
    try:
        at_path = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    opened = os.fstat(fd)
    return (at_path.st_dev, at_path.st_ino) == (opened.st_dev, opened.st_ino)


def remove_contents(fd: int) -> None:
    """Remove everything in the directory that is open as `fd`, without following links."""
    for name in list_directory(fd):
        if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                remove_contents(inner)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=fd)
        else:
            os.unlink(name, dir_fd=fd)
