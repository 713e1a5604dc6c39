"""A plugin file with a method: the largest value of all models, element by element, as a user would write one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hsa.methods.base import Block, Contract, Method
from hsa.methods.settings import Settings, setting


@dataclass(frozen=True)
class MaximumSettings(Settings):
    factor: float = setting(1.0, "Factor on the largest value.", low=-100.0, high=100.0, axis=True)
    method = "maximum"


class Maximum(Method[MaximumSettings, float]):
    name, title, formula = "maximum", "Maximum", "factor * max(models)"
    contract = Contract(base="none", least=2, most=4)
    Settings = MaximumSettings

    def decide(self, task: Any, measured: Any, settings: MaximumSettings, so_far: object) -> float:
        return settings.factor

    def apply(self, block: Block, decision: float, out: Any) -> None:
        np.maximum.reduce([block.weights(role) for role in block.models], axis=0, out=out)
        np.multiply(out, np.float32(decision), out=out)
