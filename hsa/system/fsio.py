"""Every system call that a merge makes on a file, in one place: counted, complete, and with plain errors.

Reads and writes continue until the whole range is done. An OSError becomes a SourceError, a SourceChanged or a
MachineError that names the file; nothing else in the package touches weights.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from hsa.errors import MachineError, SourceChanged, SourceError
from hsa.option_names import option
from hsa.system.descriptors import TOO_MANY, ReopenableFile, import_problem, open_file, reason
from hsa.system.ranges import Range, covers

FICLONE = 0x40049409
SYNC_FILE_RANGE_WRITE = 2
RENAME_EXCHANGE = 2
AT_FDCWD = -100
ALIGNMENT = 4096
"""The alignment in bytes of a direct write's file offset, length and address."""

CACHED_STEP = 64 << 10
"""Bytes of one write through the page cache. Larger writes make the kernel look for larger runs of free memory, which
took up to four times as long on a machine whose memory was in use."""

_NO_SUPPORT = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTTY}
MACHINE_ERRNOS = {errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
"""Errors of an open that come from the machine, not from the file."""

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
"""Errors of lstat where no file can exist."""


class Tally:
    """Bytes read and written so far, over all threads. Bytes read are also counted by the label of their source."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.read_by: dict[str, int] = {}
        self.written = 0

    @property
    def read(self) -> int:
        with self._lock:
            return sum(self.read_by.values())

    def add_read(self, label: str, count: int) -> None:
        with self._lock:
            self.read_by[label] = self.read_by.get(label, 0) + count

    def add_written(self, count: int) -> None:
        with self._lock:
            self.written += count


@dataclass(frozen=True)
class Fingerprint:
    """The properties of a file that must not change while a source is read."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Fingerprint:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def with_times_of(self, other: Fingerprint) -> Fingerprint:
        """Return this fingerprint with the other's times."""
        return replace(self, modified_ns=other.modified_ns, changed_ns=other.changed_ns)


class SourceFile:
    """A file open for reading, and its fingerprint from when it was first opened.

    `readable` are the ranges that may be read, None for all. Elsewhere, a partly fetched file has holes.
    """

    def __init__(self, path: Path, label: str, tally: Tally, readable: Sequence[Range] | None = None) -> None:
        self.path, self.label, self._tally, self.readable = path, label, tally, readable
        self._fingerprint: Fingerprint | None = None
        self._closed = False
        self._file = ReopenableFile(path, self._remember_or_compare)
        try:
            with self._file.descriptor():
                pass
        except OSError as error:
            kind = MachineError if error.errno in MACHINE_ERRNOS else SourceError
            raise kind(f"{label}: cannot open {path}: {reason(error)}") from error

    def _remember_or_compare(self, status: os.stat_result) -> None:
        """Store the file's fingerprint when it is first opened, and compare it whenever it is reopened."""
        if self._fingerprint is not None:
            self._compare(Fingerprint.of(status))
            return
        if not stat.S_ISREG(status.st_mode):
            raise SourceError(f"{self.label}: {self.path} is not a regular file; expected a file with data in it")
        self._fingerprint = Fingerprint.of(status)

    @property
    def fingerprint(self) -> Fingerprint:
        assert self._fingerprint is not None
        return self._fingerprint

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """The descriptor, open for reading inside the block. SourceChanged if it is not the file that was opened first,
        ValueError after `close`."""
        if self._closed:
            raise ValueError(f"{self.label}: {self.path} is closed")
        try:
            with self._file.descriptor() as fd:
                yield fd
        except FileNotFoundError as error:
            raise SourceChanged(f"{self.label}: {self.path} vanished during the run: {reason(error)}") from error

    @property
    def size(self) -> int:
        return self.fingerprint.size

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` (bytes) from `offset`; SourceChanged if the file ends before."""
        if self.readable is not None and not covers(self.readable, offset, offset + len(view)):
            raise SourceError(
                f"{self.label}: {len(view)} bytes at {offset} of {self.path} were not fetched and are wanted now; "
                f"download the model (hf download) and give its directory"
            )
        done = 0
        try:
            with self.descriptor() as fd:
                while done < len(view):
                    count = os.preadv(fd, [view[done:]], offset + done)
                    if count == 0:
                        raise SourceChanged(
                            f"{self.label}: {self.path} ended at byte {offset + done} while it was read, expected at "
                            f"least {offset + len(view)}; something truncated it, run the merge again"
                        )
                    done += count
        except OSError as error:
            raise MachineError(
                f"{self.label}: reading {len(view)} bytes at {offset} of {self.path} failed: {reason(error)}"
            ) from error
        self._tally.add_read(self.label, done)

    def read(self, count: int, offset: int = 0) -> bytes:
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def check_unchanged(self) -> None:
        """Raise SourceChanged if the file, or the target of its path, is no longer what was opened.

        The times of a partly fetched file may change: other runs may add ranges that this run does not read.
        """
        try:
            status = self._file.status()
            current = self.path.stat()
        except OSError as error:
            raise SourceChanged(f"{self.label}: {self.path} vanished during the run: {reason(error)}") from error
        for checked in (status or current, current):
            self._compare(Fingerprint.of(checked))

    def _compare(self, current: Fingerprint) -> None:
        if self.readable is not None:
            current = current.with_times_of(self.fingerprint)
        if current != self.fingerprint:
            raise SourceChanged(
                f"{self.label}: {self.path} changed while it was read (size, time or inode differ); the output "
                f"was withdrawn, run the merge again once nothing writes to it"
            )

    def close(self) -> None:
        self._closed = True
        self._file.close()


def create(path: Path, size: int) -> int:
    """Create a file of `size` bytes with the umask's ordinary mode and reserve its blocks, to detect a full disk."""
    with map_write_errors(path, size):
        fd = open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if size:
                _reserve(fd, size)
        except BaseException:
            os.close(fd)
            raise
    return fd


def _reserve(fd: int, size: int) -> None:
    """Call fallocate(2), not posix_fallocate(3), which writes every block if the filesystem cannot reserve."""
    call: Callable[..., int] | None = getattr(_libc(), "fallocate", None)
    code = errno.EINTR if call is not None else errno.ENOSYS
    while call is not None and code == errno.EINTR:  # ctypes does not repeat an interrupted call, as os does
        if call(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return
        code = ctypes.get_errno()
    if code not in _NO_SUPPORT:
        os.ftruncate(fd, 0)  # release what was reserved, so that the message shows how much is free
        raise OSError(code, os.strerror(code))
    os.ftruncate(fd, size)


def reopen(path: Path) -> int:
    """Reopen a file that `create` made, for reading and writing. Raises OSError unchanged."""
    return open_file(path, os.O_RDWR)


def reopen_direct(path: Path) -> int | None:
    """Open the file for writes that bypass the page cache; None if the filesystem does not support them."""
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        return None
    try:
        return open_file(path, os.O_WRONLY | direct)
    except OSError:
        return None


def write_all(fd: int, view: memoryview, offset: int, tally: Tally, step: int = sys.maxsize) -> None:
    """Write the whole of `view` at `offset`, at most `step` bytes per call. Raises OSError unchanged."""
    done = 0
    while done < len(view):
        done += os.pwritev(fd, [view[done : done + step]], offset + done)
    tally.add_written(done)


def write_direct(fd: int, view: memoryview, offset: int, tally: Tally) -> bool:
    """Write the whole of `view` to a file of `reopen_direct`; False if the filesystem needs another alignment."""
    try:
        write_all(fd, view, offset, tally)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def write_cached(fd: int, view: memoryview, offset: int, tally: Tally, *, writeback: bool) -> None:
    """Write the whole of `view` through the page cache; with `writeback`, ask the kernel to start writing to disk."""
    write_all(fd, view, offset, tally, CACHED_STEP)
    if writeback:
        start_writeback(fd, offset, len(view))


def start_writeback(fd: int, offset: int, count: int) -> None:
    """Ask the kernel to start writing a range to disk. It is only a hint, so failures are ignored."""
    call = getattr(_libc(), "sync_file_range", None)
    if call is not None:
        call(fd, ctypes.c_int64(offset), ctypes.c_int64(count), SYNC_FILE_RANGE_WRITE)


def clone(source: int, destination: int) -> bool:
    """Make `destination` share the blocks of `source`; False if the filesystem cannot."""
    import fcntl

    try:
        fcntl.ioctl(destination, FICLONE, source)
    except OSError as error:
        if error.errno in _NO_SUPPORT or error.errno == errno.EPERM:
            return False
        raise
    return True


def sync(fd: int) -> None:
    os.fsync(fd)


def sync_directory(path: Path) -> None:
    fd = open_file(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(source: Path, destination: Path) -> None:
    os.rename(source, destination)


def exchange(first: Path, second: Path) -> bool:
    """Swap two directory entries atomically; False if the filesystem cannot."""
    call: Callable[..., int] | None = getattr(_libc(), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SUPPORT:
        return False
    raise OSError(code, os.strerror(code), str(second))


CHOOSE_ANOTHER = "choose a destination that you may write to"
"""The remedy for a directory that cannot be written, unless a caller knows a better one."""


def is_overlay(path: Path) -> bool:
    """Whether a path is on an overlay filesystem, according to the kernel's mount table; False if there is none."""
    try:
        device = path.stat().st_dev
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    device_number = f"{os.major(device)}:{os.minor(device)}".encode()
    mounts = (line.partition(b" - ") for line in lines if line.split(b" ")[2] == device_number)
    return any(after.startswith((b"overlay ", b"fuse.fuse-overlayfs ")) for _, _, after in mounts)


@contextmanager
def map_write_errors(path: Path, needed: int | None = None, remedy: str = CHOOSE_ANOTHER) -> Iterator[None]:
    """Turn an OSError inside the block into a MachineError: what was needed, what is available, and the `remedy`."""
    try:
        yield
    except OSError as error:
        raise MachineError(_explain(error, path, needed, remedy)) from error


@contextmanager
def map_os_errors() -> Iterator[None]:
    """Turn an OSError that nothing else has caught into a MachineError, at the edge of the package."""
    try:
        yield
    except OSError as error:
        location = "" if error.filename is None else f" at {os.fsdecode(error.filename)}"
        remedy = "raise it" if error.errno in TOO_MANY else "look after the disk"
        raise MachineError(f"the system failed{location}: {reason(error)}; {remedy}, and run it again") from error
    except ImportError as error:
        problem = import_problem(error)
        if problem is None:
            raise
        raise MachineError(problem) from error


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether a path exists, as a link without a target does too; OSError if that cannot be determined."""
    try:
        os.lstat(path)
    except ValueError:  # a name with a NUL in it
        return False
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise
    return True


def free_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def _explain(error: OSError, path: Path, needed: int | None, remedy: str) -> str:
    text = f"cannot write {path}: {reason(error)}"
    if needed is not None:
        text += f"; {needed} bytes were needed"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            text += f", {free_bytes(path.parent)} bytes are free there"
        return f"{text}; free some space, or {remedy}"
    if error.errno == errno.EFBIG:
        return text + "; a file-size limit is in force (ulimit -f), raise it or use " + option("max_shard_size")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{text}; {remedy}"
    return text


def hold(fd: int) -> bool:
    """Lock an open file for this process until it is closed; False if another process holds the lock. On a filesystem
    without locks, nothing is locked."""
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
