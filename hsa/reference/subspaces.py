"""The subspace methods in plain torch: TSV-M, its boosted form, Iso-C and Iso-CTS.

Sources: Gargiulo et al., "Task Singular Vectors", CVPR 2025, arXiv 2412.00081 (`tsv_m`); arXiv 2603.05354
(`tsv_m_boosted`); Marczak et al., "No Task Left Behind", arXiv 2502.04959 (`iso_c`, `iso_cts`).

With base ``B`` and models ``M_i``, each matrix ``[m, n]`` of a linear layer is merged independently. Here
``d_i = M_i - B``, ``r = min(m, n)``, and ``d = U S V'`` is a singular value decomposition with singular values
``s_1 >= s_2 >= ...``. Any other tensor (a vector, a convolution, an embedding) becomes ``B + lambda * mean(d_i)``.

Task vectors are float32, as in every method, and so are ``B + D`` and the mean. The steps between them (decompositions,
products, sums over models) are float64. With ``dtype=torch.float64``, everything is float64.

A direction counts as zero if ``s <= max(m, n) * eps * s_1``, with the ``eps`` of float32; its singular vectors are
arbitrary. Such directions are dropped: from task vectors before their singular vectors are used, and from a matrix
before its polar factor is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 2.0**-23
"""The spacing of float32 numbers at 1."""

EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias", "lm_head", "proj_out")
"""Names of modules that are embeddings, or output projections that often share their matrix with an embedding.
Modules with `embed` in their names are embeddings too."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Singular triples, the largest first: ``left`` [m, q], ``values`` [q], ``right`` [n, q]. ``dropped`` is the number
    of directions of the matrix that counted as zero."""

    left: Tensor
    values: Tensor
    right: Tensor
    dropped: int = 0

    def first(self, count: int) -> Directions:
        return Directions(self.left[:, :count], self.values[:count], self.right[:, :count], self.dropped)


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the weight matrix of a linear layer: it has two axes, the last part of its name (if any)
    starts with `weight`, and its module is no embedding."""
    *_, module, last = "", "", *name.split(".")
    linear = last.startswith("weight") and "embed" not in module and module not in EMBEDDINGS
    return len(shape) == 2 and (not name or linear)


def directions(matrix: Tensor, largest: float | None = None) -> Directions:
    """The directions of a float64 matrix that do not count as zero. ``largest`` takes the place of ``s_1``."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    if not values.numel():
        return Directions(left, values, right.T)
    reference = values[0].item() if largest is None else largest
    kept = int((values > max(matrix.shape) * EPS * reference).sum())
    return Directions(left[:, :kept], values[:kept], right[:kept].T, len(values) - kept)


def polar(matrix: Tensor) -> Tensor:
    """The polar factor ``U V'`` of ``U S V'``, without directions that count as zero. It has the matrix's shape."""
    parts = directions(matrix)
    return parts.left @ parts.right.T


def boosted(values: Tensor, beta: float) -> Tensor:
    """Raise small singular values.

    At some singular value, the running sum reaches ``beta`` of the total. All values after it are set to it.
    """
    if not values.numel():
        return values
    running = values.cumsum(0)
    at = int((running < beta * running[-1]).sum())
    return torch.where(torch.arange(len(values)) > at, values[min(at, len(values) - 1)], values)


def assembled(parts: Sequence[Directions], shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate directions, and replace the left and the right singular vectors by their polar factors."""
    left = torch.cat([part.left for part in parts], 1) if parts else torch.zeros(shape[0], 0, dtype=torch.float64)
    right = torch.cat([part.right for part in parts], 1) if parts else torch.zeros(shape[1], 0, dtype=torch.float64)
    values = torch.cat([part.values for part in parts]) if parts else torch.zeros(0, dtype=torch.float64)
    return polar(left), values, polar(right)


def tsv_m(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    lam: float = 1.0,
    share: float | None = None,
    name: str = "",
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``B + lam * U S V'``: the first ``int(share * r)`` directions of each ``d_i``, concatenated.

    Args:
        base, models: floating tensors of the same shape; dtypes may differ.
        lam: lambda.
        share: the share of directions taken from each model, 0 to 1; None for ``1 / N``.
        name: the tensor's canonical name, which says whether it is an embedding. Without a name it is a matrix.
        out_dtype: dtype of the result, by default the first model's; without effect for ``dtype=torch.float64``.
        dtype: float32, or float64 for the value that results are measured against.
    """
    combine = _task_singular_vectors(base, models, lam, share, lambda values: values)
    return _merged(base, models, lam, combine, name, out_dtype, dtype)


def tsv_m_boosted(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    lam: float = 1.0,
    share: float | None = None,
    beta: float = 0.3,
    name: str = "",
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """As `tsv_m`, but the singular values are `boosted` by ``beta`` before the first directions are taken."""
    combine = _task_singular_vectors(base, models, lam, share, lambda values: boosted(values, beta))
    return _merged(base, models, lam, combine, name, out_dtype, dtype)


def _task_singular_vectors(
    base: Tensor, models: Sequence[Tensor], lam: float, share: float | None, boost: Callable[[Tensor], Tensor]
) -> Callable[[list[Tensor]], Tensor]:
    def combine(vectors: list[Tensor]) -> Tensor:
        count = kept_of_each(min(base.shape), len(models), share)
        parts = [directions(vector) for vector in vectors]
        taken = [Directions(part.left, boost(part.values), part.right).first(count) for part in parts]
        left, values, right = assembled(taken, base.shape)
        return lam * (left * values) @ right.T

    return combine


def kept_of_each(rank: int, models: int, share: float | None) -> int:
    """The number of directions that TSV-M takes from each task vector. ``rank`` is the smaller side of the matrix."""
    return rank // models if share is None else int(share * rank)


def iso_c(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    lam: float = 1.0,
    name: str = "",
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``B + lam * mean(S) * U V'`` with ``sum d_i = U S V'``; arguments as for `tsv_m`."""

    def combine(vectors: list[Tensor]) -> Tensor:
        common = directions(sum(vectors[1:], vectors[0]))
        return lam * _mean(common.values) * common.left @ common.right.T

    return _merged(base, models, lam, combine, name, out_dtype, dtype)


def iso_cts(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    lam: float = 1.0,
    common_share: float = 0.8,
    name: str = "",
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``B + lam * mean(S) * U V'`` of two concatenated sets of directions: the common ones, which are those of
    ``sum d_i``, and those of the rest of each ``d_i`` outside the span of the common ones.

    ``common_share`` (f) is the share of directions that come from the sum, 0 to 1; other arguments as for `tsv_m`. A
    direction of such a rest counts as zero relative to the largest singular value of ``d_i`` itself.
    """

    def combine(vectors: list[Tensor]) -> Tensor:
        of_sum, of_each = common_and_own(min(base.shape), len(models), common_share)
        common = directions(sum(vectors[1:], vectors[0])).first(of_sum)
        parts = [common]
        for vector in vectors:
            beside = vector - common.left @ (common.left.T @ vector)
            largest = torch.linalg.matrix_norm(vector, 2).item() if vector.numel() else 0.0
            parts.append(directions(beside, largest).first(of_each))
        left, values, right = assembled(parts, base.shape)
        return lam * _mean(values) * left @ right.T

    return _merged(base, models, lam, combine, name, out_dtype, dtype)


def common_and_own(rank: int, models: int, common_share: float) -> tuple[int, int]:
    """The numbers of directions that Iso-CTS takes from the sum and from each model, ``rank`` in total.

    The models' part is rounded to a multiple of their number (half to even), or rounded down if rounding up would
    exceed ``rank``.
    """
    left_over = rank - int(common_share * rank)
    of_each = min(round(left_over / models), rank // models)
    return rank - models * of_each, of_each


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else 0.0


def _merged(
    base: Tensor,
    models: Sequence[Tensor],
    lam: float,
    combine: Callable[[list[Tensor]], Tensor],
    name: str,
    out_dtype: torch.dtype | None,
    dtype: torch.dtype,
) -> Tensor:
    """``B + D``. For a matrix, ``combine`` computes ``D`` from float64 task vectors; otherwise it is
    ``lam * mean(d_i)``."""
    wide = base.to(dtype)
    vectors = [model.to(dtype) - wide for model in models]
    if is_matrix(name, base.shape):
        displacement = combine([vector.double() for vector in vectors]).to(dtype)
    else:
        coefficient = torch.tensor(lam / len(models), dtype=torch.float64).to(dtype)
        displacement = coefficient * vectors[0]
        for vector in vectors[1:]:
            displacement = displacement + coefficient * vector
    merged = wide + displacement
    return merged if dtype == torch.float64 else merged.to(models[0].dtype if out_dtype is None else out_dtype)
