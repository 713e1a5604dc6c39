"""Tensors of made-up models for the kernels, what the oracle makes of them, and the comparison of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gpu import DEVICE
from hsa.kernels.launch import apply_heads, check, fused_merge, score_heads
from hsa.kernels.projections import Projections
from hsa.kernels.tuning import Tuning
from torch import Tensor

from hsa import reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BITS = {F32: torch.int32, F16: torch.int16, BF16: torch.int16}
LARGE = Tuning(
    rows=2048 if DEVICE == "cpu" else 128,
    warps=8,
    stages=1,
    registers=128,
    fused_registers=128,
    per_processor=1,
    held=2,
)
"""Slabs that the interpreter runs fast, or that a GPU can hold; the width of a slab is no part of the result."""

MIXES = {
    "float32": (F32, F32, F32, None),
    "float16": (F16, F16, F16, None),
    "bfloat16": (BF16, BF16, BF16, None),
    "float16-base": (F16, F32, F32, None),
    "float16-tunes": (F32, F16, F16, None),
    "bfloat16-tunes": (F32, BF16, BF16, None),
    "float32-secondary": (F16, F16, F32, None),
    "to-float16": (F16, F32, F32, F16),
    "to-bfloat16": (F32, F32, F32, BF16),
    "float32-new": (F32, F32, F32, F32),
    "float16-new": (F16, F16, F16, F16),
    "bfloat16-new": (BF16, BF16, BF16, BF16),
    "to-float32": (F16, BF16, F16, F32),
    "float16-to-bfloat16": (F16, F16, F16, BF16),
}
"""Dtypes of base, primary, secondary, and of a new output; None is in place."""


@dataclass
class Problem:
    """The tensors of a model's projections, with what the oracle needs."""

    base: list[Tensor]
    primary: list[Tensor]
    secondary: list[Tensor]
    out: list[Tensor] | None
    heads: int
    axes: list[int]

    def plan(self, tuned: Tuning | None = None) -> Projections:
        return Projections(
            self.base, self.primary, self.secondary, self.out, heads=self.heads, head_axis=self.axes, tuned=tuned
        )

    @property
    def results(self) -> list[Tensor]:
        return self.primary if self.out is None else self.out

    def fresh(self) -> Problem:
        """The same numbers in memory of their own, the outputs poisoned."""
        out = None if self.out is None else [poison(tensor) for tensor in self.out]
        copies = [[tensor.clone() for tensor in role] for role in (self.base, self.primary, self.secondary)]
        return Problem(*copies, out, self.heads, self.axes)


@dataclass(frozen=True)
class Parameters:
    k: float = 0.6
    lam: float = 0.5
    alpha: float = 0.2
    scale: float = 1.0

    def keep(self, heads: int) -> int:
        return reference.keep_count(self.k, heads)

    @property
    def weights(self) -> tuple[float, float]:
        coefficient = reference.layer_coefficient(self.lam, self.alpha, layer=2, layers=6)
        return coefficient, 1.0 - coefficient


def poison(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, math.nan)


def make(
    shapes: Sequence[tuple[int, ...]], heads: int, mix: str = "float32", axes: Sequence[int] = (), seed: int = 0
) -> Problem:
    """Base of spread 0.1, with task vectors that grow from head to head so that the ranking is clear."""
    generator = torch.Generator().manual_seed(seed)
    b, m1, m2, out = MIXES[mix]
    axes = list(axes) or [0] * len(shapes)
    problem = Problem([], [], [], None if out is None else [], heads, axes)
    for shape, axis in zip(shapes, axes, strict=True):
        order = torch.randperm(heads, generator=generator)
        growth = (1 + order / heads).repeat_interleave(shape[axis] // heads)
        growth = growth.view([-1 if a == axis else 1 for a in range(len(shape))])
        base = torch.randn(shape, generator=generator) * 0.1
        problem.base.append(base.to(DEVICE, b))
        for tunes, dtype in ((problem.primary, m1), (problem.secondary, m2)):
            tunes.append((base + growth * 0.01 * torch.randn(shape, generator=generator)).to(DEVICE, dtype))
        if problem.out is not None:
            problem.out.append(torch.full(shape, math.nan, dtype=out, device=DEVICE))
    return problem


def expected(problem: Problem, parameters: Parameters) -> list[reference.MergedTensor]:
    """What the oracle finds, on the CPU."""
    found = [
        reference.merge_tensor(
            b.cpu(), m1.cpu(), m2.cpu(), k=parameters.k, lam=parameters.lam, alpha=parameters.alpha, layer=2, layers=6,
            heads=problem.heads, head_axis=axis, attention_scale=parameters.scale, out_dtype=out.dtype,
        )
        for b, m1, m2, out, axis in zip(
            problem.base, problem.primary, problem.secondary, problem.results, problem.axes, strict=True
        )
    ]  # fmt: skip
    # A result that is a source itself would change with it in place.
    return [reference.MergedTensor(one.value.clone(), one.selected, one.squared_scores) for one in found]


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    assert found.dtype == wanted.dtype
    return torch.equal(found.cpu().view(BITS[found.dtype]), wanted.cpu().view(BITS[wanted.dtype]))


def assert_equal(problem: Problem, scores: Tensor, selected: Tensor, wanted: list[reference.MergedTensor]) -> None:
    heads, scores = problem.heads, scores.cpu()
    for g, want in enumerate(wanted):
        error = (scores[g, :heads] - want.squared_scores).abs()
        assert (error <= 1e-6 * want.squared_scores).all(), f"projection {g}: {error / want.squared_scores}"
        assert not scores[g, heads:].any()
        assert tuple(selected[g].nonzero().flatten().tolist()) == want.selected, f"projection {g}"
        assert same_bits(problem.results[g], want.value), f"projection {g}"


def assert_merges(
    problem: Problem,
    parameters: Parameters | None = None,
    programs: int | None = 3,
    tuned: Tuning | None = None,
    two_launches: bool = True,
) -> None:
    """Both ways, from fresh memory, against the oracle."""
    parameters = parameters or Parameters()
    wanted = expected(problem, parameters)
    for want in wanted:
        margin = reference.margin(want.squared_scores, parameters.k)
        assert margin is None or margin == 0 or margin > 1e-5, "another seed: this selection is not clear"
    keep, (c1, c2) = parameters.keep(problem.heads), parameters.weights

    fused = problem.fresh()
    plan = fused.plan(tuned)
    scores, selected = fused_merge(plan, keep, c1, c2, scale=parameters.scale, programs=programs)
    assert_equal(fused, scores, selected, wanted)
    check(plan)
    if not two_launches:
        return

    apart = problem.fresh()
    plan = apart.plan(tuned)
    scores = score_heads(plan)
    check(plan)
    selected = apply_heads(plan, scores, keep, c1, c2, scale=parameters.scale)
    assert_equal(apart, scores, selected, wanted)
    check(plan)


LAYER = [(128, 128), (128,), (128, 128)]
"""A projection, a bias, and one with heads of columns."""
