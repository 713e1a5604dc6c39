"""Methods whose decision is one coefficient for each model: a tensor becomes a linear combination of the sources."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hsa.methods.base import BASE, Block
from hsa.methods.json_fields import between
from hsa.methods.model_method import Average, ModelMethod, ModelSettings, by_role, write_sum
from hsa.methods.settings import MAX_FLOAT32
from hsa.methods.tensors import TensorTask

if TYPE_CHECKING:
    from hsa.system.dtypes import Float32

S = TypeVar("S", bound=ModelSettings)


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of the models of a tensor, in their order; float64, rounded to float32 where they are used."""

    models: tuple[float, ...]


class LinearCombination(ModelMethod[S, Coefficients]):
    """The base class: `B + sum of a_i * d_i` if `on_base` and there is a base, else the sum of `a_i * M_i`. A subclass
    overrides `decision`."""

    on_base: bool = True

    def combine(self, block: Block, decision: Coefficients, out: Float32) -> None:
        write_sum(block, decision.models, out, on_base=self.on_base and BASE in block.task.sources)

    def coefficients_of(self, decision: Any, models: Sequence[str]) -> dict[str, float]:
        if not isinstance(decision, Coefficients):
            return super().coefficients_of(decision, models)
        return by_role(models, decision.models)

    def largest_result(
        self, task: TensorTask, measured: Any, settings: S, largest: Mapping[str, float]
    ) -> float | None:
        decision = self.decide(task, measured, settings, None)
        coefficients = decision.coefficients if isinstance(decision, Average) else decision.models
        models = [magnitude for role, magnitude in largest.items() if role != BASE]
        base = largest[BASE] if self.on_base and BASE in largest else 0.0
        parts = (abs(a) * (magnitude + base) for a, magnitude in zip(coefficients, models, strict=True))
        return base + math.fsum(parts)

    def entry(self, decision: Coefficients) -> dict[str, Any]:
        return {"coefficients": list(decision.models)}

    def read_entry(self, entry: Mapping[str, Any], settings: S) -> Coefficients:
        return Coefficients(tuple(between(each, -MAX_FLOAT32, MAX_FLOAT32) for each in entry["coefficients"]))

    def longest_decision(self, task: TensorTask, number: float) -> Coefficients:
        return Coefficients((number,) * len(task.numbers))
