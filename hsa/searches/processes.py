"""Workers of a search that are processes on this machine, each with its own sources, model and features."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from hsa.errors import HsaError, MachineError, RequestError
from hsa.evaluation.decoding import gpus
from hsa.option_names import Spelling, current_spelling, spelled
from hsa.searches.pools import Event, Known, WorkerPool
from hsa.searches.setups import OwnSetup, Setup, for_worker, use_threads
from hsa.searches.tasks import Task
from hsa.system.allocator import keep_freed_memory
from hsa.system.threads import out_of_memory, usable_cores

ENDING = 5.0
"""Seconds that a process may take to end after it has closed its pipe."""


@dataclass(frozen=True, eq=False)
class _Process:
    """A worker: its process, this side's end of the pipe to it, and its device."""

    process: Any
    pipe: Connection
    device: str


class ProcessPool(WorkerPool[_Process]):
    """Workers on this machine, `count` of them, which share its cores. GPUs are assigned to them in turn.

    Example:
        >>> pool = ProcessPool(setup, 2)  # doctest: +SKIP
    """

    def __init__(self, setup: Setup, count: int) -> None:
        super().__init__(count)
        self._setup = setup
        self._threads = max(1, usable_cores() // count)
        self._context = multiprocessing.get_context("spawn")
        self._spelling = current_spelling()
        self._devices = _devices(setup.options.decoding.device, count)
        self._keeps_main = isinstance(setup, OwnSetup) and _is_of_main(setup.score)
        if isinstance(setup, OwnSetup):
            _check_sendable(setup.score)
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start_worker(self) -> _Process:
        device = self._devices.pop(0)
        setup = for_worker(self._setup, self._threads, device)
        ours, theirs = self._context.Pipe()
        arguments = (setup, theirs, self._threads, self._spelling)
        process = self._context.Process(target=_work, args=arguments, daemon=True, name="hsa search worker")
        with _without_main(keep=self._keeps_main):
            process.start()
        theirs.close()
        return _Process(process, ours, device)

    def send(self, worker: _Process, task: Task, cached: Sequence[Known]) -> None:
        try:
            worker.pipe.send((cached, task))
        except OSError:  # it has ended; the next events report that
            return

    def events(self, workers: Sequence[_Process], timeout: float | None) -> list[Event[_Process]]:
        by_pipe = {worker.pipe: worker for worker in workers}
        by_end = {worker.process.sentinel: worker for worker in workers}
        found: dict[_Process, Event[_Process]] = {}
        for each in wait([*by_pipe, *by_end], timeout):
            worker = by_pipe[each] if isinstance(each, Connection) else by_end[each]
            if worker not in found:
                found[worker] = self._event(worker)
        return list(found.values())

    def end_worker(self, worker: _Process) -> None:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        self._devices.append(worker.device)

    def _event(self, worker: _Process) -> Event[_Process]:
        try:
            if worker.pipe.poll():
                what, value = worker.pipe.recv()
                return Event(worker, what, value)
        except (EOFError, OSError):
            pass
        worker.process.join(ENDING)
        code = worker.process.exitcode
        how = f"signal {-code} ended its process" if code and code < 0 else f"its process ended with exit code {code}"
        return Event(worker, "lost", how)


def _devices(device: str, count: int) -> list[str]:
    """The devices of `count` workers: GPUs in turn if no single one is named."""
    found = gpus() if device in ("auto", "cuda") else 0
    return [f"cuda:{number % found}" if found else device for number in range(count)]


def _is_of_main(score: Any) -> bool:
    return getattr(score, "__module__", None) == "__main__"


def _check_sendable(score: Any) -> None:
    """Raise RequestError if the caller's function cannot be sent to another process."""
    reason = "" if getattr(sys.modules["__main__"], "__file__", None) or not _is_of_main(score) else "it is in no file"
    try:
        pickle.dumps(score)
    except Exception as error:  # pickle raises errors of many kinds
        reason = str(error)
    if reason:
        raise RequestError(
            f"evaluate cannot be sent to worker processes: {reason}; define it at the top of a module, or search with "
            f"one worker"
        )


@contextmanager
def _without_main(*, keep: bool) -> Iterator[None]:
    """Prevent new processes from running the caller's script again, so that it needs no `if __name__ == "__main__"`.
    With `keep` they run it, as the caller's function is defined there."""
    main = sys.modules["__main__"]
    if not keep:
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# --- in the worker's process ----------------------------------------------------------------------------------------


def _work(setup: Setup, pipe: Connection, threads: int, spelling: Spelling) -> None:
    """Load the evaluator of the setup, then run tasks until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the search ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_threads(threads)
    keep_freed_memory()
    with spelled(spelling):
        try:
            evaluator = setup.open()
            pipe.send(("ready", evaluator.device))
            while True:
                cached, task = pipe.recv()
                for known in cached:
                    evaluator.add_cached(*known)
                pipe.send(("done", task.run(evaluator)))
        except (EOFError, BrokenPipeError):
            return
        except Exception as error:
            with suppress(OSError):
                pipe.send(("raised", portable(error)))


def _end_with_parent() -> None:
    """End this process when the search does, even in the middle of a task."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def portable(error: Exception) -> Exception:
    """Convert an error so that it can be sent. Errors of hsa stay as they are, those of the machine become one of hsa,
    and others become their text."""
    if isinstance(error, HsaError):
        return error
    if isinstance(error, (OSError, MemoryError)):
        return MachineError(str(error) or out_of_memory())
    return RuntimeError(f"in a worker of the search:\n{''.join(traceback.format_exception(error))}")
