"""Open files that a manifest or a user names. Only regular files are opened, as a pipe or a device could block."""

from __future__ import annotations

import os
import stat

from hsa.errors import DataError, HsaError, MachineError, shown
from hsa.system.descriptors import open_file, reason
from hsa.system.fsio import MACHINE_ERRNOS
from hsa.system.types import PathLike


def open_regular(path: PathLike, what: str, error: type[HsaError] = DataError) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    Raises `error` if there is no such file or it is not a regular file, and MachineError if the machine fails.

    Example:
        >>> os.close(open_regular("/etc/hostname", "a manifest"))
    """
    try:
        descriptor = open_file(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
    except OSError as problem:
        kind = MachineError if problem.errno in MACHINE_ERRNOS else error
        raise kind(f"{_name(path)}: {what} cannot be opened: {reason(problem)}") from problem
    except ValueError as problem:  # a NUL byte in a name
        raise error(f"{_name(path)}: {what} cannot be opened: {problem}") from problem
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise error(f"{_name(path)} is {kind_of(mode)}, expected {what} that is a regular file")
    return descriptor


def kind_of(mode: int) -> str:
    """The kind of a file that is not a regular file, from its mode.

    Example:
        >>> kind_of(os.stat("/dev/null").st_mode)
        'a device'
    """
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        return "a device"
    return "a socket" if stat.S_ISSOCK(mode) else "no regular file"


def _name(path: PathLike) -> str:
    return shown(os.fspath(path), 300)[1:-1]
