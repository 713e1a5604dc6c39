"""Threads that draw work in order: what is raised where they fail, who stops waiting, and what they reserve."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hsa.engine.schedule import Schedule, Stopped

THREADS = 4
PATIENCE = 20.0
"""Seconds after which a thread that should have gone on is a failure of the test."""


def nothing() -> None:
    """What is called now and then while threads work."""


def run(
    schedule: Schedule[int],
    work: Callable[[int], None],
    count: int = 40,
    threads: int = THREADS,
    reserve: Callable[[int], Callable[[], None]] | None = None,
    watch: Callable[[], None] = nothing,
) -> None:
    schedule.run(iter(range(count)), threads, lambda: work, watch, reserve)


@pytest.mark.parametrize("threads", [1, THREADS])
def test_every_item_is_worked_on_once_and_drawn_in_order(threads: int) -> None:
    drawn, done = list[int](), list[int]()

    def items() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            yield number

    workers = list[Callable[[int], None]]()

    def work() -> Callable[[int], None]:
        workers.append(done.append)
        return workers[-1]

    Schedule[int]().run(items(), threads, work, nothing)
    assert drawn == sorted(done) == list(range(100))
    assert len(workers) == threads


def test_the_first_failure_is_raised_and_nothing_is_drawn_after_it() -> None:
    schedule, done = Schedule[int](), list[int]()
    both = threading.Event()

    def work(number: int) -> None:
        done.append(number)
        if number == 0:
            assert both.wait(PATIENCE)
            raise KeyError("first")
        both.set()
        with schedule.changed:
            assert schedule.changed.wait_for(lambda: schedule.failure is not None, PATIENCE)
        raise ValueError("later")

    with pytest.raises(KeyError, match="first") as caught:
        run(schedule, work, threads=2)
    assert schedule.failure is caught.value
    assert sorted(done) == [0, 1]


def test_a_failure_of_the_items_and_one_at_the_start_are_raised() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        Schedule[int]().run(items(), THREADS, lambda: lambda number: None, nothing)

    def work() -> Callable[[int], None]:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        Schedule[int]().run(iter(range(3)), THREADS, work, nothing)


def test_threads_that_wait_stop_where_another_fails() -> None:
    schedule, ended = Schedule[int](), list[tuple[int, type[BaseException]]]()
    waiting = threading.Semaphore(0)

    def work(number: int) -> None:
        if number == THREADS - 1:
            for _ in range(THREADS - 1):
                assert waiting.acquire(timeout=PATIENCE)
            with schedule.changed:  # nobody has it who has not begun to wait
                pass
            raise OSError("the disk")
        try:
            with schedule.changed:
                waiting.release()
                schedule.wait(lambda: False)
        except BaseException as error:
            ended.append((number, type(error)))
            raise

    with pytest.raises(OSError, match="the disk"):
        run(schedule, work)
    assert sorted(ended) == [(number, Stopped) for number in range(THREADS - 1)]


def test_what_is_ready_when_another_has_failed_is_not_gone_on_with() -> None:
    schedule = Schedule[int]()
    schedule.check()
    with schedule.changed:
        schedule.wait(lambda: True)
    schedule.fail(ValueError("one"))
    schedule.fail(ValueError("two"))
    assert str(schedule.failure) == "one"
    with pytest.raises(Stopped):
        schedule.check()
    with schedule.changed, pytest.raises(Stopped):
        schedule.wait(lambda: True)


def test_waiting_ends_when_the_work_before_is_done() -> None:
    schedule, order = Schedule[int](), list[int]()

    def work(number: int) -> None:
        with schedule.changed:
            schedule.wait(lambda: len(order) == number)
            order.append(number)
            schedule.changed.notify_all()

    run(schedule, work)
    assert order == list(range(40))


def test_an_error_of_the_watch_stops_the_threads_and_goes_on() -> None:
    schedule = Schedule[int]()

    def work(number: int) -> None:
        with schedule.changed:
            schedule.wait(lambda: False)

    def watch() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(schedule, work, watch=watch)
    assert isinstance(schedule.failure, KeyboardInterrupt)


class Budget:
    """Room for some items at a time; `taken` and `released` in the order in which they were."""

    def __init__(self, room: int) -> None:
        self.changed = threading.Condition()
        self.room, self.free = room, room
        self.taken, self.released = list[int](), list[int]()

    def reserve(self, number: int) -> Callable[[], None]:
        with self.changed:
            assert self.changed.wait_for(lambda: self.free > 0, PATIENCE)
            self.free -= 1
            self.taken.append(number)

        def release() -> None:
            with self.changed:
                self.free += 1
                self.released.append(number)
                self.changed.notify_all()

        return release


@pytest.mark.parametrize("room", [1, 2, THREADS])
def test_what_is_reserved_is_released_once_the_item_is_done(room: int) -> None:
    """Even where each item waits for the one before it, which holds room already."""
    schedule, budget, order = Schedule[int](), Budget(room), list[int]()

    def work(number: int) -> None:
        assert number in budget.taken and number not in budget.released
        with schedule.changed:
            schedule.wait(lambda: len(order) == number)
            order.append(number)
            schedule.changed.notify_all()

    run(schedule, work, reserve=budget.reserve)
    assert budget.taken == order == list(range(40))
    assert sorted(budget.released) == order
    assert budget.free == room


@pytest.mark.parametrize("error", [ValueError("bad"), Stopped()])
def test_what_is_reserved_is_released_where_the_work_fails(error: Exception) -> None:
    schedule, budget = Schedule[int](), Budget(2)

    def work(number: int) -> None:
        if number >= 5:
            schedule.fail(ValueError("bad"))
            raise error

    with pytest.raises(ValueError, match="bad"):
        run(schedule, work, reserve=budget.reserve)
    assert sorted(budget.released) == budget.taken
    assert budget.free == 2
    assert len(budget.taken) < 40


def test_a_failure_to_reserve_is_raised() -> None:
    done = list[int]()

    def reserve(number: int) -> Callable[[], Any]:
        if number == 3:
            raise MemoryError("no room")
        return nothing

    with pytest.raises(MemoryError, match="no room"):
        run(Schedule[int](), done.append, reserve=reserve)
    assert sorted(done) == [0, 1, 2]
