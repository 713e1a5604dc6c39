"""Karcher mean: the mean of the models' directions along the surface of the sphere, times their mean norm. Each tensor
is one vector. There is no base and there are no weights.

With `u_i` the directions of the models longer than `tol`, start at their normalized mean `u`, and repeat

    o_i = acos(<u, u_i>);  T = mean of o_i / sin(o_i) * (u_i - cos(o_i) * u);  r = |T|
    u <- cos(r) * u + sin(r) * T / r

until `r` is below `tol`, at most `max_iter` times. All points lie in the span of the models. So their coefficients are
iterated by the Gram matrix, and the tensors are read only once.

Source: Karcher, Riemannian center of mass and mollifier smoothing, 1977; mergekit 0.1.5, method karcher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hsa.methods.arcs import clamped, combined_norm, norm_product
from hsa.methods.base import Contract
from hsa.methods.gram import Gram
from hsa.methods.gram_combination import GramCombination
from hsa.methods.model_method import ModelSettings
from hsa.methods.settings import MAX_FLOAT32, setting
from hsa.methods.tensors import TensorTask

OPPOSITE = 1e-6
"""An angle this close to a half turn is skipped, because rounding would decide its direction."""


@dataclass(frozen=True)
class KarcherSettings(ModelSettings):
    """Settings of a Karcher mean."""

    method = "karcher"
    max_iter: int = setting(10, "Most steps to the mean.", whole=True, low=0, high=10_000)
    tol: float = setting(1e-5, "Shortest step, smallest angle and smallest norm that count.", low=0.0, high=MAX_FLOAT32)


class Karcher(GramCombination[KarcherSettings]):
    """The Karcher mean of the models.

    Example:
        >>> hsa.merge(method="karcher", models=["m1", "m2", "m3"], output="merged")  # doctest: +SKIP
    """

    name = "karcher"
    title = "Karcher mean"
    formula = "mean(|M_i|) * u, u the Karcher mean of M_i / |M_i| on the sphere"
    source = "Karcher, Riemannian center of mass and mollifier smoothing, 1977; mergekit 0.1.5"
    citation = """@article{karcher1977riemannian,
  title={Riemannian center of mass and mollifier smoothing},
  author={Karcher, Hermann},
  journal={Communications on Pure and Applied Mathematics},
  volume={30},
  year={1977}
}"""
    contract = Contract(base="none", least=2, most=8)
    Settings = KarcherSettings

    def coefficients(self, task: TensorTask, gram: Gram, settings: KarcherSettings) -> list[float]:
        return karcher_mean(gram, settings.max_iter, settings.tol)


def karcher_mean(gram: Gram, max_iter: int, tol: float) -> list[float]:
    """The coefficients of vectors in their Karcher mean, by their Gram matrix.

    Example:
        >>> [round(each, 6) for each in karcher_mean(((1.0, 0.0), (0.0, 4.0)), 10, 1e-5)]
        [1.06066, 0.53033]
    """
    norms = [math.sqrt(row[number]) for number, row in enumerate(gram)]
    chosen = [number for number, norm in enumerate(norms) if norm > tol]
    result = [0.0] * len(norms)
    if not chosen:
        return result
    cosines = [[clamped(gram[i][j] / norm_product(gram, i, j)) for j in chosen] for i in chosen]
    mean = _start(cosines, tol)
    for _ in range(max_iter):
        tangent = _tangent(mean, cosines, tol)
        step = combined_norm(tangent, cosines)
        if step < tol or step == 0.0:
            break
        along, aside = math.cos(step), math.sin(step) / step
        mean = [along * here + aside * there for here, there in zip(mean, tangent, strict=True)]
    size = math.fsum(norms) / len(norms)
    for number, each in zip(chosen, mean, strict=True):
        result[number] = size * each / norms[number]
    return result


def _start(cosines: Sequence[Sequence[float]], tol: float) -> list[float]:
    """The normalized mean of the directions; the first of them where they cancel."""
    mean = [1.0 / len(cosines)] * len(cosines)
    length = combined_norm(mean, cosines)
    if length < tol or length == 0.0:
        return [1.0] + [0.0] * (len(cosines) - 1)
    return [each / length for each in mean]


def _tangent(mean: Sequence[float], cosines: Sequence[Sequence[float]], tol: float) -> list[float]:
    """The step to the mean, in coefficients of the directions."""
    share = 1.0 / len(cosines)
    tangent = [0.0] * len(mean)
    for number, row in enumerate(cosines):
        cosine = 0.0
        for each, entry in zip(mean, row, strict=True):
            cosine += each * entry
        cosine = clamped(cosine)
        angle = math.acos(cosine)
        if angle < tol or angle == 0.0 or math.pi - angle < OPPOSITE:
            continue
        factor = share * (angle / math.sin(angle))
        for other in range(len(mean)):
            tangent[other] += factor * ((1.0 if other == number else 0.0) - cosine * mean[other])
    return tangent
