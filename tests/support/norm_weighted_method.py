"""A plugin file with a method that measures: the models' task vectors, each weighted by its share of their norms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsa.architectures import TensorInfo, TensorPlace
from hsa.methods import (
    KEEP,
    Block,
    Contract,
    Method,
    Settings,
    TensorTask,
    Treatment,
    block_sums,
    setting,
    total,
)

Weights = tuple[float, ...]


@dataclass(frozen=True)
class NormWeightedSettings(Settings):
    method = "norm_weighted"
    scale: float = setting(1.0, "Factor on the merged task vector.", low=0.0, high=10.0, axis=True)


class NormWeighted(Method[NormWeightedSettings, Weights]):
    name, title = "norm_weighted", "Norm-weighted task arithmetic"
    formula = "B + scale * sum(w_i * tv_i), w_i = |tv_i| / sum(|tv|)"
    contract = Contract(base="required", least=2, most=8)
    Settings = NormWeightedSettings

    def treatment(self, info: TensorInfo, place: TensorPlace | None, settings: NormWeightedSettings) -> Treatment:
        return KEEP if place is None else Treatment("merge", passes=1)

    def measure(self, block: Block, number: int, so_far: Weights | None) -> list[np.ndarray]:
        return [block_sums(np.square(block.task_vector(role), dtype=np.float64)) for role in block.models]

    def gather(self, task: TensorTask, sums: Sequence[Sequence[list[np.ndarray]]]) -> list[float]:
        (blocks,) = sums  # the tensor is one group
        return [math.sqrt(total(squares)) for squares in zip(*blocks, strict=True)]

    def decide(
        self, task: TensorTask, measured: list[float], settings: NormWeightedSettings, so_far: Weights | None
    ) -> Weights:
        total = math.fsum(measured) or 1.0
        return tuple(settings.scale * norm / total for norm in measured)

    def apply(self, block: Block, decision: Weights, out: np.ndarray) -> None:
        np.copyto(out, block.weights("base"))
        for role, weight in zip(block.models, decision, strict=True):
            out += np.multiply(block.task_vector(role), np.float32(weight), out=block.room(role))

    def as_dict(self, decision: Weights) -> dict[str, Any]:
        return {"weights": list(decision)}

    def from_dict(self, entry: Mapping[str, Any], groups: int, settings: NormWeightedSettings) -> Weights:
        weights = tuple(map(float, entry["weights"]))
        if not all(0.0 <= weight <= settings.scale for weight in weights):
            raise ValueError(f"weights must be from 0 to the scale, {settings.scale}")
        return weights

    def longest(self, task: TensorTask, number: float) -> Weights:
        return (number,) * (len(task.sources) - 1)
