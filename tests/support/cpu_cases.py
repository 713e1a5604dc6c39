"""Cases for the CPU backend, and checks of it against the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers import raw_bytes
from torch import Tensor

from hsa import reference
from hsa.architectures.whisper import WHISPER
from hsa.backends import cpu
from hsa.methods.hsa_formula import keep_count, layer_coefficient
from hsa.planning.outcome import MergedTarget
from hsa.planning.target import Target
from hsa.sources.roles import Role
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import Array

CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = tuple(CODES)
ROLES: tuple[Role, ...] = ("base", "primary", "secondary")
NAMES = {
    "weight": "encoder.layers.{}.self_attn.q_proj.weight",
    "bias": "encoder.layers.{}.self_attn.v_proj.bias",
    "columns": "decoder.layers.{}.encoder_attn.out_proj.weight",
}
POISON = 0xFF
"""A byte of which every element type's NaN can be made."""


@dataclass(frozen=True)
class Case:
    """Three sources and how they are merged; `kind` is a key of `NAMES`."""

    base: Tensor
    primary: Tensor
    secondary: Tensor
    heads: int
    kind: str = "weight"
    k: float = 0.6
    lam: float = 0.5
    alpha: float = 0.2
    layer: int = 1
    layers: int = 4
    scale: float = 1.0
    out: torch.dtype | None = None

    @property
    def out_dtype(self) -> torch.dtype:
        return self.out or self.primary.dtype

    @property
    def head_axis(self) -> int:
        return 1 if self.kind == "columns" else 0

    def target(self) -> Target:
        projection = WHISPER.place(NAMES[self.kind].format(self.layer))
        assert projection is not None
        coefficient = layer_coefficient(self.lam, self.alpha, self.layer, self.layers)
        shape = tuple(self.base.shape)

        def ref(tensor: Tensor) -> TensorRef:
            size = tensor.numel() * tensor.element_size()
            return TensorRef(projection.name, CODES[tensor.dtype], shape, 0, 0, size)

        return Target(
            projection=projection,
            shape=shape,
            heads=self.heads,
            k=self.k,
            keep=keep_count(self.k, self.heads),
            coefficient=coefficient,
            c1=float(np.float32(coefficient)),
            c2=float(np.float32(1.0 - coefficient)),
            scale=self.scale,
            base=ref(self.base),
            primary=ref(self.primary),
            secondary=ref(self.secondary),
            out_code=CODES[self.out_dtype],
        )

    def oracle(self) -> reference.MergedTensor:
        return reference.merge_tensor(
            self.base,
            self.primary,
            self.secondary,
            k=self.k,
            lam=self.lam,
            alpha=self.alpha,
            layer=self.layer,
            layers=self.layers,
            heads=self.heads,
            head_axis=self.head_axis,
            attention_scale=self.scale,
            out_dtype=self.out_dtype,
        )


def buffer(tensor: Tensor) -> Array:
    return np.frombuffer(raw_bytes(tensor), np.uint8).copy()


def run(case: Case, *, in_place: bool = False, worker: cpu.CpuWorker | None = None) -> tuple[bytes, MergedTarget]:
    """The merged bytes, out of a poisoned buffer or in place of primary; the other sources must stay as they are."""
    sources = [buffer(tensor) for tensor in (case.base, case.primary, case.secondary)]
    before = [source.tobytes() for source in sources]
    out = sources[1] if in_place else np.full(case.base.numel() * case.out_dtype.itemsize, POISON, np.uint8)
    merged = (worker or cpu.CpuBackend().worker()).merge(case.target(), *sources, out)
    untouched = [0, 2] if in_place else [0, 1, 2]
    assert [sources[i].tobytes() for i in untouched] == [before[i] for i in untouched]
    return out.tobytes(), merged


def check(case: Case, worker: cpu.CpuWorker | None = None) -> MergedTarget:
    """Bytes, selection, scores and changed ranges of a case; in place too where the element types allow it."""
    expected = case.oracle()
    out, merged = run(case, worker=worker)
    assert merged.selection.selected == expected.selected
    assert out == raw_bytes(expected.value)
    assert merged.selection.squared == pytest.approx(expected.squared_scores.tolist(), rel=1e-12, abs=0)
    margin = reference.margin(expected.squared_scores, case.k)
    assert merged.selection.margin == (None if margin is None else pytest.approx(margin, rel=1e-9, abs=1e-12))
    check_changed(case, out, merged)
    if case.out_dtype == case.primary.dtype:
        again, alike = run(case, in_place=True, worker=worker)
        assert again == out
        assert alike == merged
    return merged


def check_changed(case: Case, out: bytes, merged: MergedTarget) -> None:
    """Ranges are in order, apart and inside; everything outside them is primary's; all selected rows are inside."""
    inside = np.zeros(len(out), bool)
    position = -1
    for start, stop in merged.changed:
        assert position < start < stop <= len(out)
        position = stop
        inside[start:stop] = True
    if case.out_dtype != case.primary.dtype or case.scale != 1.0:
        assert inside.all()
        return
    differs = np.frombuffer(out, np.uint8) != buffer(case.primary)
    assert not (differs & ~inside).any()
    if case.head_axis == 0:
        expected = np.zeros((case.heads, len(out) // case.heads), bool)
        expected[list(merged.selection.selected)] = True
        assert np.array_equal(inside, expected.reshape(-1))
    else:
        assert inside.all() == bool(merged.selection.selected)


def shape_of(kind: str, heads: int, head_dim: int, other: int) -> tuple[int, ...]:
    width = heads * head_dim
    return {"weight": (width, other), "bias": (width,), "columns": (other, width)}[kind]


def draw(
    shape: tuple[int, ...],
    heads: int,
    *,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (torch.float32,) * 3,
    delta: float = 0.01,
    base: float = 0.05,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A case with normal weights and normal task vectors."""
    generator = torch.Generator().manual_seed(seed)
    values = base * torch.randn(shape, generator=generator)
    tensors = [values, *(values + delta * torch.randn(shape, generator=generator) for _ in range(2))]
    return Case(*(tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)), heads=heads, **options)
