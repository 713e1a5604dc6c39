"""Where the tasks of a search are done: in this process, or by workers that are dispatched here.

A worker that is lost, by the end of its process or of its machine, loses no task: another gets it.
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
"""How many workers may be lost with one task until the search ends; and, for each worker, before any is ready."""

Known = tuple[str, Any]
"""The digest of some weights, and the texts or the score of a model that has them."""


class Pool(Protocol):
    """Does tasks, `size` of them at a time, on devices of one kind (`cpu`, `cuda:0`, ...)."""

    size: int

    @property
    def device(self) -> str:
        """What the workers compute on; known as soon as one is ready, for which this waits."""

    def submit(self, task: Task) -> int:
        """Let a task be done; the number that its result is given with."""

    def collect(self, timeout: float | None = None) -> list[tuple[int, Any]]:
        """Results by the numbers of their tasks: at least one, unless none is left or `timeout` seconds have passed.

        Raises what a task raises, and MachineError where workers are lost again and again.
        """

    def add_cached(self, known: Known) -> None:
        """Let all workers know what a model with some weights has come to, so that none scores these again."""

    def close(self) -> None:
        """End all workers; what they do is lost."""


def run_all(pool: Pool, tasks: Sequence[Task]) -> list[Any]:
    """The results of tasks, in their order. Raises as `Pool.collect`."""
    numbers = [pool.submit(task) for task in tasks]
    results: dict[int, Any] = {}
    while len(results) < len(numbers):
        results.update(pool.collect())
    return [results[number] for number in numbers]


class ThisProcess:
    """Does one task after another in this process. Raises what opening the setup raises.

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
"""What a kind of worker is known by."""


@dataclass(frozen=True)
class Event(Generic[Handle]):
    """What became of a worker: it is `ready` (`value` is its device), has `done` its task (the result), its task has
    `raised` (the exception), or it is `lost` (a text that says how)."""

    worker: Handle
    what: Literal["ready", "done", "raised", "lost"]
    value: Any = None


@dataclass
class _Sent:
    """A task under way, and how many workers were lost with it."""

    number: int
    task: Task
    losses: int = 0


@dataclass
class _State:
    """What the pool knows of a worker: its task, and how many of the cached results it was sent."""

    sent: _Sent | None = None
    ready: bool = False
    sent_cached: int = 0


@dataclass
class WorkerPool(ABC, Generic[Handle]):
    """A pool of workers that are elsewhere. What a kind of worker does is said by the four abstract methods."""

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
        """Begin a worker, which tells when it is ready."""

    @abstractmethod
    def send(self, worker: Handle, task: Task, cached: Sequence[Known]) -> None:
        """Give a task to a worker that has none, with the cached results that it lacks."""

    @abstractmethod
    def events(self, workers: Sequence[Handle], timeout: float | None) -> list[Event[Handle]]:
        """What became of workers: at least one event, unless `timeout` seconds have passed."""

    @abstractmethod
    def end_worker(self, worker: Handle) -> None:
        """End a worker, whatever it does."""

    def start(self) -> None:
        """Begin all workers."""
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
        """Begin another worker in the place of one that is lost, and let its task be done first."""
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
