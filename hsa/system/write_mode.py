"""Choose the faster of two ways to write: past the page cache, or through it.

With fsync the disk sets the pace, so direct writes are best where they are available. Without fsync, a slow disk is
best left to the page cache. A fast disk accepts bytes sooner than the kernel finds free pages for them, and the cache
slows down once it is full. So both modes are timed while they write, and the faster one is used from then on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

WriteMode = Literal["direct", "cached"]

WINDOW_BYTES = 64 << 20
"""Bytes that are written before the speed of a mode is measured."""

RECHECK_WINDOWS = 32
"""Windows in one mode after which the other one is tried again: a trial costs at most a few percent."""


@dataclass
class _Timing:
    """One mode's window: bytes written, seconds in which at least one write was under way, and the last speed."""

    under_way: int = 0
    since: float = 0.0
    busy: float = 0.0
    written: int = 0
    speed: float | None = None

    def begin(self, now: float) -> None:
        if not self.under_way:
            self.since = now
        self.under_way += 1

    def end(self, now: float, nbytes: int) -> None:
        self.under_way -= 1
        self.busy += now - self.since
        self.since = now
        self.written += nbytes

    def close(self) -> None:
        self.speed = self.written / self.busy if self.busy > 0.0 else float("inf")
        self.busy, self.written = 0.0, 0


@dataclass
class WriteModeChooser:
    """Chooses the mode of every write of a run; its threads share it. `clock` returns seconds."""

    clock: Callable[[], float] = time.monotonic
    current: WriteMode = "direct"
    _timings: dict[WriteMode, _Timing] = field(default_factory=lambda: {"direct": _Timing(), "cached": _Timing()})
    _windows: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def write(self, nbytes: int) -> Iterator[WriteMode]:
        """The mode in which to write `nbytes`; the time inside the block is measured."""
        with self._lock:
            mode = self.current
            timing = self._timings[mode]
            timing.begin(self.clock())
        try:
            yield mode
        finally:
            with self._lock:
                timing.end(self.clock(), nbytes)
                if mode == self.current and timing.written >= WINDOW_BYTES:
                    timing.close()
                    self._choose()

    def _choose(self) -> None:
        other: WriteMode = "cached" if self.current == "direct" else "direct"
        speed, other_speed = self._timings[self.current].speed, self._timings[other].speed
        self._windows += 1
        if other_speed is None or self._windows > RECHECK_WINDOWS or (speed is not None and other_speed > speed):
            self.current, self._windows = other, 0
