"""Methods that mask task vectors and let the models vote on signs, in plain torch: the specification in code.

With the base ``B``, models ``M_i``, their weights ``w_i`` and the task vectors ``d_i = M_i - B``, each method keeps
some elements of each ``d_i``, sets the others to zero, combines the task vectors to ``D`` and returns ``B + D``. There
are two ways to combine them:

- by a sum: ``D = sum of a_i * d_i`` with ``a_i = lambda * w_i / W * f_i``, where ``W`` is the sum of the weights with
  ``normalize``, and 1 without it or if that sum is below 1e-8;
- by a vote: with ``x_i = w_i * f_i * d_i``, the elected sign is that of ``sum x_i``, or plus where the sum is zero. A
  model agrees where its ``x_i`` has that sign, and ``D = lambda / W * sum of x_i over the agreeing``, where ``W`` is
  the sum of their weights with ``normalize``, and 1 without it or where their weights cancel.

``f_i`` is a factor that compensates for dropped elements: ``sum |d_i| / sum |kept d_i|`` with ``rescale`` True (1 if
either sum is below 1e-7), one over the density with ``"density"``, and 1 with False.

Every function evaluates this in float32, operation by operation in the order written, or in float64. Factors and
coefficients are computed in float64 and rounded once. Sums over a tensor are float64 in a fixed order: 64 lanes inside
each 1,024 elements, then halves of lanes, then block after block. Thresholds keep all elements that tie with the last
kept one. Arguments are trusted. Nothing is shared with the code that this module checks.

All functions share these arguments. ``base`` and ``models`` are floating tensors of the same shape, whose dtypes may
differ. ``weights`` has one number for each model, by default 1. ``density``, ``gamma`` and ``epsilon`` are one number,
or one for each model. ``seed``, ``name`` and ``numbers`` are as in `philox.key_of`; ``numbers`` is 0, 1, ... by
default. ``out_dtype`` is the dtype of the result, by default the first model's. ``dtype`` is the dtype of the
arithmetic; float64 is then also the result's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hsa.reference.masking import (
    PerModel,
    Rescale,
    added,
    agreeing,
    at_least_nth,
    at_random,
    between_outliers,
    by_rank,
    by_subset,
    displaced,
    each,
    in_order,
    largest,
    masked,
    result_dtype,
    rounded,
    summed,
    task_vectors,
    voted,
    where,
)
from hsa.reference.sums import total


def ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    density: PerModel = 1.0,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    rescale: Rescale = False,
    lam: float = 1.0,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Keep the ``int(density * n)`` largest magnitudes of each task vector, then vote.

    Source: Yadav, Tam, Choshen, Raffel, Bansal, "TIES-Merging", NeurIPS 2023, arXiv 2306.01708.
    """
    vectors = masked(base, models, density, rescale, dtype, largest())
    return displaced(base, models, voted(vectors, weights, normalize, lam), out_dtype, dtype)


def dare_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    name: str,
    numbers: Sequence[int] | None = None,
    density: PerModel = 1.0,
    weights: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: Rescale = True,
    lam: float = 1.0,
    seed: int = 0,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Keep each element with the probability ``density``, then sum.

    Source: Yu, Yu, Yu, Huang, Li, "Language models are super Mario", ICML 2024, arXiv 2311.03099.
    """
    vectors = masked(base, models, density, rescale, dtype, at_random(seed, name, numbers))
    return displaced(base, models, summed(vectors, weights, normalize, lam), out_dtype, dtype)


def dare_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    name: str,
    numbers: Sequence[int] | None = None,
    density: PerModel = 1.0,
    weights: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: Rescale = True,
    lam: float = 1.0,
    seed: int = 0,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Keep each element with the probability ``density``, then vote. Source: as for `dare_linear`."""
    vectors = masked(base, models, density, rescale, dtype, at_random(seed, name, numbers))
    return displaced(base, models, voted(vectors, weights, normalize, lam), out_dtype, dtype)


def breadcrumbs(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    weights: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: Rescale = False,
    lam: float = 1.0,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Drop the ``min(int(gamma * n), n - int(density * n))`` largest magnitudes of each task vector, and the smallest
    until ``int(density * n)`` stay, then sum.

    Source: Davari, Belilovsky, "Model Breadcrumbs", ECCV 2024, arXiv 2312.06795.
    """
    vectors = masked(base, models, density, rescale, dtype, between_outliers(each(gamma, models)))
    return displaced(base, models, summed(vectors, weights, normalize, lam), out_dtype, dtype)


def breadcrumbs_ties(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    weights: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: Rescale = False,
    lam: float = 1.0,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Mask as `breadcrumbs` does, then vote."""
    vectors = masked(base, models, density, rescale, dtype, between_outliers(each(gamma, models)))
    return displaced(base, models, voted(vectors, weights, normalize, lam), out_dtype, dtype)


def della_linear(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    name: str,
    numbers: Sequence[int] | None = None,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    weights: Sequence[float] | None = None,
    normalize: bool = False,
    rescale: Rescale = True,
    lam: float = 1.0,
    seed: int = 0,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Keep each element with the probability ``density - epsilon + 2 * epsilon * r``, then sum.

    ``r`` is the rank of its magnitude along axis 1 (for a vector, among all elements), from 0 for the smallest to 1 for
    the largest. Among equal magnitudes, the later one ranks higher. If there is only one element, ``r`` is 0.5.

    Source: Deep, Bhardwaj, Poria, "DELLA-Merging", 2024, arXiv 2406.11617.
    """
    keep = by_rank(each(epsilon, models), seed, name, numbers)
    vectors = masked(base, models, density, rescale, dtype, keep)
    return displaced(base, models, summed(vectors, weights, normalize, lam), out_dtype, dtype)


def della(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    name: str,
    numbers: Sequence[int] | None = None,
    density: PerModel = 1.0,
    epsilon: PerModel = 0.15,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    rescale: Rescale = True,
    lam: float = 1.0,
    seed: int = 0,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Mask as `della_linear` does, then vote."""
    keep = by_rank(each(epsilon, models), seed, name, numbers)
    vectors = masked(base, models, density, rescale, dtype, keep)
    return displaced(base, models, voted(vectors, weights, normalize, lam), out_dtype, dtype)


def sce(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    select_topk: float = 1.0,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Select, calculate, erase: merge the elements with the largest variances over the models.

    Where the variance is among the ``int(select_topk * nonzero)`` largest, the merged task vector is the mean of the
    task vectors that have the elected sign, weighted by their mean squares; elsewhere it is 0. The variance is computed
    in float64 and rounded to ``dtype``; ``nonzero`` is the number of elements where it is not 0. The elected sign is
    that of the sum of the task vectors. If the sum of the weights is below 1e-6, all weights are equal.

    Source: Wan et al., "FuseChat", 2024, arXiv 2408.07990.
    """
    deltas = task_vectors(base, models, dtype)
    if select_topk < 1:
        wide = [d.double() for d in deltas]
        mean = in_order(wide) / len(wide)
        variance = (in_order([(d - mean) * (d - mean) for d in wide]) / len(wide)).to(dtype)
        selected = at_least_nth(variance, int(select_topk * int(variance.count_nonzero())))
        deltas = [where(selected, d) for d in deltas]
    squares = [total(d.double() * d.double()) / max(1, d.numel()) for d in deltas]
    whole = added(squares)
    shares = [1 / len(deltas)] * len(deltas) if whole < 1e-6 else [square / whole for square in squares]
    agree = agreeing(deltas)
    weighted = [where(mask, rounded(share, dtype) * d) for mask, share, d in zip(agree, shares, deltas, strict=True)]
    factors = by_subset(agree, lambda subset: 1 / max(added([shares[i] for i in subset]), 1e-6), dtype)
    return displaced(base, models, in_order(weighted) * factors, out_dtype, dtype)


def ram(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    epsilon: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Merge by who moved: where only one model moved by more than ``epsilon``, its task vector; where several did, the
    mean of their task vectors.

    Source: Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", 2026, arXiv 2601.13572.
    """
    deltas = task_vectors(base, models, dtype)
    moved = [d.abs() > rounded(epsilon, dtype) for d in deltas]
    count = in_order([mask.to(dtype) for mask in moved])
    whole = in_order([where(mask, d) for mask, d in zip(moved, deltas, strict=True)])
    return displaced(base, models, whole / count.clamp(min=1), out_dtype, dtype)


def nearswap(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    t: float,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``w * M + (1 - w) * B`` with ``w = clamp(t / max(|M - B|, 1e-6), 0, 1)``, of one model.

    Source: alchemonaut, QuartetAnemoi-70B-t0.0001, on the Hugging Face Hub.
    """
    (delta,) = task_vectors(base, models, dtype)
    distance = torch.maximum(delta.abs(), rounded(1e-6, dtype))
    share = (rounded(t, dtype) / distance).clamp(0, 1)
    merged = share * models[0].to(dtype) + (1 - share) * base.to(dtype)
    return merged.to(result_dtype(models, out_dtype, dtype))
