"""Programs of an interpreted kernel that run beside each other, as on a GPU: Triton's interpreter runs one by one.

Every program has a thread of its own, of which one at a time has the turn. It passes on before every access to memory;
to whom, a seed says, so that a failure can be repeated.

What a GPU does not promise is not granted either: a plain load of a word that another program wrote is refused, for it
may miss it; and a volatile load may return 0, what every word that programs tell each other is at the launch, for a
word that has long changed. Atomics are never late.
"""

from __future__ import annotations

import functools
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder

MOST_TURNS = 20_000
"""Turns after which a launch counts as one that never ends."""


@dataclass(frozen=True)
class Schedule:
    """How programs take turns.

    Attributes:
        resident: how many programs have begun and not ended at any time; the next begins when one ends.
        pause: the chance at each turn that it is the program's last for up to `longest` turns, or until all pause.
        stale: the chance of every word that a volatile load reads to be read as 0.
        seed: of all that is drawn.
    """

    resident: int
    pause: float = 0.0
    longest: int = 200
    stale: float = 0.0
    seed: int = 0


class _Stopped(BaseException):
    """Ends the thread of a program; no Exception, which the interpreter catches."""


def _closed() -> threading.Lock:
    """A lock that whoever waits for it gets when another thread opens it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(eq=False)
class _Program:
    number: int
    thread: threading.Thread
    turn: threading.Lock = field(default_factory=_closed)
    wakes: int = 0
    over: bool = False
    error: BaseException | None = None


class Interleaved:
    """One launch: `run` returns when all programs have ended, and raises what one of them raised."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.turns = 0
        self._clock = 0
        self._random = random.Random(schedule.seed)
        self._draw = np.random.default_rng(schedule.seed)
        self._passed = _closed()
        self._given = False
        self._stopping = False
        self._here = threading.local()
        self._writers: dict[int, int] = {}

    def run(self, count: int, body: Callable[[], object]) -> None:
        running: list[_Program] = []
        begun = 0
        try:
            while begun < count or running:
                while begun < count and len(running) < self.schedule.resident:
                    running.append(self._begin(begun, body))
                    begun += 1
                self.turns += 1
                if self.turns > MOST_TURNS:
                    raise AssertionError(f"no end after {MOST_TURNS} turns of {self.schedule}")
                program = self._next(running)
                self._give(program)
                if program.over:
                    running.remove(program)
                    program.thread.join()
                if program.error is not None:
                    raise program.error
        finally:
            self._stopping = True
            if self._given:
                self._take()
            for program in running:
                while not program.over:
                    self._give(program)
                program.thread.join()

    def _begin(self, number: int, body: Callable[[], object]) -> _Program:
        def work() -> None:
            self._here.program = program
            program.turn.acquire()
            try:
                if not self._stopping:
                    body()
            except _Stopped:
                pass
            except BaseException as error:
                # Raised again where the launch is.
                program.error = error
            program.over = True
            self._passed.release()

        program = _Program(number, threading.Thread(target=work, daemon=True))
        program.thread.start()
        return program

    def _next(self, running: list[_Program]) -> _Program:
        self._clock = max(self._clock + 1, min(program.wakes for program in running))
        program = self._random.choice([program for program in running if program.wakes <= self._clock])
        if self._random.random() < self.schedule.pause:
            program.wakes = self._clock + 1 + self._random.randrange(self.schedule.longest)
        return program

    def _give(self, program: _Program) -> None:
        self._given = True
        program.turn.release()
        self._take()

    def _take(self) -> None:
        self._passed.acquire()
        self._given = False

    @property
    def number(self) -> int:
        """Of the program that asks."""
        number: int = self._here.program.number
        return number

    def step(self) -> None:
        """Called by a program before it touches memory."""
        self._passed.release()
        self._here.program.turn.acquire()
        if self._stopping:
            raise _Stopped

    def written(self, places: Any, changed: Any) -> None:
        """Called by a program that writes; places: addresses, of which those that are `changed` count."""
        self._writers.update(dict.fromkeys(places.data[changed].tolist(), self.number))

    def read_plainly(self, places: Any, mask: Any) -> None:
        """Called by a program before a load that may miss what others write; raises if others did."""
        own = self.number
        for place in places.data[mask.data].tolist():
            writer = self._writers.get(place, own)
            if writer != own:
                raise AssertionError(f"program {own} reads plainly what program {writer} has written")

    def late(self, found: Any, mask: Any) -> Any:
        """What a volatile load may return in place of `found` (the handle of words that were 0 at the launch)."""
        if self.schedule.stale:
            found.data[mask.data & (self._draw.random(found.data.shape) < self.schedule.stale)] = 0
        return found


@contextmanager
def interleaved(kernel: Any, schedule: Schedule) -> Iterator[list[Interleaved]]:
    """Meanwhile every launch of that interpreted kernel runs by that schedule; yields the list of its launches."""
    launches: list[Interleaved] = []
    interpreted = kernel.rewrite()

    @functools.wraps(interpreted)
    def programs(**arguments: Any) -> None:
        if interpreter_builder.grid_idx != (0, 0, 0):
            return
        assert interpreter_builder.grid_dim[1:] == (1, 1)
        launch = Interleaved(schedule)
        launches.append(launch)
        with pytest.MonkeyPatch.context() as patch:
            _watch(patch, launch)
            launch.run(interpreter_builder.grid_dim[0], lambda: interpreted(**arguments))

    # The interpreter reads a kernel's parameters from its signature.
    programs.__signature__ = inspect.signature(interpreted)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernel.rewritten_fn, kernel.fn, programs)
        yield launches


def _watch(patch: pytest.MonkeyPatch, launch: Interleaved) -> None:
    """Have the interpreter call `launch` at every access to memory."""
    rmw, load, store = (
        getattr(interpreter_builder, f"create_{name}") for name in ("atomic_rmw", "masked_load", "masked_store")
    )

    def atomic_rmw(operation: Any, places: Any, value: Any, mask: Any, *order: Any) -> Any:
        launch.step()
        found = rmw(operation, places, value, mask, *order)
        launch.written(places, mask.data & (value.data != 0))
        return found

    def atomic_cas(*_arguments: Any) -> Any:
        raise AssertionError("no kernel here compares and swaps: give it a turn in interleaved._watch first")

    def masked_load(places: Any, mask: Any, other: Any, cache: Any, eviction: Any, volatile: bool) -> Any:
        launch.step()
        if not volatile:
            launch.read_plainly(places, mask)
        found = load(places, mask, other, cache, eviction, volatile)
        return launch.late(found, mask) if volatile else found

    def masked_store(places: Any, value: Any, mask: Any, *hints: Any) -> Any:
        launch.step()
        launch.written(places, mask.data)
        return store(places, value, mask, *hints)

    def program_id(axis: int) -> Any:
        return TensorHandle(np.array([launch.number if axis == 0 else 0], dtype=np.int32), tl.int32)

    patch.setattr(interpreter_builder, "create_atomic_rmw", atomic_rmw)
    patch.setattr(interpreter_builder, "create_atomic_cas", atomic_cas)
    patch.setattr(interpreter_builder, "create_masked_load", masked_load)
    patch.setattr(interpreter_builder, "create_masked_store", masked_store)
    patch.setattr(interpreter_builder, "create_get_program_id", program_id)
