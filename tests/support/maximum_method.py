"""A plugin file with a method: the largest value of all models, element by element, as a user would write one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsa.methods import Block, Contract, Method, Settings, TensorTask, setting


@dataclass(frozen=True)
class MaximumSettings(Settings):
    method = "maximum"
    factor: float = setting(1.0, "Factor on the largest value.", low=-100.0, high=100.0, axis=True)


class Maximum(Method[MaximumSettings, float]):
    name, title, formula = "maximum", "Maximum", "factor * max(models)"
    contract = Contract(base="none", least=2, most=4)
    Settings = MaximumSettings

    def decide(self, task: TensorTask, measured: Any, settings: MaximumSettings, so_far: float | None) -> float:
        return settings.factor

    def apply(self, block: Block, decision: float, out: np.ndarray) -> None:
        np.maximum.reduce([block.weights(role) for role in block.models], axis=0, out=out)
        np.multiply(out, np.float32(decision), out=out)

    def as_dict(self, decision: float) -> dict[str, Any]:
        return {"factor": decision}

    def from_dict(self, entry: Mapping[str, Any], groups: int, settings: MaximumSettings) -> float:
        factor = float(entry["factor"])
        if not math.isfinite(factor):
            raise ValueError("the factor must be finite")
        return factor

    def longest(self, task: TensorTask, number: float) -> float:
        return number
