"""Threads that draw work in order: what they share, how they wait, and how the first failure ends all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from hsa.system.threads import supervise

T = TypeVar("T")


class Stopped(Exception):
    """Another thread failed; this one has nothing to add."""


class Schedule(Generic[T]):
    """Work that threads draw one after another, in order.

    A thread may wait for work that was drawn before its own, and for no other, so that no circle of waiting threads can
    arise. `changed` guards what the threads share, and is notified where something that others wait for is done.
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
        """Have every item worked on. `work` is called once in each thread, and gives what does an item there; `watch`
        is called now and then from this thread.

        `reserve` takes what an item needs of a shared budget before the next thread may draw, and gives what releases
        it: who waits for room holds none that another needs. Raises the first failure.
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
        """Raise Stopped where another thread failed."""
        if self.failure is not None:
            raise Stopped

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready`; the caller holds `changed`. Raises Stopped where another thread failed."""
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
    """Nothing was reserved."""
