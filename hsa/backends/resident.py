"""Targets that stay in memory, scored once and written many times: on the CPU here, on a GPU in `triton`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from hsa.backends.base import NotFinite
from hsa.backends.cpu import CpuWorker, Scored
from hsa.errors import MachineError, NonFiniteError
from hsa.methods.hsa import ROLES
from hsa.methods.selection import select
from hsa.planning.target import Target
from hsa.sources.roles import Role
from hsa.system.dtypes import CODES, STORAGE, Array, largest_magnitude

CODE_OF = {getattr(torch, name): code for name, code in CODES.items()}
"""safetensors' element type of a torch dtype that a merge computes with."""

TargetBytes = Mapping[Role, Mapping[str, Array]]
"""The bytes of every target, one-dimensional uint8, by source and canonical name."""

T = TypeVar("T")


class Resident(Protocol):
    """The targets of three sources in memory. Both methods take all targets, in the order of the first call."""

    def score(self, targets: Sequence[Target]) -> list[Scored]:
        """Squared saliency scores of each target's heads, and its geometry. Raises NonFiniteError."""

    def write(self, targets: Sequence[Target], out: Sequence[torch.Tensor]) -> None:
        """Write each target, merged by the scores, whole into a tensor of its shape.

        Raises NonFiniteError, with nothing written; MachineError where writing stopped halfway.
        """


class CpuResident:
    """Targets in the CPU's memory, spread over threads."""

    def __init__(self, data: TargetBytes, threads: int) -> None:
        self._data, self._threads = data, threads
        self._squared: dict[str, tuple[float, ...]] = {}
        self._largest_base: dict[str, float] = {}

    def score(self, targets: Sequence[Target]) -> list[Scored]:
        def one(number: int, worker: CpuWorker) -> tuple[Scored, float]:
            target = targets[number]
            base, primary, secondary = self._source_bytes(target)
            scored = worker.score(target, base, primary, secondary)
            return scored, largest_magnitude(target.base.code, base.view(STORAGE[target.base.code]))

        results = self._each(range(len(targets)), targets, one)
        for target, (scored, largest_base) in zip(targets, results, strict=True):
            self._squared[target.projection.name] = scored.squared
            self._largest_base[target.projection.name] = largest_base
        return [scored for scored, _ in results]

    def write(self, targets: Sequence[Target], out: Sequence[torch.Tensor]) -> None:
        def compute(number: int, worker: CpuWorker, place: torch.Tensor) -> None:
            target = targets[number].with_output_code(CODE_OF[place.dtype])
            selected = select(self._squared[target.projection.name], target.keep).selected
            worker.apply(target, selected, *self._source_bytes(target), bytes_of(place))

        def one(number: int, worker: CpuWorker) -> None:
            tensor = out[number].detach()
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                compute(number, worker, tensor)
            else:
                place = _empty_on_cpu(tensor)
                compute(number, worker, place)
                _copy_into(place, tensor)

        staged = {
            number: _empty_on_cpu(out[number])
            for number, target in enumerate(targets)
            if self._may_overflow(target, out[number].dtype)
        }
        self._each(list(staged), targets, lambda number, worker: compute(number, worker, staged[number]))
        with write_errors():
            self._each([number for number in range(len(targets)) if number not in staged], targets, one)
            for number, place in staged.items():
                _copy_into(place, out[number].detach())
            # What numpy wrote, autograd does not see by itself.
            torch.autograd.graph.increment_version(list(out))

    def _may_overflow(self, target: Target, dtype: torch.dtype) -> bool:
        name = target.projection.name
        return may_overflow(self._squared[name], self._largest_base[name], target.scale, dtype)

    def _source_bytes(self, target: Target) -> tuple[Array, Array, Array]:
        base, primary, secondary = (self._data[role][target.projection.name] for role in ROLES)
        return base, primary, secondary

    def _each(self, numbers: Sequence[int], targets: Sequence[Target], work: Callable[[int, CpuWorker], T]) -> list[T]:
        """The work on these numbers of targets, spread over threads that each have a worker of their own."""

        def share(first: int) -> list[tuple[int, T]]:
            worker, done = CpuWorker(), []
            for number in numbers[first :: self._threads]:
                try:
                    done.append((number, work(number, worker)))
                except NotFinite as error:
                    raise not_finite_target(error, targets[number]) from None
            return done

        with ThreadPoolExecutor(self._threads) as pool:
            done = dict(pair for pairs in pool.map(share, range(self._threads)) for pair in pairs)
        return [done[number] for number in numbers]


def may_overflow(squared: Sequence[float], largest_base: float, scale: float, dtype: torch.dtype) -> bool:
    """Whether a merged value of a target could be beyond `dtype`.

    A head's score is at least |tv1| + |tv2| of each of its elements, and a merged value is base plus `scale` times at
    most that; 1e-4 is more than all roundings take.
    """
    bound = largest_base + abs(scale) * math.sqrt(max(squared))
    return not bound * (1 + 1e-4) <= torch.finfo(dtype).max


@contextmanager
def write_errors() -> Iterator[None]:
    """Around the writing itself: turns what stops it into a MachineError that says what the model holds now."""
    try:
        yield
    except Exception as error:
        raise MachineError(
            f"writing the merged targets stopped ({type(error).__name__}: {error}): some of them hold the merge and "
            f"others what they held before; apply it again, or load the model again"
        ) from error


def _empty_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous memory of the CPU for a result that goes into this tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _copy_into(place: torch.Tensor, tensor: torch.Tensor) -> None:
    with torch.inference_mode():  # which may also write to tensors that were made in it
        tensor.copy_(place)


def not_finite_target(error: NotFinite, target: Target) -> NonFiniteError:
    """The error that names a resident target."""
    head = "" if error.head is None else f", head {error.head}"
    what = "the result overflows" if error.role is None else f"{error.role} holds NaN or Inf"
    return NonFiniteError(f"target tensor {target.primary.name}{head}: {what}")


def bytes_of(tensor: torch.Tensor) -> Array:
    """The memory of a contiguous CPU tensor as one-dimensional uint8, shared."""
    flat: Array = tensor.view(-1).view(torch.uint8).numpy()
    return flat
