"""Deterministic synthetic weights and task vectors: the same on every run and every machine.

They are computed from the raw output of a bit generator, whose stream numpy keeps fixed across its versions, with
float32 operations that round the same everywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsa.testing.whisper_tensors import WhisperTensor

Floats = NDArray[np.float32]


def bit_stream(seed: int, purpose: str, name: str) -> np.random.SFC64:
    """A separate stream for each (seed, purpose, tensor), so that neither order nor sharding matters."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{name}".encode(), digest_size=16).digest()
    return np.random.SFC64(int.from_bytes(digest, "little"))


def noise(generator: np.random.SFC64, count: int, std: float) -> Floats:
    """`count` float32 numbers, uniform around zero with the given standard deviation."""
    raw = generator.random_raw((count + 1) // 2)
    values = raw.view(np.int32)[:count].astype(np.float32)
    values *= np.float32(std * math.sqrt(3.0) / 2.0**31)
    return values


def _head_gains(tensor: WhisperTensor, seed: int, role: str, loud: Collection[int], loud_factor: float) -> Floats:
    """A factor between 0.5 and 1.5 for each head's delta, times `loud_factor` in the loud heads.

    With uniform noise, the heads of a wide model would have almost equal saliency scores, and their selection would
    depend on rounding. So the heads' strengths are evenly spaced, in an order that both fine-tunes share, and each
    fine-tune shifts them by less than half a step.
    """
    order = bit_stream(seed, "rank", tensor.name).random_raw(tensor.heads)
    rank = np.argsort(np.argsort(order, kind="stable"), kind="stable")
    jitter = bit_stream(seed, f"{role} jitter", tensor.name).random_raw(tensor.heads) / 2.0**64
    gains = 0.5 + (rank + 0.25 + 0.5 * jitter) / tensor.heads
    gains[list(loud)] *= loud_factor
    return gains.astype(np.float32)


class TaskVector:
    """The task vector of one role in one tensor, drawn block by block from its first row to its last."""

    def __init__(
        self, tensor: WhisperTensor, role: str, seed: int, delta: float, loud: Collection[int], loud_factor: float
    ) -> None:
        self._generator = bit_stream(seed, role, tensor.name)
        self._std = delta
        self._axis = tensor.head_axis
        self._gains: Floats | None = None
        if tensor.heads:
            gains = _head_gains(tensor, seed, role, loud, loud_factor)
            self._gains = np.repeat(gains, tensor.shape[tensor.head_axis] // tensor.heads)

    def block(self, first: int, rows: int, row_elements: int) -> Floats:
        """Rows `first` to `first + rows`, float32 [rows, row_elements]."""
        values = noise(self._generator, rows * row_elements, self._std).reshape(rows, row_elements)
        if self._gains is not None:
            values *= self._gains[first : first + rows, None] if self._axis == 0 else self._gains
        return values


def encode(values: Floats, dtype: str) -> NDArray[Any]:
    """Round float32 values once, to nearest even. bfloat16 is returned as uint16 bit patterns. Finite values only."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    lowest_kept = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + lowest_kept + np.uint32(0x7FFF)) >> np.uint32(16)).astype(np.uint16)
