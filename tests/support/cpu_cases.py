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
from hsa.architectures.base import Partition
from hsa.architectures.whisper import WHISPER
from hsa.backends import cpu
from hsa.backends.base import Merged, TaskBuffers
from hsa.methods.hsa import TARGET, HsaSettings
from hsa.methods.registry import method_named
from hsa.methods.tensors import TensorTask
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

    def task(self) -> TensorTask:
        place = WHISPER.place(NAMES[self.kind].format(self.layer))
        assert place is not None
        assert place.head_axis == self.head_axis
        return TensorTask(
            name=place.name,
            place=place,
            layers=self.layers,
            shape=tuple(self.base.shape),
            partition=Partition(self.head_axis, self.heads),
            sources={role: ref(place.name, getattr(self, role)) for role in ROLES},
            anchor="primary",
            out_code=CODES[self.out_dtype],
            output_name=place.name,
            passes=TARGET.passes,
            layout="heads",
        )

    def settings(self) -> HsaSettings:
        return HsaSettings(k=self.k, lam=self.lam, alpha=self.alpha, attention_scale=self.scale)

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


def ref(name: str, tensor: Tensor) -> TensorRef:
    return TensorRef(name, CODES[tensor.dtype], tuple(tensor.shape), 0, 0, tensor.numel() * tensor.element_size())


def buffer(tensor: Tensor) -> Array:
    return np.frombuffer(raw_bytes(tensor), np.uint8).copy()


def new_worker(settings: HsaSettings | None = None) -> cpu.CpuWorker:
    return cpu.CpuBackend().worker(method_named("hsa"), settings or HsaSettings())


def run(case: Case, *, in_place: bool = False, worker: cpu.CpuWorker | None = None) -> tuple[bytes, Merged]:
    """The merged bytes, out of a poisoned buffer or in place of primary; the other sources must stay as they are.

    The memory of `worker` is used where it is given.
    """
    sources = {role: buffer(getattr(case, role)) for role in ROLES}
    before = {role: source.tobytes() for role, source in sources.items()}
    out = sources["primary"] if in_place else np.full(case.base.numel() * case.out_dtype.itemsize, POISON, np.uint8)
    worker = (worker or new_worker()).with_settings(case.settings())
    merged = worker.merge(TaskBuffers(case.task(), sources, out))
    untouched = [role for role in ROLES if not (in_place and role == "primary")]
    assert [sources[role].tobytes() for role in untouched] == [before[role] for role in untouched]
    return out.tobytes(), merged


def check(case: Case, worker: cpu.CpuWorker | None = None) -> Merged:
    """Bytes, selection, scores and changed ranges of a case; in place too where the element types allow it."""
    expected = case.oracle()
    out, merged = run(case, worker=worker)
    selection = merged.decision.selection
    assert selection.selected == expected.selected
    assert out == raw_bytes(expected.value)
    assert (
        selection.squared
        == merged.decision.measured.squared
        == pytest.approx(expected.squared_scores.tolist(), rel=1e-12, abs=0)
    )
    margin = reference.margin(expected.squared_scores, case.k)
    assert selection.margin == (None if margin is None else pytest.approx(margin, rel=1e-9, abs=1e-12))
    check_changed(case, out, merged)
    if case.out_dtype == case.primary.dtype:
        again, alike = run(case, in_place=True, worker=worker)
        assert again == out
        assert alike == merged
    return merged


def check_changed(case: Case, out: bytes, merged: Merged) -> None:
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
        expected[list(merged.decision.selected)] = True
        assert np.array_equal(inside, expected.reshape(-1))
    else:
        assert inside.all() == bool(merged.decision.selected)


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
