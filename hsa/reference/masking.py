"""The parts of `masks_and_votes`: masks of task vectors, how they are combined, and sums in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hsa.reference import philox
from hsa.reference.sums import total

PerModel = float | Sequence[float]
Rescale = bool | Literal["density"]
Keep = Callable[[Tensor, int, float], Tensor]
"""A function of a task vector, the index of its model and a density below 1. It returns the mask of kept elements, a
bool tensor of the vector's shape."""

LEAST_WEIGHT_SUM, LEAST_SUM, CANCELLED = 1e-8, 1e-7, 2.0**-24


class MaskedVectors(NamedTuple):
    """The task vectors, the mask of kept elements of each, and the factor on each."""

    deltas: list[Tensor]
    masks: list[Tensor]
    factors: list[float]


# --- masks ---------------------------------------------------------------------------------------------------------


def masked(
    base: Tensor, models: Sequence[Tensor], density: PerModel, rescale: Rescale, dtype: torch.dtype, keep: Keep
) -> MaskedVectors:
    """The task vectors, masked. At density 1 all elements are kept."""
    result = MaskedVectors(task_vectors(base, models, dtype), [], [])
    for i, (d, share) in enumerate(zip(result.deltas, each(density, models), strict=True)):
        mask = torch.ones_like(d, dtype=torch.bool) if share >= 1 else keep(d, i, share)
        result.masks.append(mask)
        result.factors.append(1.0 if share >= 1 else rescaling(d, mask, share, rescale))
    return result


def rescaling(d: Tensor, mask: Tensor, density: float, rescale: Rescale) -> float:
    """The factor that compensates for the dropped elements."""
    if rescale == "density":
        return 1 / density if density > 0 else 1.0
    if not rescale:
        return 1.0
    whole, kept = total(d.abs().double()), total(where(mask, d.abs()).double())
    return 1.0 if whole < LEAST_SUM or kept < LEAST_SUM else whole / kept


def largest() -> Keep:
    """Keep the ``int(density * n)`` largest magnitudes."""
    return lambda d, model, share: at_least_nth(d, int(share * d.numel()))


def between_outliers(gamma: Sequence[float]) -> Keep:
    """Keep the ``int(density * n)`` largest magnitudes below the outliers."""

    def keep(d: Tensor, model: int, share: float) -> Tensor:
        count = int(share * d.numel())
        top = min(int(gamma[model] * d.numel()), d.numel() - count)
        if count == 0:
            return torch.zeros_like(d, dtype=torch.bool)
        magnitudes = d.abs()
        descending = magnitudes.flatten().sort(descending=True).values
        return (magnitudes >= descending[top + count - 1]) & (magnitudes <= descending[top])

    return keep


def at_random(seed: int, name: str, numbers: Sequence[int] | None) -> Keep:
    """Keep each element with the same probability."""

    def keep(d: Tensor, model: int, share: float) -> Tensor:
        number = model if numbers is None else numbers[model]
        return philox.kept(share, d.shape, seed=seed, number=number, name=name)

    return keep


def by_rank(epsilon: Sequence[float], seed: int, name: str, numbers: Sequence[int] | None) -> Keep:
    """Keep each element with a probability that depends on the rank of its magnitude along axis 1."""

    def keep(d: Tensor, model: int, share: float) -> Tensor:
        if share <= 0 or d.numel() == 0:
            return torch.zeros_like(d, dtype=torch.bool)
        rows = d.abs() if d.dim() > 1 else d.abs().reshape(1, -1)
        length = rows.shape[1]
        ranks = rows.sort(dim=1, stable=True).indices.argsort(dim=1)
        low, width = share - epsilon[model], 2 * epsilon[model]
        relative = [r / (length - 1) for r in range(length)] if length > 1 else [0.5]
        limits = torch.tensor([math.floor((low + width * r) * 2.0**32) for r in relative])
        number = model if numbers is None else numbers[model]
        words = philox.words(0, d.numel(), philox.key_of(seed, number, name))
        return words.reshape(d.shape) < limits[ranks].reshape(d.shape)

    return keep


def at_least_nth(values: Tensor, n: int) -> Tensor:
    """Bool: whether each magnitude is at least the ``n``-th largest; False everywhere if ``n`` is 0."""
    if n == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    magnitudes = values.abs()
    return magnitudes >= magnitudes.flatten().sort(descending=True).values[n - 1]


# --- putting together ----------------------------------------------------------------------------------------------


def summed(vectors: MaskedVectors, weights: Sequence[float] | None, normalize: bool, lam: float) -> Tensor:
    """The weighted sum of masked task vectors."""
    weights = [1.0] * len(vectors.deltas) if weights is None else weights
    divisor = added(weights) if normalize else 1.0
    divisor = 1.0 if abs(divisor) < LEAST_WEIGHT_SUM else divisor
    return in_order(terms(vectors, [lam * w / divisor * f for w, f in zip(weights, vectors.factors, strict=True)]))


def voted(vectors: MaskedVectors, weights: Sequence[float] | None, normalize: bool, lam: float) -> Tensor:
    """The weighted sum of the elements of masked task vectors that have the elected sign."""
    weights = [1.0] * len(vectors.deltas) if weights is None else weights
    ballots = terms(vectors, [w * f for w, f in zip(weights, vectors.factors, strict=True)])
    agree = agreeing(ballots)

    def factor(subset: list[int]) -> float:
        chosen = [weights[i] for i in subset]
        divisor, size = added(chosen), added([abs(w) for w in chosen])
        return lam / divisor if normalize and abs(divisor) > CANCELLED * size else lam

    acc = in_order([where(mask, x) for mask, x in zip(agree, ballots, strict=True)])
    return acc * by_subset(agree, factor, acc.dtype)


def terms(vectors: MaskedVectors, coefficients: Sequence[float]) -> list[Tensor]:
    """The kept elements of each task vector, multiplied by its coefficient; 0 elsewhere."""
    scalars = [rounded(each, vectors.deltas[0].dtype) for each in coefficients]
    return [where(mask, a * d) for d, mask, a in zip(vectors.deltas, vectors.masks, scalars, strict=True)]


def agreeing(ballots: Sequence[Tensor]) -> list[Tensor]:
    """Bool for each: whether its elements have the sign of the sum of all. Where the sum is zero, plus is elected."""
    elected = in_order(ballots) >= 0
    return [torch.where(elected, x > 0, x < 0) for x in ballots]


def by_subset(masks: Sequence[Tensor], value: Callable[[list[int]], float], dtype: torch.dtype) -> Tensor:
    """For each element, the value of the subset of models whose mask is true there, rounded to ``dtype``."""
    models = range(len(masks))
    subsets = [[i for i in models if number >> i & 1] for number in range(1 << len(masks))]
    index = torch.zeros(masks[0].shape, dtype=torch.int64)
    for i, mask in enumerate(masks):
        index = index + (mask.to(torch.int64) << i)
    return torch.tensor([value(subset) for subset in subsets], dtype=torch.float64).to(dtype)[index]


def in_order(addends: Sequence[Tensor]) -> Tensor:
    """The sum of tensors, added one after another."""
    acc = addends[0]
    for addend in addends[1:]:
        acc = acc + addend
    return acc


def displaced(
    base: Tensor, models: Sequence[Tensor], displacement: Tensor, out_dtype: torch.dtype | None, dtype: torch.dtype
) -> Tensor:
    """``B + D`` in the dtype of the result."""
    return (base.to(dtype) + displacement).to(result_dtype(models, out_dtype, dtype))


# --- numbers -------------------------------------------------------------------------------------------------------


def added(values: Sequence[float]) -> float:
    """The sum of a few float64 numbers, rounded once."""
    return math.fsum(values)


def task_vectors(base: Tensor, models: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """``M_i - B``."""
    return [model.to(dtype) - base.to(dtype) for model in models]


def where(mask: Tensor, values: Tensor) -> Tensor:
    """The values where the mask is true, +0 elsewhere."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype))


def rounded(value: float, dtype: torch.dtype) -> Tensor:
    """A float64 number, rounded once."""
    return torch.tensor(value, dtype=torch.float64).to(dtype)


def each(values: PerModel, models: Sequence[Tensor]) -> Sequence[float]:
    """One number for each model."""
    return [values] * len(models) if isinstance(values, (int, float)) else values


def result_dtype(models: Sequence[Tensor], out_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """The first model's dtype unless another is given; float64 if the arithmetic is float64."""
    if dtype == torch.float64:
        return torch.float64
    return models[0].dtype if out_dtype is None else out_dtype
