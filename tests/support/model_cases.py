"""Tensors of several fine-tunes for methods that merge whole models, merged by the CPU backend whole and in slices."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from cpu_cases import CODES, POISON, buffer, ref
from torch import Tensor

from hsa.architectures.base import Partition, TensorInfo
from hsa.backends import cpu
from hsa.backends.base import TaskBuffers
from hsa.methods.registry import method_named
from hsa.methods.tensors import TensorTask
from hsa.planning.file_layout import Computed

NAME = "encoder.layers.1.fc1.weight"


@dataclass(frozen=True)
class ModelCase:
    """A tensor of base, where there is one, and of the models, and how they are merged."""

    method: str
    base: Tensor | None
    models: Sequence[Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    out: torch.dtype | None = None

    @property
    def out_dtype(self) -> torch.dtype:
        return self.out or self.models[0].dtype

    @property
    def sources(self) -> dict[str, Tensor]:
        base = {} if self.base is None else {"base": self.base}
        return base | {f"model{number}": model for number, model in enumerate(self.models, 1)}

    def task(self) -> TensorTask:
        method, settings = method_named(self.method), self.made_settings()
        shape = tuple(self.models[0].shape)
        treatment = method.treatment(TensorInfo(NAME, CODES[self.models[0].dtype], shape), None, settings)
        assert treatment.kind == "merge"
        return TensorTask(
            name=NAME,
            place=None,
            layers=0,
            shape=shape,
            partition=Partition(),
            sources={role: ref(NAME, tensor) for role, tensor in self.sources.items()},
            anchor="model1",
            out_code=CODES[self.out_dtype],
            output_name=NAME,
            passes=treatment.passes,
            layout=treatment.layout,
            numbers=tuple(range(len(self.models))),
            models_given=len(self.models),
        )

    def made_settings(self) -> Any:
        return method_named(self.method).Settings(**self.settings)

    def worker(self) -> cpu.CpuWorker:
        return cpu.CpuBackend().worker(method_named(self.method), self.made_settings())


def merged_whole(case: ModelCase, *, in_place: bool = False) -> tuple[bytes, Any]:
    """The merged bytes, from a poisoned buffer or in place of the anchor, and the decision; other sources stay."""
    sources = {role: buffer(tensor) for role, tensor in case.sources.items()}
    before = {role: source.tobytes() for role, source in sources.items()}
    count = case.models[0].numel()
    out = sources["model1"] if in_place else np.full(count * case.out_dtype.itemsize, POISON, np.uint8)
    merged = case.worker().merge(TaskBuffers(case.task(), sources, out))
    for role, source in sources.items():
        assert (in_place and role == "model1") or source.tobytes() == before[role], role
    return out.tobytes(), merged.decision


def merged_in_slices(case: ModelCase, seed: int, recorded: Any = None) -> tuple[bytes, Any]:
    """The same in slices of random sizes, each computed by a worker of its own."""
    task, choose = case.task(), random.Random(seed)
    total, step = case.models[0].numel(), task.step
    pieces, first = [], 0
    while first < total:
        count = min(total - first, step * choose.randint(1, 3))
        pieces.append(Computed(task, first, count))
        first += count
    measured = None
    worker = case.worker()
    if task.passes:
        parts = [case.worker().measure_slice(piece, _cut(case, piece), 0, None) for piece in pieces]
        measured = worker.method.gather(task, [[each for part in parts for each in part]])
    decision = worker.method.decide(task, measured, worker.settings, None)
    result = b""
    for piece in pieces:
        out = np.full(piece.nbytes, POISON, np.uint8)
        case.worker().slice(piece, _cut(case, piece), out, decision, recorded)
        result += out.tobytes()
    return result, decision


def _cut(case: ModelCase, piece: Computed) -> dict[str, Any]:
    part = slice(piece.first, piece.first + piece.count)
    return {role: buffer(tensor.reshape(-1)[part]) for role, tensor in case.sources.items()}


def fine_tunes(shape: tuple[int, ...], models: int, seed: int, deviation: float = 0.01) -> tuple[Tensor, list[Tensor]]:
    """A base, and models that moved from it, partly the same way; float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size: float) -> Tensor:
        return torch.randn(shape, generator=generator) * size

    base, common = normal(0.1), normal(deviation)
    return base, [base + common + normal(deviation) for _ in range(models)]


def with_dtypes(case: ModelCase, dtypes: Sequence[torch.dtype]) -> ModelCase:
    """The same with base and the models in these element types, again and again."""
    base = None if case.base is None else case.base.to(dtypes[0])
    models = [model.to(dtypes[(number + 1) % len(dtypes)]) for number, model in enumerate(case.models)]
    return replace(case, base=base, models=models)
