"""A checkpoint to write: staged beside its destination, locked, and renamed into place whole or not at all.

Order on disk: every file is written and fsynced, then the staging directory, then the rename, then the parent
directory. A run that is killed leaves at most a staging directory, which the next run to the same destination
recognises by its name, locks and clears.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import TracebackType

from hsa import fsio
from hsa.errors import DestinationError, MachineError

PROVENANCE = "hsa_merge.json"
"""The file that marks a directory as an output of this program."""

NAME_MAX = 255
"""Bytes of the longest file name, on every common filesystem."""

_STAGING, _ASIDE = ".hsa-staging", ".hsa-replaced"
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def check_destination(output: str | os.PathLike[str], sources: Iterable[Path], *, overwrite: bool) -> Path:
    """The destination with its links resolved; DestinationError where nothing may be written.

    Refused always: a root, home or mount point, and a directory that is, contains or lies in a source.
    Refused without `overwrite`: anything but an empty directory. Refused with it: anything but an empty directory or
    an earlier output in which nobody has made a directory since, such as another output.
    """
    if not os.fspath(output):
        raise DestinationError("output is an empty path; name a directory of its own for the output")
    try:
        given = Path.cwd() / Path(output).expanduser()
        destination = given.resolve()
        longest = max(len(os.fsencode(part)) for part in destination.parts)
    except (OSError, RuntimeError, ValueError) as error:
        raise DestinationError(f"output {os.fspath(output)} cannot be resolved: {error}") from error
    label = f"output {destination}" if destination == given else f"output {given} (which is {destination})"
    if longest > NAME_MAX:
        raise DestinationError(f"{label} has a name of {longest} bytes, at most {NAME_MAX} are allowed; choose another")
    try:
        _refuse(destination, label, sources, overwrite=overwrite)
    except OSError as error:
        raise DestinationError(f"{label} cannot be looked at: {error.strerror}; choose another destination") from error
    return destination


def _refuse(destination: Path, label: str, sources: Iterable[Path], *, overwrite: bool) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        destination.lstat()
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


def _refuse_special(destination: Path, label: str) -> None:
    own, homes = _homes()
    if destination == Path(destination.anchor):
        raise DestinationError(f"{label} is the root directory; name a directory of its own for the output")
    if destination in homes or any(home.is_relative_to(destination) for home in own):
        raise DestinationError(f"{label} is or holds a home directory; name a directory of its own for the output")
    if _is_mount(destination):
        raise DestinationError(f"{label} is a mount point and cannot be renamed; name a directory inside it")
    if destination.name.startswith(".") and destination.name.endswith((_STAGING, _ASIDE)):
        raise DestinationError(f"{label} has a name that hsa keeps for its own staging directories; choose another")


def _homes() -> tuple[set[Path], set[Path]]:
    """This user's home directories (by HOME and by the user database), and everybody's."""
    own: set[str] = set()
    every: set[str] = set()
    with suppress(RuntimeError):  # a user that no database knows, without HOME
        own.add(str(Path.home()))
    with suppress(ImportError, OSError, KeyError):
        import pwd

        own.add(pwd.getpwuid(os.getuid()).pw_dir)
        every |= {entry.pw_dir for entry in pwd.getpwall()}
    resolved = {home: Path(os.path.realpath(home)) for home in own | every if os.path.isabs(home)}
    return {resolved[home] for home in own if home in resolved}, set(resolved.values())


def _is_mount(path: Path) -> bool:
    """Also where the mounted directory lies on the same device, as with a bind mount, which stat(2) cannot tell."""
    if path.is_mount():
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    escaped = (line.split(b" ")[4] for line in lines)
    return os.fsencode(path) in {re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), e) for e in escaped}


def _relation(destination: Path, source: Path) -> str | None:
    """By path and by inode, for a bind mount gives one directory two paths."""
    if destination == source or _identity(destination) & _identity(source):
        return "is"
    if source.is_relative_to(destination) or _identity(destination) & _identity(*source.parents):
        return "contains"
    if destination.is_relative_to(source) or _identity(source) & _identity(*destination.parents):
        return "lies in"
    return None


def _identity(*paths: Path) -> set[tuple[int, int]]:
    """Device and inode of each of the paths that exists."""
    found = set()
    for path in paths:
        with suppress(OSError):
            status = path.stat()
            if status.st_ino:
                found.add((status.st_dev, status.st_ino))
    return found


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
    if not (destination / PROVENANCE).is_file():
        raise DestinationError(
            f"{label} is no earlier output of hsa: it holds {found} and no {PROVENANCE}; --overwrite replaces "
            f"nothing else, so move it away yourself"
        )
    inside = [name for name in held if (destination / name).is_dir() and not (destination / name).is_symlink()]
    if inside:  # an output has none of its own: these are a sweep's, or somebody's who worked in it
        raise DestinationError(
            f"{label} is an earlier output of hsa and holds directories ({', '.join(inside[:3])}), which replacing it "
            f"would remove; choose another, or move them away"
        )


def staging_path(destination: Path) -> Path:
    return _beside(destination, _STAGING)


def _aside_path(destination: Path) -> Path:
    return _beside(destination, _ASIDE)


def _beside(destination: Path, suffix: str) -> Path:
    name = f".{destination.name}{suffix}"
    if len(os.fsencode(name)) > NAME_MAX:
        name = f".{sha256(os.fsencode(destination.name)).hexdigest()}{suffix}"
    return destination.with_name(name)


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
            try:
                self._make_parents()
                self._lock = self._acquire()
            except BaseException:
                self._sweep()
                self._remove_parents()
                raise
        try:  # again, for another run may have ended, or a killed one's old output may be back
            _refuse_occupied(self.destination, f"output {self.destination}", overwrite=self.overwrite)
        except BaseException:
            self._discard()
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
        with fsio.writing(self.destination):
            if self.sync:
                fsio.sync_directory(self.path)
            _refuse_occupied(self.destination, f"output {self.destination}", overwrite=self.overwrite)
            if self.destination.is_dir() and any(self.destination.iterdir()):
                self._replace()
            else:
                fsio.rename(self.path, self.destination)
                try:
                    self._sync_parents()
                except OSError:
                    fsio.rename(self.destination, self.path)
                    raise
        self.closed = True
        os.close(self._lock)

    def _sync_parents(self) -> None:
        if self.sync:
            for directory in {self.destination.parent, *(path.parent for path in self._made)}:
                fsio.sync_directory(directory)

    def _make_parents(self) -> None:
        missing = [parent for parent in self.destination.parents if not parent.exists()]
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
        """Make and lock the staging directory, clearing what a killed run left there."""
        for _ in range(100):
            try:
                self.path.mkdir()
                made = True
            except FileExistsError:
                made = False
            try:
                lock = self._lock_staging(made=made)
            except FileNotFoundError:  # the run that held it has just ended
                continue
            if lock is not None:
                return lock
        raise MachineError(f"{self.path} keeps changing under this run; choose another output")

    def _sweep(self) -> None:
        """Remove the staging directory when an interrupt left it without anybody who holds it."""
        with suppress(OSError):
            lock = _lock(self.path, made=False)
            if lock is not None:
                try:
                    _clear(lock)
                    self.path.rmdir()
                finally:
                    os.close(lock)

    def _lock_staging(self, *, made: bool) -> int | None:
        """The staging directory locked and empty; None when its name leads elsewhere by now."""
        if not stat.S_ISDIR(self.path.lstat().st_mode):
            raise DestinationError(f"{self.path} is in the way and is no staging directory of hsa; move it away")
        lock = _lock(self.path, made=made)
        if lock is None:
            raise DestinationError(
                f"another run is writing to {self.destination} (it holds {self.path}); wait for it to end, or "
                f"choose another output; where the filesystem has no locks, remove what a killed run left"
            )
        try:
            if _same(lock, self.path):
                _clear(lock)
                self._recover()
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        return None

    def _recover(self) -> None:
        """Finish what a killed replacement left: put the old output back, or remove it when the new one stands."""
        aside = _aside_path(self.destination)
        if not os.path.lexists(aside):
            return
        old = _lock(aside, made=True)
        if old is None:  # a run that is just ending still removes it
            return
        try:
            if os.path.lexists(self.destination) and any(self.destination.iterdir()):
                _clear(old)
                aside.rmdir()
            else:
                fsio.rename(aside, self.destination)
        finally:
            os.close(old)

    def _replace(self) -> None:
        """Swap the new directory with the earlier output, then remove that one.

        Where the filesystem cannot swap, the old output steps aside first. Whatever interrupts this, the old
        one is removed only when the new one stands, and is put back when nothing does, or when the disk fails
        to keep the swap.
        """
        old = _lock(self.destination, made=True)
        if old is None:
            raise DestinationError(f"another run holds {self.destination}; wait for it to end")
        aside = _aside_path(self.destination)
        try:
            if not fsio.exchange(self.path, self.destination):
                fsio.rename(self.destination, aside)
                fsio.rename(self.path, self.destination)
            try:
                self._sync_parents()
            except OSError:
                if not _same(old, self.path):
                    fsio.rename(self.destination, self.path)
                    fsio.rename(aside, self.destination)
                else:
                    fsio.exchange(self.path, self.destination)
                raise
        finally:
            try:
                self._retire(old, aside)
            except BaseException:  # an interrupt in the middle of a long removal: finish it
                self._retire(old, aside)
                raise
            finally:
                os.close(old)

    def _retire(self, old: int, aside: Path) -> None:
        """Remove the old output from where it stepped to, or put it back when nothing stands in its place."""
        for leftover in (self.path, aside):
            if not _same(old, leftover):
                continue
            if os.path.lexists(self.destination):
                _clear(old)
                leftover.rmdir()
            else:
                fsio.rename(leftover, self.destination)

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
