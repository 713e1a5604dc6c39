"""Heartbeats, by which a run of a shared search shows that it is still working on a trial.

Optuna sends them in `Study.optimize`. A search calls `ask` and `tell` itself, so it also sends heartbeats itself, from
a thread.
"""

from __future__ import annotations

import threading
from typing import Any

INTERVAL = 10
"""Seconds between two heartbeats."""

GRACE = 40
"""Seconds without a heartbeat after which the run of a trial is considered lost."""


class Heartbeats:
    """Sends heartbeats for the trials of this run, by their ids in the storage, every `interval` seconds.

    Example:
        >>> heartbeats = Heartbeats(storage, INTERVAL)  # doctest: +SKIP
        >>> heartbeats.begin(7)  # doctest: +SKIP
        >>> heartbeats.end(7)  # doctest: +SKIP
    """

    def __init__(self, storage: Any, interval: float) -> None:
        self._storage, self._interval = storage, interval
        self._trials: set[int] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True, name="hsa search heartbeats")
        self._thread.start()

    def begin(self, trial: int) -> None:
        """Start sending heartbeats for a trial."""
        with self._lock:
            self._trials.add(trial)
        self.beat(trial)

    def end(self, trial: int) -> None:
        """Stop sending heartbeats for a trial."""
        with self._lock:
            self._trials.discard(trial)

    def beat(self, trial: int) -> None:
        """Send one heartbeat."""
        self._storage.record_heartbeat(trial)

    def close(self) -> None:
        """End the thread. It is abandoned if it is waiting for a database that does not answer."""
        self._ended.set()
        self._thread.join(timeout=5.0)

    def _send(self) -> None:
        while not self._ended.wait(self._interval):
            with self._lock:
                trials = sorted(self._trials)
            for trial in trials:
                try:
                    self.beat(trial)
                except Exception:  # the storage is unreachable; if that lasts, the next write reports it
                    break
