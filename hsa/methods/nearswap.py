"""NearSwap: take a model's value where it is near base's, and move towards it by about `t` where it is far.

    w = clamp(t / max(|M - B|, 1e-6), 0, 1)
    w * M + (1 - w) * B

Source: alchemonaut, QuartetAnemoi-70B-t0.0001, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hsa.methods.base import BASE, Block, Contract
from hsa.methods.json_fields import between
from hsa.methods.model_method import ModelMethod, ModelSettings, Weights
from hsa.methods.settings import MAX_FLOAT32, setting
from hsa.methods.tensors import TensorTask
from hsa.methods.votes import Scratch

if TYPE_CHECKING:
    from hsa.system.dtypes import Float32

NEAREST = 1e-6
"""Values closer to each other than this are treated as this far apart."""


@dataclass(frozen=True)
class NearSwapSettings(ModelSettings):
    """Settings of NearSwap."""

    method = "nearswap"

    t: Weights | None = setting(
        None,
        "How far base's values may move; values nearer than this become the model's.",
        low=0.0,
        high=MAX_FLOAT32,
        scheduled=True,
        axis=True,
        search=(1e-6, 0.1),
        search_log=True,
        default_text="required",
        required=True,
    )


@dataclass(frozen=True)
class Near:
    """The decision for a tensor: how far base's values may move."""

    t: float


class NearSwap(ModelMethod[NearSwapSettings, Near]):
    """NearSwap of base and one model.

    Example:
        >>> hsa.merge(method="nearswap", base="b", models=["m"], t=0.0001, output="merged")  # doctest: +SKIP
    """

    name = "nearswap"
    title = "NearSwap"
    formula = "w * M + (1 - w) * B, w = clamp(t / max(|M - B|, 1e-6), 0, 1)"
    source = "alchemonaut, QuartetAnemoi-70B-t0.0001, on the Hugging Face Hub"
    contract = Contract(base="required", least=1, most=1)
    Settings = NearSwapSettings

    def decision(self, task: TensorTask, measured: None, settings: NearSwapSettings, so_far: Near | None) -> Near:
        return Near(settings.of("t", task))

    def combine(self, block: Block, decision: Near, out: Float32) -> None:
        import numpy as np

        (role,) = block.models
        base, weights = block.weights(BASE), block.weights(role)
        share = np.abs(block.task_vector(role), out=block.room(role))
        np.maximum(share, np.float32(NEAREST), out=share)
        np.divide(np.float32(decision.t), share, out=share)
        np.clip(share, np.float32(0), np.float32(1), out=share)
        rest = np.subtract(np.float32(1), share, out=Scratch(block).floats)
        np.multiply(rest, base, out=rest)
        np.multiply(share, weights, out=share)
        np.add(share, rest, out=out)

    def largest_result(
        self, task: TensorTask, measured: Any, settings: NearSwapSettings, largest: Mapping[str, float]
    ) -> float | None:
        return sum(largest.values())

    def entry(self, decision: Near) -> dict[str, Any]:
        return {"t": decision.t}

    def read_entry(self, entry: Mapping[str, Any], settings: NearSwapSettings) -> Near:
        return Near(between(entry["t"], 0.0, MAX_FLOAT32))

    def longest_decision(self, task: TensorTask, number: float) -> Near:
        return Near(number)
