"""A checkpoint to write: staged beside its destination, locked, and renamed into place whole or not at all.

Order on disk: every file is written and fsynced, then the staging directory, then the rename, then the parent
directory. A run that is killed leaves at most a staging directory, which the next run to the same destination
recognises by its name, locks and clears.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hsa import fsio
from hsa.errors import DestinationError
from hsa.option_names import option
from hsa.workbench import NAME_MAX, STAGING, Workbench, beside, clear, lock, same

PROVENANCE = "hsa_merge.json"
"""The file that marks a directory as an output of this program."""

ASIDE = ".hsa-replaced"


def check_destination(
    output: str | os.PathLike[str], sources: Iterable[Path], *, overwrite: bool, adding: bool = False
) -> Path:
    """The destination with its links resolved; DestinationError where nothing may be written.

    Refused always: a root, home or mount point, and a directory that is, contains or lies in a source.
    Refused without `overwrite`: anything but an empty directory. Refused with it: anything but an empty directory or
    an earlier output in which nobody has made a directory since, such as another output. A directory that is only
    added to (`adding`) may hold anything.
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
        _refuse(destination, label, sources, overwrite=overwrite, adding=adding)
    except OSError as error:
        raise DestinationError(f"{label} cannot be looked at: {error.strerror}; choose another destination") from error
    return destination


def _refuse(destination: Path, label: str, sources: Iterable[Path], *, overwrite: bool, adding: bool) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        destination.lstat()
    _refuse_special(destination, label)
    for source in sources:
        found = relation(destination, source)
        if found:
            raise DestinationError(f"{label} {found} the source {source}; choose a directory apart from the sources")
    if not adding or not destination.is_dir():
        _refuse_occupied(destination, label, overwrite=overwrite)
    if not destination.parent.is_dir():
        existing = next(parent for parent in destination.parents if parent.exists())
        if not existing.is_dir():
            raise DestinationError(f"{label} cannot be made: {existing} is not a directory")


def check_tree(output: str | os.PathLike[str], sources: Iterable[Path]) -> Path:
    """The root of several outputs with its links resolved, which may hold anything; DestinationError where not.

    Refused: the root, a home or what holds one, a file, and a directory that is, contains or lies in a source.
    """
    if not os.fspath(output):
        raise DestinationError("output is an empty path; name a directory of its own for the tree")
    try:
        tree = (Path.cwd() / Path(output).expanduser()).resolve()
        label = f"output {tree}"
        own, homes = _homes()
        if tree == Path(tree.anchor) or tree in homes or any(home.is_relative_to(tree) for home in own):
            raise DestinationError(f"{label} is the root, or is or holds a home directory; name one of its own")
        if os.path.lexists(tree) and not tree.is_dir():
            raise DestinationError(f"{label} exists and is not a directory; choose another, or move it away")
        for source in sources:
            how = relation(tree, source)
            if how:
                raise DestinationError(f"{label} {how} the source {source}; choose a directory apart from the sources")
    except (OSError, RuntimeError, ValueError) as error:
        raise DestinationError(f"output {os.fspath(output)} cannot be looked at: {error}") from error
    return tree


def _refuse_special(destination: Path, label: str) -> None:
    own, homes = _homes()
    if destination == Path(destination.anchor):
        raise DestinationError(f"{label} is the root directory; name a directory of its own for the output")
    if destination in homes or any(home.is_relative_to(destination) for home in own):
        raise DestinationError(f"{label} is or holds a home directory; name a directory of its own for the output")
    if _is_mount(destination):
        raise DestinationError(f"{label} is a mount point and cannot be renamed; name a directory inside it")
    if destination.name.startswith(".") and destination.name.endswith((STAGING, ASIDE)):
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


def relation(destination: Path, source: Path) -> str | None:
    """How a destination lies to a source, `is`, `contains` or `lies in`, or None where they are apart.

    By path and by inode, for a bind mount gives one directory two paths."""
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
    if not fsio.exists(destination):
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
            f"{label} is not empty: it holds {found}; choose another, or give {option('overwrite', True)} to replace "
            f"an earlier output"
        )
    if not (destination / PROVENANCE).is_file():
        raise DestinationError(
            f"{label} is no earlier output of hsa: it holds {found} and no {PROVENANCE}; "
            f"{option('overwrite', True)} replaces nothing else, so move it away yourself"
        )
    inside = [name for name in held if (destination / name).is_dir() and not (destination / name).is_symlink()]
    if inside:  # an output has none of its own: these are a sweep's, or somebody's who worked in it
        raise DestinationError(
            f"{label} is an earlier output of hsa and holds directories ({', '.join(inside[:3])}), which replacing it "
            f"would remove; choose another, or move them away"
        )


def staging_path(destination: Path) -> Path:
    return beside(destination, STAGING)


def _aside_path(destination: Path) -> Path:
    return beside(destination, ASIDE)


class Staging(Workbench):
    """A locked staging directory. `publish` puts it into place; leaving the block otherwise removes it.

    Raises DestinationError when another run holds the lock, MachineError when the disk fails.
    """

    def __init__(self, destination: Path, *, overwrite: bool, sync: bool) -> None:
        super().__init__(staging_path(destination), destination, sync=sync)
        self.overwrite = overwrite
        try:  # again, for another run may have ended, or a killed one's old output may be back
            _refuse_occupied(self.destination, f"output {self.destination}", overwrite=self.overwrite)
        except BaseException:
            self._discard()
            raise

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
                    self.settle(self.destination.parent)
                except OSError:
                    fsio.rename(self.destination, self.path)
                    raise
        self.closed = True
        with suppress(OSError):  # the output stands, and nothing was written through this descriptor
            os.close(self._lock)

    def _recover(self) -> None:
        """Finish what a killed replacement left: put the old output back, or remove it when the new one stands."""
        aside = _aside_path(self.destination)
        if not fsio.exists(aside):
            return
        old = lock(aside, made=True)
        if old is None:  # a run that is just ending still removes it
            return
        try:
            if fsio.exists(self.destination) and any(self.destination.iterdir()):
                clear(old)
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
        old = lock(self.destination, made=True)
        if old is None:
            raise DestinationError(f"another run holds {self.destination}; wait for it to end")
        aside = _aside_path(self.destination)
        try:
            if not fsio.exchange(self.path, self.destination):
                fsio.rename(self.destination, aside)
                fsio.rename(self.path, self.destination)
            try:
                self.settle(self.destination.parent)
            except OSError:
                if not same(old, self.path):
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
            if not same(old, leftover):
                continue
            if fsio.exists(self.destination):
                clear(old)
                leftover.rmdir()
            else:
                fsio.rename(leftover, self.destination)
