"""Reinforced Agent Merging (RAM): keep whole what only one model changed, and average what several changed.

    a model moved an element where |d_i| > epsilon
    B + the mean of d_i over the models that moved the element; B where none did

Source: Yuan et al., Behavior knowledge merge in reinforced agentic models, 2026, arXiv 2601.13572.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hsa.methods.base import BASE, Block, Contract
from hsa.methods.json_fields import between
from hsa.methods.model_method import ModelMethod, ModelSettings, Weights
from hsa.methods.settings import MAX_FLOAT32, setting
from hsa.methods.tensors import TensorTask
from hsa.methods.votes import Scratch, masked

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32


@dataclass(frozen=True)
class RamSettings(ModelSettings):
    """Settings of RAM."""

    method = "ram"

    epsilon: Weights = setting(
        1e-5,
        "A model moved an element that it changed by more than this.",
        low=0.0,
        high=MAX_FLOAT32,
        scheduled=True,
    )


@dataclass(frozen=True)
class Moved:
    """The decision for a tensor: an element counts as moved if it changed by more than `epsilon`."""

    epsilon: float


class Ram(ModelMethod[RamSettings, Moved]):
    """RAM.

    Example:
        >>> hsa.merge(method="ram", base="b", models=["m1", "m2"], output="merged")  # doctest: +SKIP
    """

    name = "ram"
    title = "Reinforced Agent Merging (RAM)"
    formula = "B + mean(M_i - B over the models that moved the element by more than epsilon)"
    source = "Yuan et al., Behavior Knowledge Merge in Reinforced Agentic Models, 2026, arXiv 2601.13572"
    citation = """@misc{yuan2026ram,
  title={Behavior Knowledge Merge in Reinforced Agentic Models},
  author={Yuan, Xiangchi and Shi, Dachuan and Zhang, Chunhui and Liu, Zheyuan and Yao, Shenglong and
          Vosoughi, Soroush and Lee, Wenke},
  year={2026},
  eprint={2601.13572},
  archivePrefix={arXiv}
}"""
    contract = Contract(base="required", least=2, most=8)
    Settings = RamSettings

    def decision(self, task: TensorTask, measured: None, settings: RamSettings, so_far: Moved | None) -> Moved:
        return Moved(settings.of("epsilon", task))

    def combine(self, block: Block, decision: Moved, out: Float32) -> None:
        import numpy as np

        scratch = Scratch(block)
        moves = scratch.small(1)
        moves[...] = 0

        def count_moved(place: int, vector: Float32, scratch: Scratch) -> Array:
            mask = moved(vector, decision.epsilon, scratch)
            np.add(moves, mask.view(np.uint8), out=moves)
            return mask

        total, *others = masked(block, (1.0,) * len(block.models), count_moved, scratch)
        for other in others:
            np.add(total, other, out=total)
        np.copyto(scratch.floats, np.maximum(moves, 1, out=moves))
        np.add(block.weights(BASE), np.divide(total, scratch.floats, out=total), out=out)

    def kept(self, block: Block, decision: Any) -> Iterator[Array | None] | None:
        if not isinstance(decision, Moved):
            return None
        scratch = Scratch(block)
        return (moved(block.task_vector(role), decision.epsilon, scratch) for role in block.models)

    def largest_result(
        self, task: TensorTask, measured: Any, settings: RamSettings, largest: Mapping[str, float]
    ) -> float | None:
        """An average of task vectors is at most the largest of them, and the sum before it at most the sum of all."""
        base = largest[BASE]
        return base + sum(magnitude + base for role, magnitude in largest.items() if role != BASE)

    def entry(self, decision: Moved) -> dict[str, Any]:
        return {"epsilon": decision.epsilon}

    def read_entry(self, entry: Mapping[str, Any], settings: RamSettings) -> Moved:
        return Moved(between(entry["epsilon"], 0.0, MAX_FLOAT32))

    def longest_decision(self, task: TensorTask, number: float) -> Moved:
        return Moved(number)


def moved(vector: Float32, epsilon: float, scratch: Scratch) -> Array:
    """The elements of a task vector that a model moved: bool of its shape, in the scratch, whose floats are
    overwritten."""
    import numpy as np

    return np.greater(np.abs(vector, out=scratch.floats), np.float32(epsilon), out=scratch.flags(0))
