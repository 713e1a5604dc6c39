"""Check and write the files of an inspection: CSV, pictures and pages. Files are written atomically."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hsa.errors import DestinationError
from hsa.option_names import option
from hsa.system import fsio
from hsa.system.destinations import refuse_inside_output

PathLike = str | os.PathLike[str]


def check_file(path: PathLike, protected: Sequence[PathLike], *, overwrite: bool) -> Path:
    """Return the absolute path of a file to write. Nothing is written into `protected`, the sources and outputs.

    Raises DestinationError if the path exists (without `overwrite`) or is no file, if its directory is missing, or if
    it is inside a source or an output.
    """
    expanded = Path(path).expanduser()
    try:
        parent = expanded.parent.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise DestinationError(
            f"{expanded} cannot be written: its directory {expanded.parent} is missing; make it"
        ) from error
    absolute = parent / expanded.name
    if not expanded.name or absolute.is_dir():
        raise DestinationError(f"{expanded} is a directory; give the name of a file")
    if os.path.lexists(absolute) and (not overwrite or not absolute.is_file()):
        raise DestinationError(
            f"{expanded} exists; give another name, or {option('overwrite', True)} to replace a file"
        )
    resolved = absolute.resolve()
    for folder in protected:
        with suppress(OSError, RuntimeError):
            if resolved.is_relative_to(Path(folder).expanduser().resolve()):
                raise DestinationError(
                    f"{expanded} lies in {folder}, which is not written to; choose another directory"
                )
    refuse_inside_output(resolved, str(expanded))
    return resolved


def write_file(path: Path, data: bytes) -> None:
    """Write a file atomically: to a temporary file in the same directory, which is then renamed. Raises
    MachineError."""
    with fsio.map_write_errors(path, len(data)):
        fd, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
        try:
            with os.fdopen(fd, "wb") as file:
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                file.write(data)
                file.flush()
                fsio.sync(file.fileno())
            fsio.rename(Path(name), path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise


def _umask() -> int:
    """This process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
