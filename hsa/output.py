"""A checkpoint to write: staged beside its destination, locked, and renamed into place whole or not at all.

Order on disk: every file is written and fsynced, then the staging directory, then the rename, then the parent
directory. A run that is killed leaves at most a staging directory, which the next run to the same destination
recognises by its name, locks and clears.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from hsa import fsio
from hsa.errors import DestinationError, MachineError

PROVENANCE = "hsa_merge.json"
"""The file that marks a directory as an output of this program."""

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def check_destination(output: str | os.PathLike[str], sources: Iterable[Path], *, overwrite: bool) -> Path:
    """The destination with its links resolved; DestinationError where nothing may be written.

    Refused always: a root, home or mount point, and a directory that is, contains or lies in a source.
    Refused without `overwrite`: anything but an empty directory. Refused with it: anything but an earlier
    output or an empty directory.
    """
    try:
        given = Path(os.path.abspath(Path(output).expanduser()))
        destination = given.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise DestinationError(f"output {os.fspath(output)} cannot be resolved: {error}") from error
    label = f"output {destination}" if destination == given else f"output {given} (which is {destination})"
    _refuse_special(destination, label)
    for source in sources:
        relation = _relation(destination, source)
        if relation:
            raise DestinationError(f"{label} {relation} the source {source}; choose a directory apart from the sources")
    _refuse_occupied(destination, label, overwrite=overwrite)
    if not destination.parent.is_dir():
        existing = next(parent for parent in destination.parents if parent.exists())
        if not existing.is_dir():
            raise DestinationError(f"{label} cannot be made: {existing} is not a directory")
    return destination


def _refuse_special(destination: Path, label: str) -> None:
    homes = {Path.home().resolve()}
    try:
        import pwd

        homes |= {Path(entry.pw_dir).resolve() for entry in pwd.getpwall()}
    except (ImportError, OSError):
        pass
    if destination == Path(destination.anchor):
        raise DestinationError(f"{label} is the root directory; name a directory of its own for the output")
    if destination in homes or any(home.is_relative_to(destination) for home in {Path.home().resolve()}):
        raise DestinationError(f"{label} is or holds a home directory; name a directory of its own for the output")
    if destination.is_mount():
        raise DestinationError(f"{label} is a mount point and cannot be renamed; name a directory inside it")


def _relation(destination: Path, source: Path) -> str | None:
    if destination == source:
        return "is"
    if source.is_relative_to(destination):
        return "contains"
    if destination.is_relative_to(source):
        return "lies in"
    return None


def _refuse_occupied(destination: Path, label: str, *, overwrite: bool) -> None:
    if not os.path.lexists(destination):
        return
    if not destination.is_dir():
        raise DestinationError(f"{label} exists and is not a directory; choose another, or move it away")
    try:
        held = sorted(entry.name for entry in destination.iterdir())
    except OSError as error:
        raise DestinationError(f"{label} cannot be listed: {error.strerror}; choose another destination") from error
    if not held:
        return
    found = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
    if not overwrite:
        raise DestinationError(
            f"{label} is not empty: it holds {found}; choose another, or give --overwrite to replace an earlier output"
        )
    if PROVENANCE not in held:
        raise DestinationError(
            f"{label} is no earlier output of hsa: it holds {found} and no {PROVENANCE}; --overwrite replaces "
            f"nothing else, so move it away yourself"
        )


def staging_path(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.hsa-staging")


def _aside_path(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.hsa-replaced")


class Staging:
    """A locked staging directory. `publish` puts it into place; leaving the block otherwise removes it.

    Raises DestinationError when another run holds the lock, MachineError when the disk fails.
    """

    def __init__(self, destination: Path, *, overwrite: bool, sync: bool) -> None:
        self.destination, self.overwrite, self.sync = destination, overwrite, sync
        self.path = staging_path(destination)
        self.closed = False
        self._made: list[Path] = []
        with fsio.writing(self.path):
            self._make_parents()
            try:
                self._lock = self._acquire()
            except BaseException:
                self._remove_parents()
                raise

    def __enter__(self) -> Staging:
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

    def publish(self) -> None:
        """Put the staged directory at the destination in one step, and make that lasting."""
        parent = self.destination.parent
        with fsio.writing(self.destination):
            if self.sync:
                fsio.sync_directory(self.path)
            _refuse_occupied(self.destination, f"output {self.destination}", overwrite=self.overwrite)
            if self.destination.is_dir() and any(self.destination.iterdir()):
                self._replace()
            else:
                fsio.rename(self.path, self.destination)
            if self.sync:
                for directory in {parent, *(path.parent for path in self._made)}:
                    fsio.sync_directory(directory)
        self.closed = True
        os.close(self._lock)

    def _make_parents(self) -> None:
        missing = [parent for parent in self.destination.parents if not parent.exists()]
        for parent in reversed(missing):
            try:
                parent.mkdir()
            except FileExistsError:
                continue
            self._made.append(parent)

    def _remove_parents(self) -> None:
        for parent in reversed(self._made):
            try:
                parent.rmdir()
            except OSError:
                return

    def _acquire(self) -> int:
        """Make and lock the staging directory, clearing what a killed run left there."""
        aside = _aside_path(self.destination)
        for _ in range(100):
            made = True
            try:
                self.path.mkdir()
            except FileExistsError:
                made = False
                if not self.path.is_dir() or self.path.is_symlink():
                    raise DestinationError(
                        f"{self.path} is in the way and is no staging directory of hsa; move it away"
                    ) from None
            lock = _lock(self.path, made=made)
            if lock is None:
                raise DestinationError(
                    f"another run is writing to {self.destination} (it holds {self.path}); wait for it to end, or "
                    f"choose another output; where the filesystem has no locks, remove what a killed run left"
                )
            if _same(lock, self.path):
                try:
                    _clear(lock)
                    if os.path.lexists(aside):
                        self._recover(aside)
                except BaseException:
                    os.close(lock)
                    raise
                return lock
            os.close(lock)
        raise MachineError(f"{self.path} keeps changing under this run; choose another output")

    def _recover(self, aside: Path) -> None:
        """Finish what a killed replacement left: put the old output back, or remove it when the new one stands."""
        if os.path.lexists(self.destination):
            _remove(aside)
        else:
            fsio.rename(aside, self.destination)

    def _replace(self) -> None:
        """Swap the new directory with the earlier output, then remove that one.

        Where the filesystem cannot swap, the old output steps aside first. Whatever interrupts this, the old
        one is removed only when the new one stands, and is put back when nothing does.
        """
        old = _lock(self.destination, made=False)
        if old is None:
            raise DestinationError(f"another run holds {self.destination}; wait for it to end")
        aside = _aside_path(self.destination)
        try:
            if not fsio.exchange(self.path, self.destination):
                fsio.rename(self.destination, aside)
                fsio.rename(self.path, self.destination)
            if self.sync:
                fsio.sync_directory(self.destination.parent)
        finally:
            for leftover in (self.path, aside):
                if not _same(old, leftover):
                    continue
                if os.path.lexists(self.destination):
                    _clear(old)
                    leftover.rmdir()
                else:
                    fsio.rename(leftover, self.destination)
            os.close(old)

    def _discard(self) -> None:
        """Remove the staging directory, unless an interrupt came when it had already become the destination."""
        self.closed = True
        try:
            if _same(self._lock, self.path):
                _clear(self._lock)
                self.path.rmdir()
                self._remove_parents()
        except OSError as error:
            raise MachineError(
                f"{self.path} could not be removed: {error.strerror}; remove it, or the next run will"
            ) from error
        finally:
            os.close(self._lock)


def _lock(path: Path, *, made: bool) -> int | None:
    """The directory open and locked, or None when somebody else holds it.

    On a filesystem without locks, the one who `made` the directory holds it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
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


def _same(fd: int, path: Path) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    opened = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _clear(fd: int) -> None:
    """Remove everything in the directory that is open as `fd`, following no link."""
    for name in os.listdir(fd):
        if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                _clear(inner)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=fd)
        else:
            os.unlink(name, dir_fd=fd)


def _remove(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _clear(fd)
    finally:
        os.close(fd)
    os.rmdir(path)
