"""NuSLERP: spherical linear interpolation between two models, or between their task vectors where there is a base.

    B + sin((1 - t) * o) / sin(o) * d_1 + sin(t * o) / sin(o) * d_2        with t = w_2 / (w_1 + w_2)

and `o` the angle between `d_1` and `d_2`. Parallel and opposite vectors are interpolated linearly. Each tensor is one
vector. With `flatten` off, each row or each column is a vector that is interpolated separately.

Source: mergekit 0.1.5, method nuslerp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hsa.methods.arcs import clamped, on_the_arc, on_the_line
from hsa.methods.base import Contract
from hsa.methods.gram import Gram
from hsa.methods.gram_combination import Axis, GroupedCombination
from hsa.methods.model_method import WeightedSettings
from hsa.methods.settings import setting
from hsa.methods.tensors import TensorTask

if TYPE_CHECKING:
    from hsa.system.dtypes import Array

SMALLEST_SUM = 1e-6
"""Weights whose sum is nearer to 0 than this give t = 0.5, as in mergekit."""

SHORTEST = 1e-7
"""Vectors shorter than this are treated as this long when the cosine is computed, as in mergekit."""

COLLINEAR = 1e-8
"""If the sine of the angle is below this, interpolation is linear, as in mergekit."""

NO_ANGLE = 2.0**-46
"""Interpolation is also linear if the cosine is this close to 1 or -1. Sums in float64 leave no angle there, and the
arc between opposite vectors would multiply their rounding errors by 1e8."""


@dataclass(frozen=True)
class NuslerpSettings(WeightedSettings):
    """Settings of NuSLERP."""

    method = "nuslerp"
    row_wise: bool = setting(
        False, "Without flatten: along the first axis of a tensor instead of its last.", structural=True
    )
    flatten: bool = setting(True, "Take each tensor as one vector, not row by row.", structural=True)


class Nuslerp(GroupedCombination[NuslerpSettings]):
    """Spherical interpolation between two models.

    Example:
        >>> hsa.merge(method="nuslerp", models=["m1", "m2"], weights=[1, 3], output="merged")  # doctest: +SKIP
    """

    name = "nuslerp"
    title = "NuSLERP"
    formula = (
        "B + sin((1 - t) * o) / sin(o) * d_1 + sin(t * o) / sin(o) * d_2, t = w_2 / (w_1 + w_2), "
        "o the angle between d_1 and d_2, d_i = M_i - B (without base B is 0)"
    )
    source = "mergekit 0.1.5 (Goddard et al., Arcee's MergeKit, EMNLP 2024 industry track, arXiv 2403.13257)"
    citation = """@inproceedings{goddard2024mergekit,
  title={Arcee's {MergeKit}: A toolkit for merging large language models},
  author={Goddard, Charles and others},
  booktitle={EMNLP: Industry Track},
  year={2024}
}"""
    contract = Contract(base="optional", least=2, most=2)
    Settings = NuslerpSettings

    def formula_with(self, parameters: Mapping[str, Any]) -> str:
        axis = self.axis(NuslerpSettings.from_dict(parameters))
        return f"{self.formula}, each of the {axis} by itself" if axis else self.formula

    def axis(self, settings: NuslerpSettings) -> Axis | None:
        if settings.flatten:
            return None
        return "columns" if settings.row_wise else "rows"

    def coefficients(self, task: TensorTask, gram: Gram, settings: NuslerpSettings) -> tuple[float, float]:
        return interpolated(gram[0][0], gram[0][1], gram[1][1], self._t(task, settings))

    def group_coefficients(self, task: TensorTask, entries: Array, settings: NuslerpSettings) -> Array:
        import numpy as np

        t = self._t(task, settings)
        squares, products, others = entries.tolist()
        groups = zip(squares, products, others, strict=True)
        return np.array([interpolated(one, product, two, t) for one, product, two in groups])

    def _t(self, task: TensorTask, settings: NuslerpSettings) -> float:
        weights = settings.each("weights", task)
        whole = math.fsum(weights)
        return 0.5 if abs(whole) < SMALLEST_SUM else weights[1] / whole


def interpolated(one: float, product: float, two: float, t: float) -> tuple[float, float]:
    """The coefficients of two vectors by their squared norms and their product.

    Example:
        >>> interpolated(1.0, -2.0, 4.0, 0.25)  # opposite
        (0.75, 0.25)
    """
    shortest = SHORTEST * SHORTEST
    cosine = clamped(product / math.sqrt(max(one, shortest) * max(two, shortest)))
    if 1.0 - abs(cosine) < NO_ANGLE or abs(math.sin(math.acos(cosine))) < COLLINEAR:
        return on_the_line(t)
    return on_the_arc(cosine, t)
