"""What an inspection of whole models says of a tensor, naively in torch: in float64, with the masks of the oracles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hsa.reference.masking import (
    Keep,
    MaskedVectors,
    agreeing,
    at_least_nth,
    at_random,
    between_outliers,
    by_rank,
    each,
    in_order,
    largest,
    masked,
    rounded,
    task_vectors,
    terms,
)

RESCALED = {"ties": False, "breadcrumbs": False, "breadcrumbs_ties": False}
"""Methods that do not rescale unless they are told to."""

VOTING = {"ties", "dare_ties", "breadcrumbs_ties", "della", "sce"}


@dataclass(frozen=True)
class Vectors:
    """Of N vectors: base's norm, norms [N], cosines [N][N] (None for a zero vector), and counts."""

    base: float
    norms: list[float]
    cosines: list[list[float | None]]
    moved: list[int]
    shared: int
    disagreeing: int


@dataclass(frozen=True)
class Kept:
    """Of each of N models [N]: kept elements, their share of the squared norm, kept ones that are not 0, and those of
    them that agree with the elected sign (None without a vote)."""

    kept: list[int]
    energy: list[float | None]
    moved: list[int]
    agreeing: list[int] | None


def vectors(base: torch.Tensor | None, models: Sequence[torch.Tensor]) -> Vectors:
    """The vectors of a tensor: task vectors in float32, or without a base the models."""
    found = [each.float() for each in models] if base is None else task_vectors(base, models, torch.float32)
    wide = [each.double().flatten() for each in found]
    norms = [float(each.norm()) for each in wide]
    signs = torch.stack([each.sign().flatten() for each in found])
    several = (signs != 0).sum(0) > 1
    both = (signs > 0).any(0) & (signs < 0).any(0)
    return Vectors(
        0.0 if base is None else float(base.double().norm()),
        norms,
        [
            [float(a @ b) / (one * two) if one and two else None for b, two in zip(wide, norms, strict=True)]
            for a, one in zip(wide, norms, strict=True)
        ],
        [int((each != 0).sum()) for each in found],
        int(several.sum()),
        int((several & both).sum()),
    )


def kept(method: str, base: torch.Tensor, models: Sequence[torch.Tensor], name: str, options: dict[str, Any]) -> Kept:
    """What a method keeps of a tensor's task vectors."""
    found = _masked(method, base, models, name, options)
    weights = options.get("weights") or [1.0] * len(models)
    coefficients = [w * f for w, f in zip(weights, found.factors, strict=True)]
    squares = [d.double() ** 2 for d in found.deltas]
    nonzero = [mask & (d != 0) for mask, d in zip(found.masks, found.deltas, strict=True)]
    votes = [int(each.sum()) for each in agreeing(terms(found, coefficients))] if method in VOTING else None
    return Kept(
        [int(mask.sum()) for mask in found.masks],
        [
            float(square[mask].sum() / square.sum()) if square.sum() > 0 else None
            for square, mask in zip(squares, found.masks, strict=True)
        ],
        [int(each.sum()) for each in nonzero],
        votes,
    )


def _masked(
    method: str, base: torch.Tensor, models: Sequence[torch.Tensor], name: str, options: dict[str, Any]
) -> MaskedVectors:
    if method in ("sce", "ram"):
        deltas = task_vectors(base, models, torch.float32)
        masks = _selected(deltas, options) if method == "sce" else _moved(deltas, options.get("epsilon", 1e-5))
        return MaskedVectors(deltas, masks, [1.0] * len(deltas))
    rescale = options.get("rescale", RESCALED.get(method, True))
    return masked(
        base, models, options.get("density", 1.0), rescale, torch.float32, _keep(method, models, name, options)
    )


def _keep(method: str, models: Sequence[torch.Tensor], name: str, options: dict[str, Any]) -> Keep:
    seed = options.get("seed", 0)
    if method == "ties":
        return largest()
    if method.startswith("breadcrumbs"):
        return between_outliers(each(options.get("gamma", 0.01), models))
    if method.startswith("dare"):
        return at_random(seed, name, None)
    return by_rank(each(options.get("epsilon", 0.15), models), seed, name, None)


def _moved(deltas: list[torch.Tensor], epsilon: float) -> list[torch.Tensor]:
    return [d.abs() > rounded(epsilon, torch.float32) for d in deltas]


def _selected(deltas: list[torch.Tensor], options: dict[str, Any]) -> list[torch.Tensor]:
    if options.get("select_topk", 1.0) >= 1:
        return [torch.ones_like(d, dtype=torch.bool) for d in deltas]
    wide = [d.double() for d in deltas]
    mean = in_order(wide) / len(wide)
    variance = (in_order([(d - mean) * (d - mean) for d in wide]) / len(wide)).float()
    mask = at_least_nth(variance, int(options["select_topk"] * int(variance.count_nonzero())))
    return [mask] * len(deltas)
