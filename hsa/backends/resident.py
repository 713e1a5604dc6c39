"""Targets that stay in memory, measured once and written many times: on the CPU here, on a GPU in `triton`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from operator import attrgetter
from typing import Any, Protocol, TypeVar

import torch

from hsa.backends.base import NotFinite
from hsa.backends.cpu import CpuWorker
from hsa.backends.kept_values import KeptValues
from hsa.errors import MachineError, NonFiniteError
from hsa.methods.copied import COPIED
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorTask
from hsa.planning.equal_sources import all_equal, equal_pairs, may_be_copied
from hsa.planning.tasks import Targets
from hsa.system.dtypes import CODES, STORAGE, Array, largest_magnitude

CODE_OF = {getattr(torch, name): code for name, code in CODES.items()}
"""safetensors' element type of a torch dtype that a merge computes with."""

_DTYPE = attrgetter("dtype")

_LARGEST = {dtype: float(torch.finfo(dtype).max) for dtype in CODE_OF if dtype.is_floating_point}

TargetBytes = Mapping[str, Mapping[str, Array]]
"""The bytes of every target, one-dimensional uint8, by source and canonical name."""

T = TypeVar("T")


class Resident(Protocol):
    """The targets of a merge in memory."""

    def measure(self) -> list[Any]:
        """Measure each target, whatever the settings. Raises NonFiniteError."""

    def write(self, settings: Settings, out: Sequence[torch.Tensor]) -> None:
        """Merge each target under these settings, and write it whole into a tensor of its shape. Call `measure` first.

        Raises NonFiniteError, with nothing written; MachineError if writing stopped halfway.
        """


class CpuResident:
    """Targets in the CPU's memory, spread over threads."""

    def __init__(self, targets: Targets, data: TargetBytes, threads: int) -> None:
        self._targets, self._tasks = targets, targets.tasks
        self._data = [{role: data[role][task.name] for role in task.sources} for task in self._tasks]
        values = KeptValues()
        self._workers = [CpuWorker(targets.method, targets.settings, None, values) for _ in range(threads)]
        self._measured: list[Any] = []
        self._bounds = ResultBounds(targets, [], [])
        self._lock = threading.Lock()  # the workers' memory serves one call at a time
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def measure(self) -> list[Any]:
        def one(number: int, worker: CpuWorker) -> tuple[Any, dict[str, float]]:
            task, sources = self._tasks[number], self._data[number]
            copied = may_be_copied(task, self._targets.method, self._targets.settings) and all_equal(
                task, equal_pairs(task, sources)
            )
            measured = COPIED if copied else worker.measure(task, sources)
            codes = {role: task.sources[role].code for role in sources}
            return measured, {
                role: largest_magnitude(codes[role], raw.view(STORAGE[codes[role]])) for role, raw in sources.items()
            }

        results = self._each(range(len(self._tasks)), one)
        self._measured = [measured for measured, _ in results]
        self._bounds = ResultBounds(self._targets, self._measured, [largest for _, largest in results])
        return self._measured

    def write(self, settings: Settings, out: Sequence[torch.Tensor]) -> None:
        def compute(number: int, worker: CpuWorker, place: torch.Tensor) -> None:
            worker = worker.with_settings(settings)
            task, sources = self._tasks[number], self._data[number]
            code = CODE_OF[place.dtype]
            task = task if code == task.out_code else replace(task, out_code=code)
            worker.apply(task, worker.decide(task, self._measured[number], sources), sources, bytes_of(place))

        def one(number: int, worker: CpuWorker) -> None:
            tensor = out[number].detach()
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                compute(number, worker, tensor)
            else:
                place = _empty_on_cpu(tensor)
                compute(number, worker, place)
                _copy_into(place, tensor)

        staged = {number: _empty_on_cpu(out[number]) for number in self._bounds.overflow_risks(settings, out)}
        self._each(list(staged), lambda number, worker: compute(number, worker, staged[number]))
        with write_errors():
            self._each([number for number in range(len(self._tasks)) if number not in staged], one)
            for number, place in staged.items():
                _copy_into(place, out[number].detach())
            # Autograd does not notice by itself what numpy wrote.
            torch.autograd.graph.increment_version(list(out))

    def _each(self, numbers: Sequence[int], work: Callable[[int, CpuWorker], T]) -> list[T]:
        """Run the work on the targets with these numbers, in threads with a worker each, and return its results."""
        threads = len(self._workers)

        def share(first: int) -> list[tuple[int, T]]:
            worker, done = self._workers[first], []
            for number in numbers[first::threads]:
                try:
                    done.append((number, work(number, worker)))
                except NotFinite as error:
                    raise not_finite_target(error, self._tasks[number]) from None
            return done

        if not numbers:
            return []
        with self._lock:
            helpers = range(1, min(threads, len(numbers)))
            futures = [self._helpers().submit(share, first) for first in helpers]
            try:
                shares = [share(0)]
            finally:
                wait(futures)
            done = dict(pair for pairs in (*shares, *(future.result() for future in futures)) for pair in pairs)
        return [done[number] for number in numbers]

    def _helpers(self) -> ThreadPoolExecutor:
        """The pool of threads besides the caller's.

        It is kept, because starting threads would take longer than everything else before the first block of a
        candidate. A forked process has none of its parent's threads, and starts its own.
        """
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(len(self._workers) - 1)
        return self._pool[1]


class ResultBounds:
    """Finds the targets that might overflow, by bounds on their merged values.

    `measured` and `largest` have one entry for each target; `largest` holds the largest magnitudes in its sources.
    """

    def __init__(self, targets: Targets, measured: Sequence[Any], largest: Sequence[Mapping[str, float]]) -> None:
        self._method, self._tasks, self._measured, self._largest = targets.method, targets.tasks, measured, largest
        self._known: tuple[Any, list[int]] = (None, [])

    def overflow_risks(self, settings: Settings, places: Sequence[torch.Tensor]) -> list[int]:
        """The numbers of the targets that might overflow in these places.

        The last result is reused while the dtypes, and the settings that the bounds depend on, are the same.
        """
        read, dtypes = self._method.bound_settings, list(map(_DTYPE, places))
        key = None if read is None else ([_own(getattr(settings, name)) for name in read], dtypes)
        known, risks = self._known
        if key is None or known != key:
            bounds = map(self._bound, self._tasks, self._measured, repeat(settings), self._largest)
            risks = [number for number, risk in enumerate(map(_may_overflow, bounds, dtypes)) if risk]
            self._known = key, risks
        return risks

    def _bound(self, task: TensorTask, measured: Any, settings: Settings, largest: Mapping[str, float]) -> float | None:
        if measured is COPIED:
            return max(largest.values())
        return self._method.largest_result(task, measured, settings, largest)


def _own(value: Any) -> Any:
    """A setting's value, as a copy if a caller could change it."""
    return dict(value) if isinstance(value, Mapping) else value


def _may_overflow(bound: float | None, dtype: torch.dtype) -> bool:
    """Whether a merged value could exceed the range of `dtype`.

    `bound` is its largest magnitude before rounding, None if unknown. The margin of 1e-4 is more than all rounding
    errors.
    """
    return bound is None or not bound * (1 + 1e-4) <= _LARGEST[dtype]


@contextmanager
def write_errors() -> Iterator[None]:
    """Turn an error during the writing into a MachineError that says what the model holds now."""
    try:
        yield
    except Exception as error:
        raise MachineError(
            f"writing the merged targets stopped ({type(error).__name__}: {error}): some of them hold the merge and "
            f"others what they held before; apply it again, or load the model again"
        ) from error


def _empty_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous CPU memory for a result that is copied into this tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _copy_into(place: torch.Tensor, tensor: torch.Tensor) -> None:
    with torch.inference_mode():  # this mode may also write to tensors that were created in it
        tensor.copy_(place)


def not_finite_target(error: NotFinite, task: TensorTask) -> NonFiniteError:
    """The error that names a resident target."""
    head = "" if error.group is None or task.partition.groups == 1 else f", head {error.group}"
    what = "the result overflows" if error.role is None else f"{error.role} holds NaN or Inf"
    return NonFiniteError(f"target tensor {task.stored.name}{head}: {what}")


def bytes_of(tensor: torch.Tensor) -> Array:
    """The memory of a contiguous CPU tensor as one-dimensional uint8, shared."""
    flat: Array = tensor.view(-1).view(torch.uint8).numpy()
    return flat
