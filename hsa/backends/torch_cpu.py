"""Reference numerics: the reference script's tensor operations, in torch on the CPU, one tensor at a time.

The operations, their order, their element types and their operands' shapes are the script's, so that three
checkpoints of one element type give its very bytes. Source: the released script of the paper in SPEC section 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import torch

from hsa.backends.base import NotFinite, TargetBuffers, buffers_cost, merge_one_by_one
from hsa.backends.torch_geometry import target_geometry
from hsa.methods.selection import selection_of
from hsa.planning.file_layout import Slice
from hsa.planning.outcome import MergedTarget
from hsa.planning.target import Target
from hsa.system.dtypes import NAMES, Array

TEMPORARIES = 8
"""Whole tensors, at most float32, that the script's expressions hold at once."""


class ScriptBackend:
    """Reference numerics in torch on the CPU."""

    name = "cpu"
    device = "cpu"
    group_bytes = 0

    def __init__(self) -> None:
        # All arithmetic in one thread: malloc keeps what a thread freed for that thread, and each would keep its own.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hsa-script")

    def worker(self) -> ScriptWorker:
        return ScriptWorker(self._thread)

    def empty(self, nbytes: int) -> Array:
        return np.empty(nbytes, np.uint8)

    def cost(self, target: Target) -> int:
        return buffers_cost(target) + TEMPORARIES * 4 * math.prod(target.shape)


class ScriptWorker:
    """One thread's way to the arithmetic, which torch spreads over the cores."""

    def __init__(self, thread: Executor) -> None:
        self._thread = thread

    def merge_all(self, jobs: Sequence[TargetBuffers]) -> list[MergedTarget]:
        """Merge targets one after another."""
        return self._thread.submit(merge_one_by_one, jobs, self.merge).result()

    def slice(self, piece: Slice, primary: Array, base: Array | None, out: Array) -> None:
        """Move a slice along primary's task vector, or cast it. Buffers: uint8."""
        self._thread.submit(self._slice, piece, primary, base, out).result()

    @torch.no_grad()
    def merge(self, target: Target, base: Array, primary: Array, secondary: Array, out: Array) -> MergedTarget:
        """Score, select and merge one tensor. Buffers: uint8, the tensors' bytes."""
        codes = target.load_codes
        assert codes is not None
        b = _tensor(base, target.base.code, codes["base"]).view(target.shape)
        m1 = _tensor(primary, target.primary.code, codes["primary"]).view(target.shape)
        m2 = _tensor(secondary, target.secondary.code, codes["secondary"]).view(target.shape)
        for role, tensor in (("base", b), ("primary", m1), ("secondary", m2)):
            if not bool(torch.isfinite(tensor).all()):
                raise NotFinite(role, _first_head(target, tensor))
        geometry = target_geometry(target, b, m1, m2)
        tv1, tv2 = m1 - b, m2 - b
        proxy = tv1.abs() + tv2.abs()
        scores = _scores(target, proxy)
        selected_mask = _select(scores, target)
        mask = _element_mask(target, selected_mask.to(proxy.dtype), proxy).to(b.dtype)
        differ = bool(tv1.any()), bool(tv2.any())
        del proxy
        lam = target.coefficient
        blended = lam * tv1 + (1.0 - lam) * tv2
        del tv2
        delta = mask * blended + (1.0 - mask) * tv1
        del blended, tv1
        result = _store(b + float(target.scale) * delta, target.out_code, out)
        if not bool(torch.isfinite(result).all()):
            raise NotFinite(None, _first_head(target, result.view(target.shape)))
        squared = tuple(float(score) ** 2 for score in scores)
        selected = tuple(int(head) for head in selected_mask.nonzero().flatten())
        return MergedTarget(selection_of(squared, selected), ((0, out.size),), *differ, geometry)

    @torch.no_grad()
    def _slice(self, piece: Slice, primary: Array, base: Array | None, out: Array) -> None:
        codes = piece.load_codes
        assert codes is not None
        m1 = _tensor(primary, piece.primary.code, codes[piece.role])
        loaded = {piece.role: m1}
        value = m1
        if base is not None and piece.base is not None:
            b = loaded["base"] = _tensor(base, piece.base.code, codes["base"])
            value = b + float(piece.scale) * (m1 - b)
        if not bool(torch.isfinite(_store(value, piece.code, out)).all()):
            raise NotFinite(next((role for role, t in loaded.items() if not bool(torch.isfinite(t).all())), None), None)


def _scores(target: Target, proxy: torch.Tensor) -> torch.Tensor:
    if proxy.ndim == 1:
        return proxy.abs().view(target.heads, -1).pow(2).sum(dim=1).sqrt()
    across = 1 - target.projection.head_axis
    channels: torch.Tensor = proxy.norm(p=2, dim=across)
    return channels.view(target.heads, -1).pow(2).sum(dim=1).sqrt()


def _select(scores: torch.Tensor, target: Target) -> torch.Tensor:
    if target.keep == 0:
        return torch.zeros(target.heads, dtype=torch.bool)
    if target.k in (1.0, 100.0):
        return torch.ones(target.heads, dtype=torch.bool)
    return scores >= torch.topk(scores, target.keep, largest=True).values.min()


def _element_mask(target: Target, selected: torch.Tensor, proxy: torch.Tensor) -> torch.Tensor:
    mask = selected.repeat_interleave(target.head_dim)
    if proxy.ndim == 1:
        return mask
    return mask.unsqueeze(1 - target.projection.head_axis)


def _first_head(target: Target, tensor: torch.Tensor) -> int:
    where = (~torch.isfinite(tensor)).nonzero()[0]
    return int(where[target.projection.head_axis]) // target.head_dim


def _tensor(raw: Array, code: str, load_code: str) -> torch.Tensor:
    return torch.from_numpy(raw).view(getattr(torch, NAMES[code])).to(getattr(torch, NAMES[load_code]))


def _store(value: torch.Tensor, code: str, out: Array) -> torch.Tensor:
    stored = torch.from_numpy(out).view(getattr(torch, NAMES[code]))
    return stored.copy_(value.reshape(-1))
