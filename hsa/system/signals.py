"""Defer the signals that end a run while an interruption would leave something behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def deferred() -> Iterator[None]:
    """Record ending signals inside the block instead of handling them, then handle the first.

    Handlers are swapped, and signals are not masked, since a signal may reach any thread of the process. Only the main
    thread runs handlers, so in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    handlers = {number: handler for number in END_SIGNALS if callable(handler := signal.getsignal(number))}
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: pending.append((number, frame)))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for first, frame in pending[:1]:
        handlers[signal.Signals(first)](first, frame)
