"""Check that an output may be written to a directory, and that an earlier output there may be replaced."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hsa.errors import DestinationError, ProvenanceError
from hsa.option_names import option
from hsa.system import fsio
from hsa.system.descriptors import reason
from hsa.system.manifest import PROVENANCE, listed_files
from hsa.system.staging import NAME_MAX, REPLACED, STAGING


def check_destination(
    output: str | os.PathLike[str], sources: Iterable[Path], *, overwrite: bool, adding: bool = False
) -> Path:
    """Return the destination with its links resolved; DestinationError if nothing may be written there.

    Always refused: a root, home or mount point; a directory that is, contains or lies in a source; and a place inside
    an earlier output. Refused without `overwrite`: anything but an empty directory. Refused with it: anything but an
    empty directory, or an earlier output whose record lists all its files and which this user may remove. With
    `adding`, any earlier output is accepted: what happens to it is decided later.
    """
    if not os.fspath(output):
        raise DestinationError("output is an empty path; name a directory of its own for the output")
    try:
        absolute = Path.cwd() / Path(output).expanduser()
        destination = absolute.resolve()
        longest = max(len(os.fsencode(part)) for part in destination.parts)
    except (OSError, RuntimeError, ValueError) as error:
        raise DestinationError(f"output {os.fspath(output)} cannot be resolved: {error}") from error
    label = f"output {destination}" if destination == absolute else f"output {absolute} (which is {destination})"
    if longest > NAME_MAX:
        raise DestinationError(f"{label} has a name of {longest} bytes, at most {NAME_MAX} are allowed; choose another")
    try:
        _refuse(destination, label, sources, overwrite=overwrite, adding=adding)
    except OSError as error:
        raise DestinationError(f"{label} cannot be looked at: {reason(error)}; choose another destination") from error
    return destination


def _refuse(destination: Path, label: str, sources: Iterable[Path], *, overwrite: bool, adding: bool) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        destination.lstat()
    _refuse_special(destination, label)
    for source in sources:
        overlap = path_overlap(destination, source)
        if overlap:
            raise DestinationError(f"{label} {overlap} the source {source}; choose a directory apart from the sources")
    refuse_inside_output(destination, label)
    if not adding or not destination.is_dir():
        check_replaceable(destination, overwrite=overwrite, label=label)
    if not destination.parent.is_dir():
        existing = next(parent for parent in destination.parents if parent.exists())
        if not existing.is_dir():
            raise DestinationError(f"{label} cannot be made: {existing} is not a directory")


def check_tree(output: str | os.PathLike[str], sources: Iterable[Path]) -> Path:
    """Return the root of several outputs with its links resolved; DestinationError if it is refused.

    The root may contain anything. Refused: the root of the filesystem, a home or a directory that contains one, a file,
    a directory that is, contains or lies in a source, an earlier output, and a place inside one.
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
            overlap = path_overlap(tree, source)
            if overlap:
                raise DestinationError(
                    f"{label} {overlap} the source {source}; choose a directory apart from the sources"
                )
        refuse_inside_output(tree / "entry", label)
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
    if destination.name.startswith(".") and destination.name.endswith((STAGING, REPLACED)):
        raise DestinationError(f"{label} has a name that hsa keeps for its own staging directories; choose another")


def _homes() -> tuple[set[Path], set[Path]]:
    """This user's home directories (by HOME and by the user database), and everybody's."""
    own: set[str] = set()
    everyones: set[str] = set()
    with suppress(RuntimeError):  # a user without HOME and without an entry in the database
        own.add(str(Path.home()))
    with suppress(ImportError, OSError, KeyError):
        import pwd

        own.add(pwd.getpwuid(os.getuid()).pw_dir)
        everyones |= {entry.pw_dir for entry in pwd.getpwall()}
    resolved = {home: Path(os.path.realpath(home)) for home in own | everyones if os.path.isabs(home)}
    return {resolved[home] for home in own if home in resolved}, set(resolved.values())


def _is_mount(path: Path) -> bool:
    """Whether this is a mount point, even if the mounted directory is on the same device, as with a bind mount.

    stat(2) cannot detect such a mount.
    """
    if path.is_mount():
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    escaped = (line.split(b" ")[4] for line in lines)
    mount_points = {re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), point) for point in escaped}
    return os.fsencode(path) in mount_points


def path_overlap(destination: Path, source: Path) -> str | None:
    """How the two paths overlap: `is`, `contains` or `lies in`, or None if they do not.

    Compares both paths and inodes, since a bind mount gives one directory two paths.
    """
    if destination == source or _inodes(destination) & _inodes(source):
        return "is"
    if source.is_relative_to(destination) or _inodes(destination) & _inodes(*source.parents):
        return "contains"
    if destination.is_relative_to(source) or _inodes(source) & _inodes(*destination.parents):
        return "lies in"
    return None


def _inodes(*paths: Path) -> set[tuple[int, int]]:
    """Return device and inode of each of the paths that exist."""
    inodes = set()
    for path in paths:
        with suppress(OSError):
            status = path.stat()
            if status.st_ino:
                inodes.add((status.st_dev, status.st_ino))
    return inodes


def refuse_inside_output(place: Path, label: str) -> None:
    """Raise DestinationError if a place is inside an earlier output, at any depth. Links are already resolved.

    An output lists its files: a file added to it makes `hsa verify` fail and `--overwrite` refuse.
    """
    for parent in place.parents:
        if (parent / PROVENANCE).is_file():
            raise DestinationError(
                f"{label}: {parent} is an earlier output of hsa, which lists its files, so nothing is added to it; "
                f"choose a place outside it"
            )


def check_replaceable(destination: Path, *, overwrite: bool, label: str | None = None) -> frozenset[str]:
    """Return the names in a directory that an output may replace: none, or with `overwrite` an earlier output's.

    Raises DestinationError if anything else is there, or if this user may not remove it. Raises OSError.
    """
    label = label or f"output {destination}"
    if not fsio.exists(destination):
        return frozenset()
    if not destination.is_dir():
        raise DestinationError(f"{label} exists and is not a directory; choose another, or move it away")
    try:
        names = sorted(os.listdir(destination))
    except OSError as error:
        raise DestinationError(f"{label} cannot be listed: {reason(error)}; choose another destination") from error
    if not names:
        return frozenset()
    if not overwrite:
        raise DestinationError(
            f"{label} is not empty: it holds {_first_names(names)}; choose another, or give "
            f"{option('overwrite', True)} to replace an earlier output"
        )
    if not (destination / PROVENANCE).is_file():
        raise DestinationError(
            f"{label} is no earlier output of hsa: it holds {_first_names(names)} and no {PROVENANCE}; "
            f"{option('overwrite', True)} replaces nothing else, so move it away yourself"
        )
    try:
        surplus = unlisted(destination, names)
    except ProvenanceError as error:
        raise DestinationError(
            f"{label} is not replaced: its record lists no file, for it is damaged or of another version ({error}); "
            f"move the directory away yourself, or choose another"
        ) from error
    if surplus:
        raise DestinationError(
            f"{label} holds {_first_names(surplus)}, which its {PROVENANCE} does not list; "
            f"{option('overwrite', True)} deletes only what is listed, so move the rest away, or choose another output"
        )
    _refuse_protected(destination, names, label)
    return frozenset(names)


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unlisted(directory: Path, names: Iterable[str]) -> list[str]:
    """Return the names in an earlier output that its record does not list, each with its kind unless it is a file.

    A directory, link or device is never listed, whatever its name, since an output has none. Raises ProvenanceError if
    the record cannot be read.
    """
    recorded, present, surplus = listed_files(directory), set(names), []
    for name in sorted(present):
        status = os.lstat(directory / name)
        if not stat.S_ISREG(status.st_mode):
            kind = "directory" if stat.S_ISDIR(status.st_mode) else "link" if stat.S_ISLNK(status.st_mode) else "device"
            surplus.append(f"{name} (a {kind})")
        elif name not in recorded and not _is_spelling(directory, name, recorded - present, status):
            surplus.append(name)
    return surplus


def _is_spelling(directory: Path, name: str, listed: Iterable[str], status: os.stat_result) -> bool:
    """Whether a file is a listed one under another spelling, on a filesystem that does not distinguish the two."""
    for recorded in listed:
        if _normalized(recorded) == _normalized(name):
            with suppress(OSError):
                return os.path.samestat(os.lstat(directory / recorded), status)
    return False


def _normalized(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _refuse_protected(destination: Path, names: Iterable[str], label: str) -> None:
    """Raise DestinationError if this user may not remove an earlier output: its mode, another owner, a sticky bit."""
    if os.statvfs(destination).f_flag & os.ST_RDONLY:  # creating the staging directory gives the better message
        return
    status = destination.stat()
    effective = {"effective_ids": True} if os.access in os.supports_effective_ids else {}
    reason = None
    if not os.access(destination, os.R_OK | os.W_OK | os.X_OK, **effective):
        reason = "Permission denied"
    elif _is_sticky_for_others(destination.parent.stat(), status):
        reason = f"{destination.parent} lets its owner alone remove what others made"
    elif status.st_mode & stat.S_ISVTX:
        protected = [name for name in names if _is_sticky_for_others(status, os.lstat(destination / name))]
        reason = f"it lets its owner alone remove {protected[0]}" if protected else None
    if reason is not None:
        raise DestinationError(
            f"{label} may not be removed by this user (uid {os.geteuid()}): {reason}; it belongs to uid "
            f"{status.st_uid} and has mode {stat.S_IMODE(status.st_mode):o}: choose another output, or let its owner "
            f"give it write permission"
        )


def _is_sticky_for_others(directory: os.stat_result, entry: os.stat_result) -> bool:
    """Whether the sticky bit of a directory keeps this user from renaming or removing an entry; see unlink(2)."""
    return bool(directory.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, directory.st_uid, entry.st_uid)
