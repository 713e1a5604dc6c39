"""Threads that draw work in order: their shared state, how they wait, and how the first failure stops them all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from hsa.system.threads import supervise

T = TypeVar("T")


class Stopped(Exception):
    """Another thread failed; this one has nothing to add."""


class Schedule(Generic[T]):
    """Work items that threads draw in order.

    A thread may only wait for work that was drawn before its own, so the threads cannot deadlock. `changed` guards the
    shared state, and is notified when something that others wait for is done.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self._items: Iterator[T] = iter(())
        self._drawing = threading.Lock()

    def run(
        self,
        items: Iterator[T],
        threads: int,
        work: Callable[[], Callable[[T], None]],
        watch: Callable[[], None],
        reserve: Callable[[T], Callable[[], None]] | None = None,
    ) -> None:
        """Process every item, and raise the first failure.

        `work` is called once in each thread, and returns the function that processes items there. `watch` is called now
        and then from this thread.

        `reserve` takes an item's share of a common budget before the next thread may draw, and returns a function that
        releases it. So a thread that waits for room holds none that another thread needs.
        """
        self._items = items

        def thread() -> None:
            try:
                do = work()
                while (drawn := self._draw(reserve)) is not None:
                    item, release = drawn
                    try:
                        do(item)
                    finally:
                        release()
            except Stopped:
                return
            except SystemExit as error:
                self.fail(RuntimeError(f"a method's code asked to end the program (SystemExit: {error})"))
            except BaseException as error:
                self.fail(error)

        supervise(threads, thread, self.fail, watch)
        if self.failure is not None:
            raise self.failure

    def fail(self, error: BaseException) -> None:
        """Stop all threads; the first failure is the one that is raised."""
        with self.changed:
            if self.failure is None:
                self.failure = error
            self.changed.notify_all()

    def check(self) -> None:
        """Raise Stopped if another thread failed."""
        if self.failure is not None:
            raise Stopped

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()` is true; the caller holds `changed`. Raises Stopped if another thread failed."""
        while not ready():
            self.check()
            self.changed.wait()
        self.check()

    def _draw(self, reserve: Callable[[T], Callable[[], None]] | None) -> tuple[T, Callable[[], None]] | None:
        with self._drawing:
            if self.failure is not None:
                return None
            item = next(self._items, None)
            if item is None:
                return None
            return item, _nothing if reserve is None else reserve(item)


def _nothing() -> None:
    """Release nothing, because nothing was reserved."""
