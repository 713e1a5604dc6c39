"""Linear merge: the weighted mean of the models, also called model soup.

    sum of w_i * M_i / sum of w_i        without `normalize`: sum of w_i * M_i

Source: Wortsman et al., Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time, ICML 2022, arXiv 2203.05482.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hsa.methods.base import Contract
from hsa.methods.coefficients import Coefficients, LinearCombination
from hsa.methods.model_method import WeightedSettings
from hsa.methods.settings import setting
from hsa.methods.tensors import TensorTask
from hsa.methods.weights import shares


@dataclass(frozen=True)
class LinearSettings(WeightedSettings):
    """Settings of a linear merge."""

    method = "linear"
    normalize: bool = setting(True, "Divide by the sum of the weights.", structural=True)


class Linear(LinearCombination[LinearSettings]):
    """The weighted mean of the models; no base.

    Example:
        >>> hsa.merge(method="linear", models=["m1", "m2"], weights=[2, 1], output="merged")  # doctest: +SKIP
    """

    name = "linear"
    title = "Linear merge"
    formula = "sum(w_i * M_i) / sum(w_i)"
    source = "Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482"
    citation = """@inproceedings{wortsman2022soups,
  title={Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
         inference time},
  author={Wortsman, Mitchell and others},
  booktitle={ICML},
  year={2022}
}"""
    contract = Contract(base="none", least=1, most=8)
    Settings = LinearSettings
    on_base = False

    def formula_with(self, parameters: Mapping[str, Any]) -> str:
        settings = LinearSettings.from_dict(parameters)
        return self.formula if settings.normalize else "sum(w_i * M_i)"

    def copies_equal(self, settings: LinearSettings) -> bool:
        return settings.normalize

    def decision(
        self, task: TensorTask, measured: None, settings: LinearSettings, so_far: Coefficients | None
    ) -> Coefficients:
        weights = settings.each("weights", task)
        if not settings.normalize:
            return Coefficients(weights)
        return Coefficients(shares(weights, task.name, "normalize"))
