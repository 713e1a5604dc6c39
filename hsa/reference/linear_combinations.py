"""Merges that are linear combinations, in plain torch: the specification in code.

Every result is ``B + sum_i a_i d_i`` with the task vectors ``d_i = M_i - B``, or ``sum_i a_i M_i`` if no base is used.
The methods differ only in the coefficients ``a_i``, which `gram_coefficients` computes in float64.

Task vectors are float32 differences, and each coefficient is rounded once to float32. The sum is ``acc = a_1 v_1``,
then ``acc + a_i v_i`` in the order of the models, then ``B + acc``, all in float32, with one rounding to the element
type of the result. With ``dtype=torch.float64``, everything is evaluated and returned in float64. The code is
deliberately slow and simple, and shares nothing with the code that it checks. Arguments are trusted.

Each method is a function ``(base, models, *, its parameters, out_dtype=None, dtype=torch.float32) -> Tensor``.
``base`` and ``models`` are floating tensors of the same shape; element types may differ. The result has the element
type of the first model unless ``out_dtype`` is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hsa.reference.gram_coefficients import (
    Coefficients,
    gram_matrices,
    karcher_coefficients,
    linear_coefficients,
    model_stock_coefficients,
    multislerp_coefficients,
    nuslerp_coefficients,
    slerp_coefficients,
    task_arithmetic_coefficients,
)
from hsa.reference.sums import added_blocks, block_sums, column_sums

Cut = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""Two functions: one arranges a tensor as a matrix of vectors, the other sums products over each vector."""


def linear(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``sum w_i M_i``, divided by ``sum w`` with ``normalize``; ``base`` is None. Weights are 1 by default.

    Source: Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482.
    """
    coefficients = linear_coefficients(weights or [1.0] * len(models), normalize)
    return combined(None, _widened(models, dtype), [coefficients], _flat, _result_dtype(models, out_dtype, dtype))


def task_arithmetic(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    lam: float = 1.0,
    normalize: bool = False,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``B + lam * sum w_i d_i``, the sum divided by ``sum w`` with ``normalize``.

    Weights are 1 by default and may be negative.

    Source: Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089.
    """
    wide, vectors = _vectors(base, models, dtype)
    coefficients = task_arithmetic_coefficients(weights or [1.0] * len(models), lam, normalize)
    return combined(wide, vectors, [coefficients], _flat, _result_dtype(models, out_dtype, dtype))


def slerp(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    t: float,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Spherical interpolation from ``base`` (t = 0) to the only model (t = 1), both as vectors.

    Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
    """
    assert base is not None
    (model,) = models
    vectors = _widened([base, model], dtype)
    (gram,) = gram_matrices([_flat(vector) for vector in vectors], _row_sums)
    coefficients = slerp_coefficients(gram, t)
    return combined(None, vectors, [coefficients], _flat, _result_dtype(models, out_dtype, dtype))


def nuslerp(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    row_wise: bool = False,
    flatten: bool = True,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Spherical interpolation between the task vectors of two models, or between the models if there is no base.

    With ``flatten``, the tensor is one vector. Otherwise the vectors run along its last axis, or along its first axis
    with ``row_wise``, and each pair of vectors is interpolated separately.

    Source: mergekit.
    """
    wide, vectors = _vectors(base, models, dtype)
    cut: Cut = (_flat, _row_sums)
    if not flatten and vectors[0].ndim > 1 and vectors[0].numel():
        cut = (_columns, column_sums) if row_wise else (_rows, _row_sums)
    arrange, sums = cut
    grams = gram_matrices([arrange(vector) for vector in vectors], sums)
    coefficients = [nuslerp_coefficients(gram, weights or [1.0, 1.0]) for gram in grams]
    return combined(wide, vectors, coefficients, arrange, _result_dtype(models, out_dtype, dtype))


def multislerp(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The normalized weighted sum of the directions, times the weighted mean of the norms.

    Source: mergekit; Goddard, Multi-SLERP, goddard.blog.
    """
    wide, vectors = _vectors(base, models, dtype)
    (gram,) = gram_matrices([_flat(vector) for vector in vectors], _row_sums)
    coefficients = multislerp_coefficients(gram, weights or [1.0] * len(models), normalize_weights, eps)
    return combined(wide, vectors, [coefficients], _flat, _result_dtype(models, out_dtype, dtype))


def karcher(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The Karcher mean of the models on the sphere, times their mean norm; ``base`` is None.

    Source: mergekit; Karcher, Riemannian center of mass and mollifier smoothing, 1977.
    """
    vectors = _widened(models, dtype)
    (gram,) = gram_matrices([_flat(vector) for vector in vectors], _row_sums)
    coefficients = karcher_coefficients(gram, max_iter, tol)
    return combined(None, vectors, [coefficients], _flat, _result_dtype(models, out_dtype, dtype))


def model_stock(
    base: Tensor | None,
    models: Sequence[Tensor],
    *,
    filter_wise: bool = False,
    out_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``t * mean(M_i) + (1 - t) * B`` of at least two models, with ``t`` from the angles between their task vectors.

    With ``filter_wise``, each vector along the last axis is merged separately.

    Source: Jang, Yun, Han, Model Stock: All we need is just a few fine-tuned models, ECCV 2024, arXiv 2403.19522.
    """
    wide, vectors = _vectors(base, models, dtype)
    arrange, sums = _flat, _row_sums
    if filter_wise and vectors[0].ndim > 1 and vectors[0].numel():
        arrange, sums = _rows, _row_sums
    coefficients = [model_stock_coefficients(gram) for gram in gram_matrices([arrange(v) for v in vectors], sums)]
    return combined(wide, vectors, coefficients, arrange, _result_dtype(models, out_dtype, dtype))


# --- arithmetic -------------------------------------------------------------------------------------------------------


def combined(
    base: Tensor | None,
    vectors: Sequence[Tensor],
    coefficients: Sequence[Coefficients],
    arrange: Callable[[Tensor], Tensor],
    final: torch.dtype,
) -> Tensor:
    """``base + sum a_i v_i`` in the precision of the vectors, rounded to ``final``; ``coefficients`` [groups][N].

    ``arrange`` reshapes a vector into its groups, which are rows, or columns (`_columns`).
    """
    shape, dtype = vectors[0].shape, vectors[0].dtype
    by_vector = torch.tensor(coefficients, dtype=dtype).T
    factors = [each if arrange is _columns else each[:, None] for each in by_vector]
    acc = factors[0] * arrange(vectors[0])
    for factor, vector in zip(factors[1:], vectors[1:], strict=True):
        acc = acc + factor * arrange(vector)
    acc = acc.reshape(shape)
    merged: Tensor = acc if base is None else base + acc
    return merged.to(final)


def _widened(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype) for tensor in tensors]


def _vectors(base: Tensor | None, models: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor | None, list[Tensor]]:
    """Base and the task vectors, or None and the models if there is no base."""
    wide = _widened(models, dtype)
    if base is None:
        return None, wide
    (origin,) = _widened([base], dtype)
    return origin, [model - origin for model in wide]


def _result_dtype(models: Sequence[Tensor], out_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    if dtype == torch.float64:
        return torch.float64
    return models[0].dtype if out_dtype is None else out_dtype


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _columns(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1)


def _row_sums(products: Tensor) -> Tensor:
    return added_blocks(block_sums(products))
