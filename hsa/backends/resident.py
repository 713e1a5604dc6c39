"""Targets that stay in memory, scored once and written many times: on the CPU here, on a GPU in `triton`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

from hsa.backends import NotFinite
from hsa.backends.cpu import CpuWorker
from hsa.checkpoint import ROLES, Role
from hsa.dtypes import CODES, Array
from hsa.errors import NonFiniteError
from hsa.target import Target, select

CODE_OF = {getattr(torch, name): code for name, code in CODES.items()}
"""safetensors' element type of a torch dtype that a merge computes with."""

Data = Mapping[Role, Mapping[str, Array]]
"""The bytes of every target, one-dimensional uint8, by source and canonical name."""

T = TypeVar("T")


class Resident(Protocol):
    """The targets of three sources in memory. Both methods take all targets, in the order of the first call."""

    def score(self, targets: Sequence[Target]) -> list[tuple[float, ...]]:
        """Squared saliency scores of each target's heads. Raises NonFiniteError."""

    def write(self, targets: Sequence[Target], out: Sequence[torch.Tensor]) -> None:
        """Write each target, merged by the scores, whole into a tensor of its shape. Raises NonFiniteError."""


class CpuResident:
    """Targets in the CPU's memory, spread over threads."""

    def __init__(self, data: Data, threads: int) -> None:
        self._data, self._threads = data, threads
        self._squared: dict[str, tuple[float, ...]] = {}

    def score(self, targets: Sequence[Target]) -> list[tuple[float, ...]]:
        squared = self._each(targets, lambda number, worker: worker.score(targets[number], *self._of(targets[number])))
        for target, scored in zip(targets, squared, strict=True):
            self._squared[target.projection.name] = scored.squared
        return [scored.squared for scored in squared]

    def write(self, targets: Sequence[Target], out: Sequence[torch.Tensor]) -> None:
        def one(number: int, worker: CpuWorker) -> None:
            tensor = out[number].detach()
            target = targets[number].writing(CODE_OF[tensor.dtype])
            direct = tensor.device.type == "cpu" and tensor.is_contiguous()
            place = tensor if direct else torch.empty(target.shape, dtype=tensor.dtype)
            selected = select(self._squared[target.projection.name], target.keep).selected
            worker.apply(target, selected, *self._of(target), bytes_of(place))
            if not direct:
                tensor.copy_(place)

        self._each(targets, one)

    def _of(self, target: Target) -> tuple[Array, Array, Array]:
        base, primary, secondary = (self._data[role][target.projection.name] for role in ROLES)
        return base, primary, secondary

    def _each(self, targets: Sequence[Target], work: Callable[[int, CpuWorker], T]) -> list[T]:
        """The work on the number of every target, spread over threads that each have a worker of their own."""

        def share(first: int) -> list[tuple[int, T]]:
            worker, done = CpuWorker(), []
            for number in range(first, len(targets), self._threads):
                try:
                    done.append((number, work(number, worker)))
                except NotFinite as error:
                    raise not_finite(error, targets[number]) from None
            return done

        with ThreadPoolExecutor(self._threads) as pool:
            done = dict(pair for pairs in pool.map(share, range(self._threads)) for pair in pairs)
        return [done[number] for number in range(len(targets))]


def not_finite(error: NotFinite, target: Target) -> NonFiniteError:
    """The error that names a resident target."""
    head = "" if error.head is None else f", head {error.head}"
    what = "the result overflows" if error.role is None else f"{error.role} holds NaN or Inf"
    return NonFiniteError(f"target tensor {target.primary.name}{head}: {what}")


def bytes_of(tensor: torch.Tensor) -> Array:
    """The memory of a contiguous CPU tensor as one-dimensional uint8, shared."""
    flat: Array = tensor.view(-1).view(torch.uint8).numpy()
    return flat
