"""Coefficients of linear combinations from a Gram matrix, in plain torch and Python.

The Gram matrix of a tensor is ``G_ij = <v_i, v_j>``. The vectors ``v_i`` are task vectors, or the models if a method
uses no base. An entry is a float64 sum of products, added in the order that `sums` states; the products are exact if
the vectors are float32. Coefficients are computed in float64 by Python's ``math``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

Gram = list[list[float]]
"""The products of all pairs of vectors [N][N]."""

Coefficients = list[float]
"""One factor for each vector [N]."""


# --- Gram matrices ----------------------------------------------------------------------------------------------------


def gram_matrices(vectors: Sequence[Tensor], sums: Callable[[Tensor], Tensor]) -> list[Gram]:
    """The Gram matrix of each group [groups]; ``sums`` adds the products over each group."""
    wide = [vector.double() for vector in vectors]
    count = len(wide)
    entries = {(i, j): sums(wide[i] * wide[j]).tolist() for i in range(count) for j in range(i, count)}
    groups = range(len(entries[0, 0]))
    return [[[entries[min(i, j), max(i, j)][g] for j in range(count)] for i in range(count)] for g in groups]


# --- coefficients -----------------------------------------------------------------------------------------------------


def norm_product(gram: Gram, i: int, j: int) -> float:
    """``|v_i| * |v_j|``, exact if both have the same length."""
    return math.sqrt(gram[i][i] * gram[j][j])


def clamped(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))


def linear_coefficients(weights: Sequence[float], normalize: bool) -> Coefficients:
    """``w_i / sum w`` with ``normalize``, else ``w_i``. Raises ValueError if the sum of weights to normalize is below
    1e-8 in absolute value."""
    if not normalize:
        return list(weights)
    whole = math.fsum(weights)
    if abs(whole) < 1e-8:
        raise ValueError("the weights sum to 0")
    return [weight / whole for weight in weights]


def task_arithmetic_coefficients(weights: Sequence[float], lam: float, normalize: bool) -> Coefficients:
    """``lam * w_i``, divided by ``sum w`` with ``normalize``; a sum below 1e-8 in absolute value counts as 1."""
    whole = math.fsum(weights) if normalize else 1.0
    if abs(whole) < 1e-8:
        whole = 1.0
    return [lam * weight / whole for weight in weights]


def slerp_coefficients(gram: Gram, t: float) -> Coefficients:
    """Interpolation along the arc between two vectors, or along the straight line if one of them is zero or their
    cosine exceeds 0.9995."""
    product = norm_product(gram, 0, 1)
    if product == 0.0:
        return [1.0 - t, t]
    cosine = clamped(gram[0][1] / product)
    if abs(cosine) > 0.9995:
        return [1.0 - t, t]
    return on_the_arc(cosine, t)


def on_the_arc(cosine: float, t: float) -> Coefficients:
    """``sin((1 - t) o) / sin(o)`` and ``sin(t o) / sin(o)``, where ``o`` is the angle."""
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return [math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine]


def nuslerp_coefficients(gram: Gram, weights: Sequence[float]) -> Coefficients:
    """Interpolation along the arc, or along the straight line if ``abs(sin o) < 1e-8``.

    For the cosine, a vector shorter than 1e-7 counts as 1e-7 long, so that a zero vector is orthogonal to all others.
    If the cosine is within 2**-46 of 1 or -1, rounding leaves no angle, and the straight line is used too: between
    opposite vectors, the arc would multiply the rounding error by 1e8.
    """
    whole = math.fsum(weights)
    t = 0.5 if abs(whole) < 1e-6 else weights[1] / whole
    shortest = 1e-7 * 1e-7
    cosine = clamped(gram[0][1] / math.sqrt(max(gram[0][0], shortest) * max(gram[1][1], shortest)))
    if 1.0 - abs(cosine) < 2.0**-46 or abs(math.sin(math.acos(cosine))) < 1e-8:
        return [1.0 - t, t]
    return on_the_arc(cosine, t)


def multislerp_coefficients(gram: Gram, weights: Sequence[float], normalize_weights: bool, eps: float) -> Coefficients:
    """The direction of ``m = sum w_i u_i`` with ``u_i = v_i / (|v_i| + eps)``, scaled to length ``sum w_i |v_i|``.

    If ``m`` is shorter than eps, or too short for float32 to distinguish from zero, two vectors are combined by their
    weights; more than two raise ValueError. If all vectors are zero, the weights are returned. Raises ValueError also
    if weights to normalize sum to 0.
    """
    weights = linear_coefficients(weights, normalize_weights)
    count = range(len(weights))
    norms = [math.sqrt(gram[i][i]) for i in count]
    if not any(norms):
        return weights
    factors = [weights[i] / (norms[i] + eps) if norms[i] + eps > 0.0 else 0.0 for i in count]
    length = combined_length(factors, gram)
    rounding = 2.0**-24 * math.fsum(abs(factors[i]) * norms[i] for i in count)
    if length < eps or length <= rounding:
        if len(weights) == 2:
            return weights
        raise ValueError("the weighted directions cancel")
    size = math.fsum(weights[i] * norms[i] for i in count)
    return [size / length * factor for factor in factors]


def combined_length(factors: Sequence[float], gram: Gram) -> float:
    """The norm of ``sum factors_i v_i``; a square that rounding makes negative counts as 0."""
    square = 0.0
    for i in range(len(factors)):
        for j in range(len(factors)):
            square += factors[i] * factors[j] * gram[i][j]
    return math.sqrt(max(0.0, square))


def karcher_coefficients(gram: Gram, max_iter: int, tol: float) -> Coefficients:
    """The Karcher mean of the directions of the vectors longer than tol, scaled to the mean length of all vectors.

    The mean stays in the span of the directions, so the iteration works on its coefficients. A step leaves out
    directions that are closer to the mean than tol, and directions opposite to it up to rounding, to which there is no
    unique path.
    """
    norms = [math.sqrt(row[i]) for i, row in enumerate(gram)]
    chosen = [i for i, norm in enumerate(norms) if norm > tol]
    if not chosen:
        return [0.0] * len(norms)
    cosines = [[clamped(gram[i][j] / norm_product(gram, i, j)) for j in chosen] for i in chosen]
    share = 1.0 / len(chosen)
    mean = [share] * len(chosen)
    length = combined_length(mean, cosines)
    if length < tol or length == 0.0:
        mean = [1.0] + [0.0] * (len(chosen) - 1)
    else:
        mean = [each / length for each in mean]
    for _ in range(max_iter):
        tangent = tangent_at(mean, cosines, share, tol)
        step = combined_length(tangent, cosines)
        if step < tol or step == 0.0:
            break
        along, aside = math.cos(step), math.sin(step) / step
        mean = [along * here + aside * there for here, there in zip(mean, tangent, strict=True)]
    size = math.fsum(norms) / len(norms)
    result = [0.0] * len(norms)
    for i, each in zip(chosen, mean, strict=True):
        result[i] = size * each / norms[i]
    return result


def tangent_at(mean: Sequence[float], cosines: Gram, share: float, tol: float) -> Coefficients:
    """``sum share * (o_i / sin o_i) * (u_i - cos(o_i) mean)``, in the directions ``u_i``."""
    tangent = [0.0] * len(mean)
    for i, row in enumerate(cosines):
        cosine = 0.0
        for each, entry in zip(mean, row, strict=True):
            cosine += each * entry
        cosine = clamped(cosine)
        angle = math.acos(cosine)
        if angle < tol or angle == 0.0 or math.pi - angle < 1e-6:
            continue
        factor = share * (angle / math.sin(angle))
        for j in range(len(mean)):
            tangent[j] += factor * ((1.0 if j == i else 0.0) - cosine * mean[j])
    return tangent


def model_stock_coefficients(gram: Gram) -> Coefficients:
    """``t / N`` for each, with ``t = N c / (1 + (N - 1) c)``, where ``c`` is the mean cosine of the pairs.

    If that divisor is below 1e-6, ``t`` is 0: task vectors that oppose each other this much leave the base unchanged.
    """
    count = len(gram)
    cosine, pairs = 0.0, 0
    for i in range(count):
        for j in range(i + 1, count):
            cosine += clamped(gram[i][j] / max(norm_product(gram, i, j), 1e-6))
            pairs += 1
    cosine /= pairs
    divisor = 1.0 + (count - 1) * cosine
    t = 0.0 if abs(divisor) < 1e-6 else count * cosine / divisor
    return [t / count] * count
