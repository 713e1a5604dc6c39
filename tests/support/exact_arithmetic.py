"""Floating-point numbers as exact fractions, and small triples of them drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from hsa import reference

FLOATING = (torch.float32, torch.float16, torch.bfloat16)

# Precision in bits (with the hidden one) and exponent of the smallest normal number.
FORMATS = {
    torch.float64: (53, -1022),
    torch.float32: (24, -126),
    torch.float16: (11, -14),
    torch.bfloat16: (8, -126),
}


def unit(dtype: torch.dtype) -> Fraction:
    """Unit roundoff: the relative error of one rounding to nearest, above the subnormals."""
    return Fraction(1, 2 ** FORMATS[dtype][0])


def exact(tensor: Tensor) -> list[Fraction]:
    """The elements as exact fractions, row-major."""
    return [Fraction(value) for value in tensor.double().flatten().tolist()]


def raw(tensor: Tensor) -> Tensor:
    """The bit patterns: -0.0 differs from 0.0."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def head_of(position: int, shape: tuple[int, ...], heads: int, head_axis: int) -> int:
    """Head that owns the element at a row-major position."""
    index = np.unravel_index(position, shape)[head_axis]
    return int(index) // (shape[head_axis] // heads)


@dataclass(frozen=True)
class Triple:
    base: Tensor
    primary: Tensor
    secondary: Tensor
    heads: int
    head_axis: int

    def heads_of_elements(self) -> list[int]:
        shape = tuple(self.base.shape)
        return [head_of(p, shape, self.heads, self.head_axis) for p in range(self.base.numel())]


FLOATS = st.floats(-16, 16, width=32)
WHOLE = st.integers(-2, 2).map(float)


@st.composite
def triples(
    draw: st.DrawFn,
    elements: st.SearchStrategy[float] = FLOATS,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
) -> Triple:
    """Biases, weights with heads of rows, weights with heads of columns; each source with its own dtype."""
    heads, head_dim, other = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["bias", "rows", "columns"]))
    width = heads * head_dim
    shape = {"bias": (width,), "rows": (width, other), "columns": (other, width)}[kind]
    tensors = [
        torch.from_numpy(draw(arrays(np.float32, shape, elements=elements))).to(draw(st.sampled_from(dtypes)))
        for _ in range(3)
    ]
    return Triple(*tensors, heads=heads, head_axis=int(kind == "columns"))


SHARES = st.one_of(st.sampled_from([0.0, 1.0, 0.6, 60.0, 100.0]), st.floats(0, 1))


def merge(triple: Triple, **options: Any) -> reference.MergedTensor:
    defaults: dict[str, Any] = {"k": 0.6, "lam": 0.5, "alpha": 0.2, "layer": 0, "layers": 1}
    return reference.merge_tensor(
        triple.base,
        triple.primary,
        triple.secondary,
        heads=triple.heads,
        head_axis=triple.head_axis,
        **(defaults | options),
    )
