"""A plugin file with a method of two passes: what lies above the mean magnitude of all task vectors is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsa.architectures import TensorInfo, TensorPlace
from hsa.methods import Block, Contract, Method, Settings, TensorTask, Treatment, block_sums, setting, total


@dataclass(frozen=True)
class TwoPassSettings(Settings):
    method = "two_passes"
    layout: str = setting("flat", "How tensors are cut.", choices=("flat", "rows"), structural=True)


@dataclass(frozen=True)
class Kept:
    threshold: float
    factor: float


class TwoPasses(Method[TwoPassSettings, Kept]):
    name, title = "two_passes", "Two passes"
    formula = "B + factor * (every task vector where it is above the mean magnitude)"
    contract = Contract(base="required", least=1, most=5)
    Settings = TwoPassSettings

    def treatment(self, info: TensorInfo, place: TensorPlace | None, settings: TwoPassSettings) -> Treatment:
        return Treatment("merge", layout=settings.layout, passes=2)  # type: ignore[arg-type]

    def measure(self, block: Block, number: int, so_far: Kept | None) -> np.ndarray:
        assert block.first % 1024 == 0
        floor = -1.0 if so_far is None else so_far.threshold
        parts = []
        for role in block.models:
            magnitude = np.abs(block.task_vector(role))
            parts.append(block_sums(np.where(magnitude > floor, magnitude, 0).astype(np.float64)))
        return np.stack(parts)

    def gather(self, task: TensorTask, sums: Sequence[Sequence[np.ndarray]]) -> float:
        (blocks,) = sums
        return sum(total([block[model] for block in blocks]) for model in range(len(task.numbers)))

    def decide(self, task: TensorTask, measured: float, settings: TwoPassSettings, so_far: Kept | None) -> Kept:
        if so_far is None:
            return Kept(measured / (len(task.numbers) * max(1, int(np.prod(task.shape)))), measured)
        return Kept(so_far.threshold, so_far.factor / measured if measured > 0.0 else 1.0)

    def apply(self, block: Block, decision: Kept, out: np.ndarray) -> None:
        np.copyto(out, block.weights("base"))
        for role in block.models:
            vector = block.task_vector(role)
            out += np.where(np.abs(vector) > decision.threshold, vector, 0) * np.float32(decision.factor)

    def as_dict(self, decision: Kept) -> dict[str, Any]:
        return {"threshold": decision.threshold, "factor": decision.factor}

    def from_dict(self, entry: Mapping[str, Any], groups: int, settings: TwoPassSettings) -> Kept:
        return Kept(float(entry["threshold"]), float(entry["factor"]))

    def longest(self, task: TensorTask, number: float) -> Kept:
        return Kept(number, number)
