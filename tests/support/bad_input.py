"""What the tests of refused merges share: the damage that they do to sources, and where."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    poke,
    read_tensors,
    write_tensors,
)

from hsa.sources.checkpoint import WEIGHTS

Triple = Mapping[str, Path]
Refuse = Callable[..., str]
ROLES = ("base", "primary", "secondary")
WEIGHT = "model.encoder.layers.1.self_attn.q_proj.weight"
BIAS = "model.encoder.layers.0.self_attn.v_proj.bias"
OUT = "model.decoder.layers.0.encoder_attn.out_proj.weight"
COPIED = "model.encoder.conv1.weight"
HEAD_DIM, WIDTH = 16, 64

each_role = pytest.mark.parametrize("role", ROLES)

Damage = Callable[[bytes], bytes]

Index = dict[str, Any]


def move(index: Index, to: str) -> None:
    first = min(index["weight_map"].values())
    index["weight_map"] = {name: to if file == first else file for name, file in index["weight_map"].items()}


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)


def bits(value: float, dtype: str) -> bytes:
    """A number's element in that dtype; bfloat16 cuts off what it cannot hold."""
    if dtype == "float16":
        return struct.pack("<e", value)
    whole = struct.pack("<f", value)
    return whole[2:] if dtype == "bfloat16" else whole


def damage(path: Path, tensor: str, element: int, value: float, dtype: str) -> None:
    poke(path / WEIGHTS, tensor, element, bits(value, dtype))


# One element of each: (tensor, element, the head it belongs to).
PLACES = {
    "weight": (WEIGHT, (2 * HEAD_DIM + 3) * WIDTH + 5, 2),
    "bias": (BIAS, 3 * HEAD_DIM, 3),
    "columns": (OUT, 10 * WIDTH + HEAD_DIM + 15, 1),
}
ADAPTER = "adapter_model.bin"
