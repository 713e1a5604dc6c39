"""Executors for the tasks of a search: this process, or workers that get their tasks from here.

If a worker is lost because its process or its machine stops, its task is not lost: another worker gets it.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from hsa.errors import MachineError
from hsa.searches.evaluators import Evaluator
from hsa.searches.setups import Setup
from hsa.searches.tasks import Task

MOST_LOSSES = 3
"""Number of workers lost with one task at which the search ends; also, per worker, those lost before any is ready."""

Known = tuple[str, Any]
"""The digest of some weights, and the texts or the score of a model with these weights."""


class Pool(Protocol):
    """Executes tasks, `size` of them at a time, on devices of one kind (`cpu`, `cuda:0`, ...)."""

    size: int

    @property
    def device(self) -> str:
        """The device of the workers. It is known once a worker is ready, and this waits for one."""

    def submit(self, task: Task) -> int:
        """Submit a task. Returns the number under which its result is returned."""

    def collect(self, timeout: float | None = None) -> list[tuple[int, Any]]:
        """Results by the numbers of their tasks: at least one, unless no task is left or `timeout` seconds have passed.

        Raises the errors of tasks, and MachineError if workers are lost repeatedly.
        """

    def add_cached(self, known: Known) -> None:
        """Share the known result of some weights with all workers, so that none scores them again."""

    def close(self) -> None:
        """End all workers; their current work is lost."""


def run_all(pool: Pool, tasks: Sequence[Task]) -> list[Any]:
    """The results of tasks, in their order. Raises the same errors as `Pool.collect`."""
    numbers = [pool.submit(task) for task in tasks]
    results: dict[int, Any] = {}
    while len(results) < len(numbers):
        results.update(pool.collect())
    return [results[number] for number in numbers]


class ThisProcess:
    """Executes one task after another in this process. Raises the errors of opening the setup.

    Example:
        >>> pool = ThisProcess(setup)  # doctest: +SKIP
        >>> run_all(pool, [Score(candidate, None)])  # doctest: +SKIP
    """

    def __init__(self, setup: Setup) -> None:
        self.size = 1
        self._evaluator: Evaluator = setup.open()
        self._waiting: deque[tuple[int, Task]] = deque()
        self._numbers = itertools.count()

    @property
    def device(self) -> str:
        return self._evaluator.device

    def submit(self, task: Task) -> int:
        number = next(self._numbers)
        self._waiting.append((number, task))
        return number

    def collect(self, timeout: float | None = None) -> list[tuple[int, Any]]:
        if not self._waiting:
            return []
        number, task = self._waiting.popleft()
        return [(number, task.run(self._evaluator))]

    def add_cached(self, known: Known) -> None:
        self._evaluator.add_cached(*known)

    def close(self) -> None:
        self._waiting.clear()


Handle = TypeVar("Handle")
"""The identifier of a kind of worker."""


@dataclass(frozen=True)
class Event(Generic[Handle]):
    """An event of a worker. It is `ready` (`value` is its device), has `done` its task (the result), its task has
    `raised` (the exception), or it is `lost` (a text with the reason)."""

    worker: Handle
    what: Literal["ready", "done", "raised", "lost"]
    value: Any = None


@dataclass
class _Sent:
    """A task in progress, and the number of workers lost with it."""

    number: int
    task: Task
    losses: int = 0


@dataclass
class _State:
    """The pool's state of a worker: its task, and the number of cached results sent to it."""

    sent: _Sent | None = None
    ready: bool = False
    sent_cached: int = 0


@dataclass
class WorkerPool(ABC, Generic[Handle]):
    """A pool of workers outside this process. The four abstract methods define a kind of worker."""

    size: int
    most_losses: int = MOST_LOSSES
    _workers: dict[Handle, _State] = field(default_factory=dict)
    _queue: deque[_Sent] = field(default_factory=deque)
    _results: list[tuple[int, Any]] = field(default_factory=list)
    _cached: list[Known] = field(default_factory=list)
    _numbers: Any = field(default_factory=itertools.count)
    _lost_unready: int = 0
    _device: str = ""

    @abstractmethod
    def start_worker(self) -> Handle:
        """Start a worker, which reports when it is ready."""

    @abstractmethod
    def send(self, worker: Handle, task: Task, cached: Sequence[Known]) -> None:
        """Send a task to an idle worker, with the cached results that it lacks."""

    @abstractmethod
    def events(self, workers: Sequence[Handle], timeout: float | None) -> list[Event[Handle]]:
        """The events of workers: at least one, unless `timeout` seconds have passed."""

    @abstractmethod
    def end_worker(self, worker: Handle) -> None:
        """End a worker, even in the middle of a task."""

    def start(self) -> None:
        """Start all workers."""
        while len(self._workers) < self.size:
            self._workers[self.start_worker()] = _State()

    @property
    def device(self) -> str:
        while not self._device:
            self._handle_events(None)
        return self._device

    def submit(self, task: Task) -> int:
        sent = _Sent(next(self._numbers), task)
        self._queue.append(sent)
        self._dispatch()
        return sent.number

    def collect(self, timeout: float | None = None) -> list[tuple[int, Any]]:
        end = None if timeout is None else time.monotonic() + timeout
        while not self._results and (self._queue or any(state.sent for state in self._workers.values())):
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                break
            self._handle_events(left)
        found, self._results = self._results, []
        return found

    def add_cached(self, known: Known) -> None:
        self._cached.append(known)

    def close(self) -> None:
        for worker in self._workers:
            self.end_worker(worker)
        self._workers.clear()

    def _dispatch(self) -> None:
        for worker, state in self._workers.items():
            if state.ready and state.sent is None and self._queue:
                state.sent = self._queue.popleft()
                self.send(worker, state.sent.task, self._cached[state.sent_cached :])
                state.sent_cached = len(self._cached)

    def _handle_events(self, timeout: float | None) -> None:
        for event in self.events(list(self._workers), timeout):
            self._handle(event)
        self._dispatch()

    def _handle(self, event: Event[Handle]) -> None:
        state = self._workers[event.worker]
        if event.what == "ready":
            state.ready, self._device, self._lost_unready = True, event.value, 0
        elif event.what == "lost":
            self._replace(event.worker, event.value)
        elif event.what == "raised":
            raise event.value
        else:
            assert state.sent is not None
            self._results.append((state.sent.number, event.value))
            state.sent = None

    def _replace(self, worker: Handle, how: str) -> None:
        """Start a new worker in place of a lost one, and put its task at the front of the queue."""
        state = self._workers.pop(worker)
        self.end_worker(worker)
        self._lost_unready += not state.ready
        if state.sent is not None:
            state.sent.losses += 1
            self._queue.appendleft(state.sent)
            if state.sent.losses >= self.most_losses:
                raise MachineError(
                    f"{state.sent.losses} workers stopped while they worked on the same task; the last error: {how}; "
                    f"finished trials are kept"
                )
        elif self._lost_unready >= self.most_losses * self.size:
            raise MachineError(
                f"{self._lost_unready} workers stopped before they were ready; the last error: {how}; finished trials "
                f"are kept"
            )
        self._workers[self.start_worker()] = _State()
