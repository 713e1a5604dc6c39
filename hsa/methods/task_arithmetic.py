"""Task arithmetic: the weighted sum of the task vectors, added to base.

    B + lambda * sum of w_i * (M_i - B)        with `normalize`, over the sum of w_i

Source: Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hsa.methods.base import Contract
from hsa.methods.coefficients import Coefficients, LinearCombination
from hsa.methods.model_method import WeightedSettings, Weights, weights_setting
from hsa.methods.settings import MAX_FLOAT32, setting
from hsa.methods.tensors import TensorTask
from hsa.methods.weights import divisor


@dataclass(frozen=True)
class TaskArithmeticSettings(WeightedSettings):
    """Settings of task arithmetic. Negative weights take a task away."""

    method = "task_arithmetic"
    lam: Weights = setting(
        1.0,
        "Factor on the merged task vector.",
        low=-MAX_FLOAT32,
        high=MAX_FLOAT32,
        scheduled=True,
        axis=True,
        search=(0.1, 1.5),
    )
    weights: Weights = weights_setting("Weight of each model, in their order; may be negative; repeat.")
    normalize: bool = setting(False, "Divide by the sum of the weights.")


class TaskArithmetic(LinearCombination[TaskArithmeticSettings]):
    """The weighted sum of task vectors.

    Example:
        >>> hsa.merge(method="task_arithmetic", base="b", models=["m1", "m2"], lam=0.5, output="m")  # doctest: +SKIP
    """

    name = "task_arithmetic"
    title = "Task arithmetic"
    formula = "B + lambda * sum(w_i * (M_i - B))"
    source = "Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089"
    citation = """@inproceedings{ilharco2023editing,
  title={Editing models with task arithmetic},
  author={Ilharco, Gabriel and Ribeiro, Marco Tulio and Wortsman, Mitchell and others},
  booktitle={ICLR},
  year={2023}
}"""
    contract = Contract(base="required", least=1, most=8)
    Settings = TaskArithmeticSettings

    def formula_with(self, parameters: Mapping[str, Any]) -> str:
        settings = TaskArithmeticSettings.from_dict(parameters)
        return f"{self.formula} / sum(w_i)" if settings.normalize else self.formula

    def decision(
        self, task: TensorTask, measured: None, settings: TaskArithmeticSettings, so_far: Coefficients | None
    ) -> Coefficients:
        weights, factor = settings.each("weights", task), settings.of("lam", task)
        whole = divisor(weights) if settings.normalize else 1.0
        return Coefficients(tuple(factor * weight / whole for weight in weights))
