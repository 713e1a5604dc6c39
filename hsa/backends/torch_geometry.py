"""The sums of `hsa.methods.geometry` over torch tensors, on whichever device holds them, in float64."""

from __future__ import annotations

import torch

from hsa.methods.geometry import Geometry
from hsa.methods.tensors import TensorTask


def target_geometry(task: TensorTask, base: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> Geometry:
    """The geometry of one target in base and two models. Tensors: of the target's shape, any float type, on one device.

    On the CPU one head is widened at a time, to keep memory small; on a GPU all heads are widened at once, to launch
    few kernels. The task vectors are rounded to float32, as the merge rounds them.
    """
    step = 1 if base.device.type == "cpu" else task.partition.groups
    parts = [
        _sums(*(_heads(task, tensor, head, step) for tensor in (base, first, second)))
        for head in range(0, task.partition.groups, step)
    ]
    base_, one, two, product, difference = torch.cat(parts, dim=1).tolist()
    return Geometry(tuple(base_), tuple(one), tuple(two), tuple(product), tuple(difference))


def _heads(task: TensorTask, tensor: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Some heads of a tensor in float32 [count, elements of a head]."""
    axis, width = task.partition.axis, task.group_size
    part = tensor.narrow(axis, first * width, count * width).movedim(axis, 0)
    return part.reshape(count, -1).float()


def _sums(base: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """|B|^2, |tv1|^2, |tv2|^2, tv1 . tv2 and |tv1 - tv2|^2 of each head: float64 [5, heads]."""
    one, two = (first - base).double(), (second - base).double()
    wide = base.double()
    pairs = ((wide, wide), (one, one), (two, two), (one, two), (one - two, one - two))
    return torch.stack([(x * y).sum(dim=1) for x, y in pairs])
