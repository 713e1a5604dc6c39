"""A file without a name, for bytes that a run needs again and that memory is too dear for."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path


class ScratchFile:
    """An empty file on the filesystem of `directory`; it is gone when it is closed, or when the process ends.

    Threads may read and write at once, each its own range. Every call raises OSError as it comes.
    """

    def __init__(self, directory: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - open longer than a block

    def write(self, view: memoryview, offset: int) -> None:
        """Write the whole of `view` at `offset`."""
        done = 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], offset + done)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset`."""
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, f"a scratch file ends at byte {offset + done}")
            done += count

    def close(self) -> None:
        self._file.close()
