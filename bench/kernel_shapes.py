"""Shapes and element types of the problems that bench_kernels measures, and the bytes that each way to merge must move.

A problem is the q, k and v weights of a Whisper encoder. Shape letters: `G` projections of width `d`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import ALPHA, LAM

from hsa import reference
from hsa.testing import whisper_checkpoints

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """The targets of an encoder: three weights a layer."""

    name: str
    layers: int
    width: int
    heads: int

    @property
    def count(self) -> int:
        return 3 * self.layers

    @property
    def elements(self) -> int:
        return self.count * self.width * self.width

    @property
    def coefficients(self) -> list[float]:
        """Of every projection, three to a layer."""
        return [reference.layer_coefficient(LAM, ALPHA, g // 3, self.layers) for g in range(self.count)]


def _published(name: str) -> Shape:
    whole = whisper_checkpoints.SHAPES[name]
    return Shape(name, whole.encoder_layers, whole.d_model, whole.encoder_heads)


SHAPES = {name: _published(name) for name in ("tiny", "base", "small", "medium", "large-v3")}


@dataclass(frozen=True)
class Mix:
    """Dtypes of the three sources. A result has primary's, which it may replace."""

    base: torch.dtype
    primary: torch.dtype
    secondary: torch.dtype

    @property
    def out(self) -> torch.dtype:
        return self.primary


MIXES = {
    "float32": Mix(F32, F32, F32),
    "float16": Mix(F16, F16, F16),
    "bfloat16": Mix(BF16, BF16, BF16),
    "float16-base": Mix(F16, F32, F32),
    "float16-tunes": Mix(F32, F16, F16),
    "bfloat16-tunes": Mix(F32, BF16, BF16),
    "float32-secondary": Mix(F16, F16, F32),
}
"""By the names of `hsa.kernels.compile_check`: all that can merge in place."""


@dataclass(frozen=True)
class Volume:
    """Bytes of all targets, by role."""

    base: int
    primary: int
    secondary: int
    out: int

    @property
    def sources(self) -> int:
        return self.base + self.primary + self.secondary


def volume(shape: Shape, mix: Mix) -> Volume:
    return Volume(*(shape.elements * dtype.itemsize for dtype in (mix.base, mix.primary, mix.secondary, mix.out)))


def _one_pass(v: Volume, share: float) -> float:
    return v.sources + share * v.out


TRAFFIC: dict[str, Callable[[Volume, float], float]] = {
    "one pass, in place": _one_pass,
    "one pass, new buffer": lambda v, share: v.sources + v.out,
    "two launches, in place": lambda v, share: v.sources + share * v.sources + share * v.out,
    "apply only, scores cached, in place": lambda v, share: share * v.sources + share * v.out,
    "CPU backend, merge": _one_pass,
    "CPU backend, apply only, scores cached": lambda v, share: share * v.sources + (1 - share) * v.primary + v.out,
    "eager torch, tensor by tensor": _one_pass,
    "eager torch, stacked": _one_pass,
    "torch.compile, tensor by tensor": _one_pass,
    "torch.compile, stacked": _one_pass,
}
"""Bytes that a case must move, by the share of selected heads. All work in place but the new buffer and the apply step
of the CPU backend, which fills a model's tensors whole from resident sources, as `hsa.Merger` does."""
