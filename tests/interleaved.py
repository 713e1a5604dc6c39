"""Programs of an interpreted kernel that run beside each other, as on a GPU: Triton's interpreter runs one by one.

Every program has a thread of its own, of which one at a time has the turn. It passes on before every access to memory
that programs share with each other (atomics, volatile loads, stores); to whom, a seed says, so that a failure can be
repeated. Volatile loads may also return a word's first value, 0, after another program has changed it: no order holds
between the words of a GPU's memory.
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
        pause: the chance at each turn that the program is not heard of for up to `longest` turns.
        stale: the chance of every word that a volatile load reads to be read as 0.
        seed: of all that is drawn.
    """

    resident: int
    pause: float = 0.0
    longest: int = 2000
    stale: float = 0.0
    seed: int = 0


class _Stopped(BaseException):
    """Ends the thread of a program; no Exception, which the interpreter catches."""


@dataclass(eq=False)
class _Program:
    number: int
    thread: threading.Thread | None = None
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    wakes: int = 0
    over: bool = False
    error: BaseException | None = None


class Interleaved:
    """One launch: `run` returns when all programs have ended, and raises what one of them raised."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.turns = 0
        self._random = random.Random(schedule.seed)
        self._draw = np.random.default_rng(schedule.seed)
        self._passed = threading.Semaphore(0)
        self._current: _Program | None = None
        self._stopping = False

    def run(self, count: int, body: Callable[[], object]) -> None:
        running: list[_Program] = []
        begun = 0
        try:
            while begun < count or running:
                while begun < count and len(running) < self.schedule.resident:
                    running.append(self._begin(begun, body))
                    begun += 1
                if self.turns > MOST_TURNS:
                    raise AssertionError(f"no end after {self.turns} turns of {self.schedule}")
                program = self._next(running)
                self._give(program)
                if program.over:
                    running.remove(program)
                if program.error is not None:
                    raise program.error
        finally:
            self._stopping = True
            for program in running:
                self._give(program)

    def _begin(self, number: int, body: Callable[[], object]) -> _Program:
        program = _Program(number)

        def work() -> None:
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

        program.thread = threading.Thread(target=work, daemon=True)
        program.thread.start()
        return program

    def _next(self, running: list[_Program]) -> _Program:
        self.turns += 1
        awake = [program for program in running if program.wakes <= self.turns]
        program = self._random.choice(awake or running)
        if self._random.random() < self.schedule.pause:
            program.wakes = self.turns + self._random.randrange(self.schedule.longest)
        return program

    def _give(self, program: _Program) -> None:
        self._current = program
        program.turn.release()
        self._passed.acquire()

    @property
    def current(self) -> _Program:
        """The program whose turn it is."""
        assert self._current is not None
        return self._current

    def step(self) -> None:
        """Called by a program before it touches what is shared."""
        program = self.current
        self._passed.release()
        program.turn.acquire()
        if self._stopping:
            raise _Stopped

    def forget(self, found: Any, exists: Any) -> Any:
        """What a volatile load may return in place of `found` (the handle of words that were 0 at the launch)."""
        if self.schedule.stale:
            found.data[exists.data & (self._draw.random(found.data.shape) < self.schedule.stale)] = 0
        return found


@contextmanager
def interleaved(kernel: Any, schedule: Schedule) -> Iterator[list[Interleaved]]:
    """Meanwhile every launch of an interpreted kernel runs by that schedule; yields the list of its launches."""
    launches: list[Interleaved] = []
    interpreted = kernel.rewrite()

    @functools.wraps(interpreted)
    def programs(**arguments: Any) -> None:
        if interpreter_builder.grid_idx != (0, 0, 0):
            return
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
    """Have the interpreter call `launch` at every access to shared memory."""
    rmw, load, store = (
        getattr(interpreter_builder, f"create_{name}") for name in ("atomic_rmw", "masked_load", "masked_store")
    )

    def atomic_rmw(*arguments: Any) -> Any:
        launch.step()
        return rmw(*arguments)

    def masked_load(places: Any, mask: Any, other: Any, cache: Any, eviction: Any, volatile: bool) -> Any:
        if not volatile:
            return load(places, mask, other, cache, eviction, volatile)
        launch.step()
        return launch.forget(load(places, mask, other, cache, eviction, volatile), mask)

    def masked_store(*arguments: Any) -> Any:
        launch.step()
        return store(*arguments)

    def program_id(axis: int) -> Any:
        return TensorHandle(np.array([launch.current.number if axis == 0 else 0], dtype=np.int32), tl.int32)

    patch.setattr(interpreter_builder, "create_atomic_rmw", atomic_rmw)
    patch.setattr(interpreter_builder, "create_masked_load", masked_load)
    patch.setattr(interpreter_builder, "create_masked_store", masked_store)
    patch.setattr(interpreter_builder, "create_get_program_id", program_id)
