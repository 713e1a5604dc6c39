"""Float64 sums in a fixed order: 64 lanes in each block of 1,024, then halves of lanes, then block after block."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024
LANES = 64


def block_sums(values: Tensor) -> Tensor:
    """Sum each block of 1,024 values, the last padded with zeros: float64 [..., n] to [..., ceil(n / 1024)].

    Element e of a block is in lane e mod 64. The elements of a lane are added one after another, then halves of lanes.
    """
    length = values.shape[-1]
    blocks = -(-length // BLOCK)
    padded = torch.zeros(*values.shape[:-1], blocks * BLOCK, dtype=torch.float64)
    padded[..., :length] = values
    numbers = padded.view(*values.shape[:-1], blocks, BLOCK // LANES, LANES)
    sums = numbers[..., 0, :]
    for each in range(1, numbers.shape[-2]):
        sums = sums + numbers[..., each, :]
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def added_blocks(parts: Tensor) -> Tensor:
    """Add the sums one after another, starting from 0: float64 [..., k] to [...]."""
    result = torch.zeros(parts.shape[:-1], dtype=torch.float64)
    for each in range(parts.shape[-1]):
        result += parts[..., each]
    return result


def column_sums(values: Tensor) -> Tensor:
    """Add neighbouring rows in pairs until one row is left: float64 [rows, columns] to [columns]. Missing rows are
    zeros."""
    while len(values) > 1:
        if len(values) % 2:
            values = torch.cat([values, torch.zeros_like(values[:1])])
        values = values[0::2] + values[1::2]
    return values[0]


def total(values: Tensor) -> float:
    """The sum of all float64 values."""
    return float(added_blocks(block_sums(values.flatten())))
