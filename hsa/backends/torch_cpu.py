"""Reference numerics: the reference script's tensor operations, in torch on the CPU, one tensor at a time.

The operations, their order, their element types and the shapes of their operands are the script's. So three checkpoints
of one element type give exactly the script's bytes. Source: the released script of Shankar et al., Computer Speech &
Language, 2026, 102012.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from hsa.backends.base import Merged, NotFinite, TaskBuffers, buffers_cost, merge_one_by_one
from hsa.backends.torch_geometry import target_geometry
from hsa.methods.base import BASE, Method
from hsa.methods.geometry import Geometry
from hsa.methods.hsa import PRIMARY, SECONDARY, HsaSettings
from hsa.methods.hsa_decision import HeadScores, HsaDecision, decision_of
from hsa.methods.hsa_formula import settings_of
from hsa.methods.selection import selection_of
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorTask
from hsa.planning.file_layout import Computed
from hsa.system.dtypes import NAMES, Array

TEMPORARIES = 8
"""Whole tensors, at most float32, that the script's expressions hold at once."""


class ScriptBackend:
    """Reference numerics in torch on the CPU."""

    name = "cpu"
    device = "cpu"
    group_bytes = 0

    def __init__(self) -> None:
        # All arithmetic runs in one thread: malloc keeps freed memory per thread, so that each would keep its own.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hsa-script")

    def worker(self, method: Method[Any, Any], settings: Settings) -> ScriptWorker:
        assert isinstance(settings, HsaSettings)
        return ScriptWorker(self._thread, settings)

    def empty(self, nbytes: int) -> Array:
        return np.empty(nbytes, np.uint8)

    def cost(self, task: TensorTask) -> int:
        return buffers_cost(task) + TEMPORARIES * 4 * math.prod(task.shape)


class ScriptWorker:
    """One thread's access to the shared arithmetic thread; torch spreads the arithmetic over the cores."""

    def __init__(self, thread: Executor, settings: HsaSettings) -> None:
        self._thread, self._settings = thread, settings

    def merge_all(self, jobs: Sequence[TaskBuffers]) -> list[Merged]:
        """Merge targets one after another."""
        return self._thread.submit(merge_one_by_one, jobs, self.merge).result()

    def slice(self, piece: Computed, sources: Mapping[str, Array], out: Array, decision: Any, recorded: Any) -> None:
        """Move a slice along primary's task vector by the settings, or cast it. Buffers: uint8."""
        self._thread.submit(self._slice, piece, sources, out).result()

    def measure_slice(self, piece: Computed, sources: Mapping[str, Array], number: int, so_far: Any) -> list[Any]:
        raise NotImplementedError("the reference script measures whole tensors")

    @torch.no_grad()
    def merge(self, job: TaskBuffers) -> Merged:
        """Score, select and merge one tensor. Buffers: uint8, the tensors' bytes."""
        task, out = job.task, job.out
        loaded = {role: _load(task, role, raw).view(task.shape) for role, raw in job.sources.items()}
        for role, tensor in loaded.items():
            if not bool(torch.isfinite(tensor).all()):
                raise NotFinite(role, _first_head(task, tensor))
        b, m1, m2 = loaded[BASE], loaded[PRIMARY], loaded[SECONDARY]
        geometry = target_geometry(task, b, m1, m2)
        tv1, tv2 = m1 - b, m2 - b
        proxy = tv1.abs() + tv2.abs()
        scores = _scores(task, proxy)
        decision = self._decide(task, scores, (bool(tv1.any()), bool(tv2.any())), geometry)
        applied = decision if job.recorded is None else job.recorded
        selected = torch.zeros(task.partition.groups, dtype=torch.bool)
        selected[list(applied.selected)] = True
        mask = _element_mask(task, selected.to(proxy.dtype), proxy).to(b.dtype)
        del proxy
        lam = applied.coefficient
        blended = lam * tv1 + (1.0 - lam) * tv2
        del tv2
        delta = mask * blended + (1.0 - mask) * tv1
        del blended, tv1
        result = _store(b + float(applied.scale) * delta, task.out_code, out)
        if not bool(torch.isfinite(result).all()):
            raise NotFinite(None, _first_head(task, result.view(task.shape)))
        return Merged(decision, ((0, out.size),))

    def _decide(
        self, task: TensorTask, scores: torch.Tensor, differ: tuple[bool, bool], geometry: Geometry
    ) -> HsaDecision:
        keep, _ = settings_of(task, self._settings)
        mask = _select(scores, keep, self._settings.of("k", task.name))
        squared = tuple(float(score) ** 2 for score in scores)
        selection = selection_of(squared, tuple(int(head) for head in mask.nonzero().flatten()))
        return decision_of(task, self._settings, selection, HeadScores(squared, differ, geometry))

    @torch.no_grad()
    def _slice(self, piece: Computed, sources: Mapping[str, Array], out: Array) -> None:
        task = piece.task
        loaded = {role: _load(task, role, raw) for role, raw in sources.items()}
        value = loaded[PRIMARY] if PRIMARY in loaded else loaded[BASE]
        if len(loaded) == 2:
            b = loaded[BASE]
            value = b + float(self._settings.non_attention_scale) * (loaded[PRIMARY] - b)
        if not bool(torch.isfinite(_store(value, task.out_code, out)).all()):
            damaged = (role for role in (PRIMARY, BASE) if role in loaded)
            raise NotFinite(next((r for r in damaged if not bool(torch.isfinite(loaded[r]).all())), None), None)


def _scores(task: TensorTask, proxy: torch.Tensor) -> torch.Tensor:
    groups = task.partition.groups
    if proxy.ndim == 1:
        return proxy.abs().view(groups, -1).pow(2).sum(dim=1).sqrt()
    channels: torch.Tensor = proxy.norm(p=2, dim=1 - task.partition.axis)
    return channels.view(groups, -1).pow(2).sum(dim=1).sqrt()


def _select(scores: torch.Tensor, keep: int, k: float) -> torch.Tensor:
    if keep == 0:
        return torch.zeros(scores.numel(), dtype=torch.bool)
    if k in (1.0, 100.0):
        return torch.ones(scores.numel(), dtype=torch.bool)
    return scores >= torch.topk(scores, keep, largest=True).values.min()


def _element_mask(task: TensorTask, selected: torch.Tensor, proxy: torch.Tensor) -> torch.Tensor:
    mask = selected.repeat_interleave(task.group_size)
    if proxy.ndim == 1:
        return mask
    return mask.unsqueeze(1 - task.partition.axis)


def _first_head(task: TensorTask, tensor: torch.Tensor) -> int:
    where = (~torch.isfinite(tensor)).nonzero()[0]
    return int(where[task.partition.axis]) // task.group_size


def _load(task: TensorTask, role: str, raw: Array) -> torch.Tensor:
    """A source's tensor, flat, as the script's loader would load it."""
    assert task.load_codes is not None
    stored = torch.from_numpy(raw).view(getattr(torch, NAMES[task.sources[role].code]))
    return stored.to(getattr(torch, NAMES[task.load_codes[role]]))


def _store(value: torch.Tensor, code: str, out: Array) -> torch.Tensor:
    stored = torch.from_numpy(out).view(getattr(torch, NAMES[code]))
    return stored.copy_(value.reshape(-1))
