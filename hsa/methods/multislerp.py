"""Multi-SLERP: the weighted mean of the directions of the models, or of their task vectors where there is a base.

    B + (m / |m|) * sum of w_i * |d_i|        with m = sum of w_i * d_i / (|d_i| + eps)

mergekit then takes a step along the tangent at `m`, whose length is zero in exact arithmetic; it is left out here.

Source: mergekit 0.1.5, method multislerp; goddard.blog/posts/multislerp-wow-what-a-cool-idea.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsa.errors import RequestError
from hsa.findings import Findings
from hsa.methods.arcs import combined_norm
from hsa.methods.base import Contract
from hsa.methods.gram import Gram
from hsa.methods.gram_combination import GramCombination
from hsa.methods.model_method import WeightedSettings
from hsa.methods.settings import MAX_FLOAT32, setting
from hsa.methods.tensors import TensorTask
from hsa.methods.weights import shares
from hsa.option_names import option

ROUNDING = 2.0**-24
"""A sum of directions shorter than this share of the sum of their lengths is only float32 rounding error."""


@dataclass(frozen=True)
class MultislerpSettings(WeightedSettings):
    """Settings of Multi-SLERP."""

    method = "multislerp"
    normalize_weights: bool = setting(True, "Divide the weights by their sum.", structural=True)
    eps: float = setting(1e-8, "Added to norms, and the shortest sum of directions.", low=0.0, high=MAX_FLOAT32)


class Multislerp(GramCombination[MultislerpSettings]):
    """The weighted mean of directions, with the weighted mean length of the vectors.

    Example:
        >>> hsa.merge(method="multislerp", base="b", models=["m1", "m2", "m3"], output="merged")  # doctest: +SKIP
    """

    name = "multislerp"
    title = "Multi-SLERP"
    formula = (
        "B + m / |m| * sum(w_i * |d_i|), m = sum(w_i * d_i / (|d_i| + eps)), d_i = M_i - B (without base B is 0), "
        "w_i divided by their sum"
    )
    source = "mergekit 0.1.5; Goddard, goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    citation = """@inproceedings{goddard2024mergekit,
  title={Arcee's {MergeKit}: A toolkit for merging large language models},
  author={Goddard, Charles and others},
  booktitle={EMNLP: Industry Track},
  year={2024}
}"""
    contract = Contract(base="optional", least=2, most=8)
    Settings = MultislerpSettings

    def formula_with(self, parameters: Mapping[str, Any]) -> str:
        settings = MultislerpSettings.from_dict(parameters)
        return self.formula if settings.normalize_weights else self.formula.removesuffix(", w_i divided by their sum")

    def copies_equal(self, settings: MultislerpSettings) -> bool:
        return settings.normalize_weights

    def planned_findings(self, tasks: Sequence[TensorTask], settings: MultislerpSettings) -> Findings:
        for task in tasks:
            _weights(task, settings)
        return super().planned_findings(tasks, settings)

    def coefficients(self, task: TensorTask, gram: Gram, settings: MultislerpSettings) -> tuple[float, ...]:
        weights, eps = _weights(task, settings), settings.eps
        norms = [math.sqrt(gram[i][i]) for i in range(len(gram))]
        if not any(norms):
            return weights
        factors = [
            weight / (norm + eps) if norm + eps > 0.0 else 0.0 for weight, norm in zip(weights, norms, strict=True)
        ]
        length = combined_norm(factors, gram)
        rounding = ROUNDING * math.fsum(abs(factor) * norm for factor, norm in zip(factors, norms, strict=True))
        if length < eps or length <= rounding:
            if len(weights) > 2:
                raise RequestError(
                    f"the weighted directions of the models cancel in tensor {task.name}, so that multislerp has none "
                    f"to go; give other {option('weights')}, or leave it out ({option('exclude', task.name)})"
                )
            return weights
        size = math.fsum(weight * norm for weight, norm in zip(weights, norms, strict=True))
        return tuple(size / length * factor for factor in factors)


def _weights(task: TensorTask, settings: MultislerpSettings) -> tuple[float, ...]:
    weights = settings.each("weights", task)
    return shares(weights, task.name, "normalize_weights") if settings.normalize_weights else weights
