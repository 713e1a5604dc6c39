"""Methods that keep elements at random. The random words depend on the seed, the model, the tensor and the element.

If the kept elements are rescaled, a first pass sums all magnitudes, and a second those of the kept elements.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from hsa.methods import philox
from hsa.methods.base import Block
from hsa.methods.json_fields import count, number
from hsa.methods.masked import L1, MaskDecision, MaskedMethod, MaskedSettings, factor_of, kept_sums, magnitude_sums
from hsa.methods.philox import Key
from hsa.methods.settings import setting
from hsa.methods.sums import total
from hsa.methods.tensors import TensorTask
from hsa.methods.votes import Scratch

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32

MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class ChanceSettings(MaskedSettings):
    """Settings of methods that keep elements by chance."""

    search_passes = 0

    seed: int = setting(0, "Seed of the random masks.", whole=True, low=0, high=MAX_SEED, metavar="N")

    @property
    def rescale_passes(self) -> int:
        return 2 * super().rescale_passes


@dataclass(frozen=True)
class Drawn(MaskDecision):
    """The decision for a tensor: the seed, and the probability with which elements of each model are kept.

    `spreads` says how much the probability varies with an element's rank, for methods in which it does. `sums` are the
    sums of the task vectors' magnitudes after the first of two passes; empty if they are not needed.
    """

    seed: int
    probabilities: tuple[float, ...]
    spreads: tuple[float, ...] = ()
    sums: tuple[float, ...] = ()

    @property
    def density(self) -> tuple[float, ...]:
        return self.probabilities


S = TypeVar("S", bound=ChanceSettings)


class ChanceMethod(MaskedMethod[S, Drawn], Generic[S]):
    """The base class. A subclass defines by `mask` which elements are kept."""

    ranked: ClassVar[bool] = False
    """Whether the probability differs with an element's rank."""

    @abstractmethod
    def mask(self, block: Block, decision: Drawn, place: int, vector: Float32, key: Key) -> Array:
        """The elements of a model's task vector that are kept: bool of the block's shape. Called only for probabilities
        between 0 and 1, both excluded."""

    def spreads(self, task: TensorTask, settings: S) -> tuple[float, ...]:
        """How much each model's probability varies with rank; empty if it does not."""
        return ()

    def keep(self, block: Block, decision: Drawn, place: int, vector: Float32, scratch: Scratch) -> Array | None:
        probability = decision.probabilities[place]
        if probability >= 1.0:
            return None
        if probability == 0.0:
            mask = scratch.flags(0)
            mask[...] = False
            return mask
        key = philox.key_of(decision.seed, block.task.numbers[place], block.task.name)
        return self.mask(block, decision, place, vector, key)

    def measure(self, block: Block, number: int, so_far: Drawn | None) -> list[Array]:
        if so_far is None:
            return [magnitude_sums(block, block.task_vector(role)) for role in block.models]
        return [self._kept_sums(block, so_far, place) for place in range(len(so_far.sums))]

    def _kept_sums(self, block: Block, decision: Drawn, place: int) -> Array:
        vector = block.task_vector(block.models[place])
        return kept_sums(block, vector, self.keep(block, decision, place, vector, Scratch(block)))

    def gather(self, task: TensorTask, sums: Sequence[Sequence[Any]]) -> tuple[float, ...]:
        blocks = [block for group in sums for block in group]
        return tuple(map(total, zip(*blocks, strict=True)))

    def decision(self, task: TensorTask, measured: Any, settings: S, so_far: Drawn | None) -> Drawn:
        if so_far is not None:
            factors = list(map(factor_of, so_far.sums, measured))
            return so_far.rescaled(factors) if factors else so_far
        densities, spreads = settings.each("density", task), self.spreads(task, settings)
        sums = measured if measured and settings.rescale == L1 else ()
        return Drawn(self.blend(task, settings), settings.seed, densities, spreads, sums)

    def entry(self, decision: Drawn) -> dict[str, Any]:
        entry = {**super().entry(decision), "seed": decision.seed, "probabilities": list(decision.probabilities)}
        return {**entry, "spreads": list(decision.spreads)} if decision.spreads else entry

    def read_entry(self, entry: Mapping[str, Any], settings: S) -> Drawn:
        blend, seed = self.read_blend(entry, settings), count(entry["seed"])
        probabilities = tuple(map(_probability, entry["probabilities"]))
        spreads = tuple(map(_probability, entry["spreads"])) if self.ranked else ()
        if len(probabilities) != len(blend.weights) or (self.ranked and len(spreads) != len(probabilities)):
            raise ValueError(f"{len(blend.weights)} weights and {len(probabilities)} probabilities do not fit")
        return Drawn(blend, seed, probabilities, spreads)

    def longest_decision(self, task: TensorTask, number: float) -> Drawn:
        each = (number,) * len(task.numbers)
        return Drawn(self.longest_blend(task, number), MAX_SEED, each, each if self.ranked else ())


def _probability(value: Any) -> float:
    if not 0.0 <= number(value) <= 1.0:
        raise ValueError("expected a number from 0 to 1")
    return float(value)
