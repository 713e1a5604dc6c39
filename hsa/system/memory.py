"""Sample the peak memory of this process and its children: RssAnon plus RssShmem.

Pages of mapped files are left out, since the kernel can drop them at any time. Source: proc(5).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_FIELDS = (b"RssAnon:", b"RssShmem:")


class PeakMemory:
    """The highest sum seen so far, in bytes; 0 if the system does not report it."""

    def __init__(self, interval: float = 0.02) -> None:
        self.peak = 0
        self._interval, self._next = interval, 0.0
        self.sample()

    def sample(self) -> None:
        """Take a sample, unless the last one was taken a moment ago."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._interval
            self.peak = max(self.peak, sum(map(resident_bytes, process_tree(os.getpid()))))


def resident_bytes(pid: int) -> int:
    """RssAnon plus RssShmem of a process in bytes; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_bytes().splitlines()  # a process name may contain any bytes
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_FIELDS))


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    pids, pending = [], [pid]
    while pending:
        current = pending.pop()
        pids.append(current)
        with suppress(OSError):  # a process or a thread that has just ended
            for thread in os.listdir(f"/proc/{current}/task"):
                with suppress(OSError):
                    children = Path(f"/proc/{current}/task/{thread}/children").read_text()
                    pending += [int(child) for child in children.split()]
    return pids
