"""DELLA: keep each element of a task vector at random, with a higher probability for elements that are larger in their
row. Compensate for the dropped elements, and add up.

    keep each element of d_i with probability density - epsilon + 2 * epsilon * r, times the rescaling factor
    B + lambda * sum of w_i * d_i, over the sum of w_i with `normalize`

`r` is the rank of an element's magnitude among those along axis 1 (in a vector: among all), from 0 for the smallest to
1 for the largest. Of equal magnitudes, the later one ranks higher. A single element has rank 0.5. Density 1 keeps
everything.

Source: Deep, Bhardwaj, Poria, DELLA-Merging: reducing interference in model merging through magnitude-based sampling,
2024, arXiv 2406.11617.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hsa.errors import RequestError
from hsa.findings import Findings
from hsa.methods import philox
from hsa.methods.base import Block
from hsa.methods.by_chance import ChanceMethod, ChanceSettings, Drawn
from hsa.methods.masked import DENSITY_LIMITS, FACTOR, L1, LAMBDA, NORMALIZE, RESCALE, RESCALING, formula_of
from hsa.methods.model_method import Weights, is_running
from hsa.methods.philox import Key
from hsa.methods.settings import setting
from hsa.methods.tensors import TensorTask
from hsa.option_names import option

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32

PLACE_BITS = 33
"""The number of low bits of a sort key that hold the place in a row. The bits of the magnitude are above them."""

SHORT = 256
"""Rows of fewer elements are filled all at once, longer ones one by one. Filling one by one takes a third of the time
for each element, but a fixed time for each row."""


@dataclass(frozen=True)
class DellaLinearSettings(ChanceSettings):
    """Settings of DELLA. Density minus epsilon and density plus epsilon must lie between 0 and 1, unless the density
    is 0 or 1."""

    method = "della_linear"

    density: Weights = setting(
        1.0, "Mean probability with which an element is kept, 0 to 1.", search=(0.2, 0.8), **DENSITY_LIMITS
    )
    lam: Weights = setting(1.0, LAMBDA, search=(0.3, 1.5), **FACTOR)
    normalize: bool = setting(False, NORMALIZE)
    rescale: str = setting(L1, RESCALE, **RESCALING)
    epsilon: Weights = setting(
        0.15,
        "By how much the smallest element's probability is below the density, and the largest's above.",
        low=0.0,
        high=1.0,
        per_model=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.density, (int, float)) and isinstance(self.epsilon, (int, float)):
            check_spread(self.density, self.epsilon, "")


def check_spread(density: float, epsilon: float, where: str) -> None:
    """Raise RequestError unless density - epsilon and density + epsilon are probabilities. `where` follows the values
    in the message."""
    if 0.0 < density < 1.0 and not (density - epsilon > 0.0 and density + epsilon < 1.0):
        raise RequestError(
            f"{option('density')} {density:g} and {option('epsilon')} {epsilon:g}{where} give probabilities from "
            f"{density - epsilon:g} to {density + epsilon:g}, expected numbers between 0 and 1; give a smaller "
            f"{option('epsilon')}"
        )


class DellaLinear(ChanceMethod[DellaLinearSettings]):
    """DELLA, added up.

    Example:
        >>> hsa.merge(method="della_linear", base="b", models=["m1", "m2"], density=0.5, output="m")  # doctest: +SKIP
    """

    name = "della_linear"
    title = "DELLA"
    kept_part = (
        "mask_i * (M_i - B)",
        "mask_i is 1 with a probability from density - epsilon to density + epsilon by the rank in the row, else 0",
    )
    formula = formula_of(kept_part, votes=False, normalize=False, rescale=L1)
    source = "Deep et al., DELLA-Merging, 2024, arXiv 2406.11617"
    citation = """@misc{deep2024della,
  title={{DELLA}-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling},
  author={Deep, Pala Tej and Bhardwaj, Rishabh and Poria, Soujanya},
  year={2024},
  eprint={2406.11617},
  archivePrefix={arXiv}
}"""
    Settings = DellaLinearSettings
    votes = False
    layout = "rows"
    ranked = True

    def spreads(self, task: TensorTask, settings: DellaLinearSettings) -> tuple[float, ...]:
        spreads = settings.each("epsilon", task)
        for density, epsilon in zip(settings.each("density", task), spreads, strict=True):
            check_spread(density, epsilon, f" of tensor {task.name}")
        return spreads

    def planned_findings(self, tasks: Sequence[TensorTask], settings: DellaLinearSettings) -> Findings:
        for task in tasks:
            if not is_running(task.name):
                self.spreads(task, settings)
        return super().planned_findings(tasks, settings)

    def largest_result(
        self, task: TensorTask, measured: Any, settings: DellaLinearSettings, largest: Mapping[str, float]
    ) -> float | None:
        self.spreads(task, settings)  # raises here, before anything is written
        return super().largest_result(task, measured, settings, largest)

    def mask(self, block: Block, decision: Drawn, place: int, vector: Float32, key: Key) -> Array:
        import numpy as np

        shape = block.task.shape
        length = shape[1] if len(shape) > 1 else vector.size
        limits = limits_by_rank(length, decision.probabilities[place], decision.spreads[place])
        rows = np.moveaxis(vector.reshape(-1, length, math.prod(shape[2:])), 1, 2)
        words = philox.words(block.first, vector.size, key).reshape(rows.shape[0], length, -1)
        mask: Array = words < np.moveaxis(limits_of(rows, limits, block.wide()), 2, 1)
        return mask.reshape(vector.shape)


def limits_by_rank(length: int, density: float, epsilon: float) -> Array:
    """For each rank among `length` elements, from the smallest, the number below which a word means "kept": uint32."""
    import numpy as np

    ranks = np.arange(length) / (length - 1) if length > 1 else np.full(length, 0.5)
    return np.floor(((density - epsilon) + (2.0 * epsilon) * ranks) * 2.0**32).astype(np.uint32)


def limits_of(vectors: Float32, limits: Array, room: Array) -> Array:
    """The limit of every element, by the rank of its magnitude along the last axis.

    Magnitudes are sorted as whole numbers that hold their 31 bits above their place. So of equal magnitudes, the later
    one ranks higher.

    Args:
        vectors: three axes, of any memory layout.
        limits: uint32, one for each rank.
        room: 64 bits for each element, which are overwritten.

    Returns:
        uint32 of the vectors' shape.
    """
    import numpy as np

    keys = room.reshape(-1).view(np.uint64).reshape(vectors.shape)
    np.copyto(keys, vectors.view(np.uint32))
    np.left_shift(keys, np.uint64(PLACE_BITS), out=keys)
    np.bitwise_or(keys, np.arange(len(limits), dtype=np.uint64), out=keys)
    keys.sort(axis=-1)
    np.bitwise_and(keys, np.uint64((1 << PLACE_BITS) - 1), out=keys)
    found = np.empty(vectors.shape, np.uint32)
    places, rows = keys.view(np.int64).reshape(-1, len(limits)), found.reshape(-1, len(limits))
    if len(limits) < SHORT:
        np.put_along_axis(rows, places, np.broadcast_to(limits, places.shape), -1)
    else:
        for row, place in zip(rows, places, strict=True):
            row[place] = limits
    return found
