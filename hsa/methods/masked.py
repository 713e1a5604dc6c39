"""Methods that keep some elements of each task vector and drop the others: their common part.

This module has their settings, the rescaling of kept elements, and the contents of the record. Elements are chosen in
`by_threshold` and `by_chance`, and the masked task vectors are combined in `votes`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from hsa.architectures.base import TensorInfo, TensorPlace
from hsa.errors import RequestError, shown
from hsa.methods.base import BASE, Block, Contract, Treatment
from hsa.methods.json_fields import between, number
from hsa.methods.model_method import ModelMethod, WeightedSettings, Weights
from hsa.methods.settings import MAX_FLOAT32, Settings, setting
from hsa.methods.sums import block_sums
from hsa.methods.tensors import Layout, TensorTask
from hsa.methods.values import is_filter
from hsa.methods.votes import Blend, Keep, Scratch, agreeing, write_masked_sum, write_vote

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32

NONE, L1, DENSITY = WAYS = ("none", "l1", "density")
"""How the kept elements are rescaled. `none`: not at all. `l1`: to preserve the sum of magnitudes. `density`: by one
over the density."""

RESCALED = {
    NONE: ("", ""),
    L1: ("f_i * ", ", f_i = sum(|M_i - B|) / sum(|kept part|)"),
    DENSITY: ("f_i * ", ", f_i = 1 / density"),
}
"""The rescaling in a formula: the factor, and its definition."""

SMALLEST_MAGNITUDES = 1e-7
"""Task vectors are not rescaled if the sum of all their magnitudes, or of the kept ones, is below this."""


DENSITY_LIMITS: dict[str, Any] = {"low": 0.0, "high": 1.0, "per_model": True, "axis": True}
"""The setting `density` in every method: a share for each model, or one for all."""

FACTOR: dict[str, Any] = {"low": -MAX_FLOAT32, "high": MAX_FLOAT32, "scheduled": True, "axis": True}
"""The setting `lambda` in every method."""

LAMBDA = "Factor on the merged task vector."
NORMALIZE = "Divide by the sum of the weights."
VOTE_NORMALIZE = "Divide by the sum of the weights of the models that agree."
RESCALE = "Rescale the kept elements: none, l1 (to the sum of magnitudes before), or density (divide by it)."


def formula_of(kept_part: tuple[str, str], *, votes: bool, normalize: bool, rescale: str = NONE) -> str:
    """The formula of a method with these settings, see `MaskedMethod.kept_part`."""
    kept, what = kept_part
    factor, meaning = RESCALED[rescale]
    combined = f"sum(w_i * {factor}{kept})"
    divided = f"{combined} / sum(w_i)" if normalize else combined
    over = f", {'both sums' if normalize else 'the sum'} {elected(combined)}" if votes else ""
    return f"B + lambda * {divided}{over}, {what}{meaning}"


def elected(summed: str) -> str:
    """The part of a formula that says which models a vote keeps. `summed` is the sum whose signs are elected.

    Example:
        >>> elected("sum(M_i - B)")
        'over the models that have the elected sign, which is that of sum(M_i - B) over all models'
    """
    return f"over the models that have the elected sign, which is that of {summed} over all models"


def rescale_form(name: str, value: Any) -> str:
    """A way to rescale the kept elements. True and False, as in mergekit, mean `l1` and `none`."""
    value = (L1 if value else NONE) if isinstance(value, bool) else value
    if not isinstance(value, str) or value not in WAYS:
        raise RequestError(f"{name} must be one of {', '.join(WAYS)}, or True or False, got {shown(value)}")
    return value


RESCALING: dict[str, Any] = {"form": rescale_form, "choices": WAYS, "metavar": "|".join(WAYS)}


def smallest(value: Any) -> float:
    """The smallest number in a scheduled value, or in one for each model."""
    if isinstance(value, Mapping):
        return smallest(value["value"]) if is_filter(value) else min(map(float, value.values()))
    return min(map(smallest, value)) if isinstance(value, Sequence) else float(value)


S = TypeVar("S", bound="MaskedSettings")


@dataclass(frozen=True)
class MaskedSettings(WeightedSettings):
    """Settings of methods that mask. A subclass declares its own defaults and ranges."""

    search_passes: ClassVar[int]
    """The number of passes in which a method finds the elements to keep."""

    density: Weights = setting(1.0, "Share of each task vector that is kept.", **DENSITY_LIMITS)
    lam: Weights = setting(1.0, LAMBDA, **FACTOR)
    normalize: bool = setting(False, NORMALIZE)
    rescale: str = setting(NONE, RESCALE, **RESCALING)

    @property
    def passes(self) -> int:
        """The number of passes over a tensor before it is merged. If nothing is dropped, there is nothing to
        measure."""
        return 0 if smallest(self.density) >= 1.0 else self.search_passes + self.rescale_passes

    @property
    def rescale_passes(self) -> int:
        """The number of passes for the sums of magnitudes."""
        return int(self.rescale == L1)

    def structure(self) -> tuple[Any, ...]:
        return (*super().structure(), self.passes)

    def serves(self, other: Settings) -> bool:
        """A plan with more passes than needed is valid too: the extra passes measure nothing."""
        if not isinstance(other, MaskedSettings) or type(other) is not type(self):
            return False
        return other.structure()[:-1] == self.structure()[:-1] and other.passes <= self.passes

    def for_all_candidates(self: S) -> S:
        return replace(self, density=0.5, rescale=L1)


K = TypeVar("K", bound="MaskDecision")


@dataclass(frozen=True)
class MaskDecision:
    """The decision for a tensor: how its task vectors are combined. Subclasses add which of their elements are kept."""

    blend: Blend

    def rescaled(self: K, factors: Sequence[float]) -> K:
        """The same decision with these factors on the models' kept elements."""
        return replace(self, blend=replace(self.blend, factors=tuple(factors)))

    @property
    def factors(self) -> tuple[float, ...]:
        return self.blend.factors


class MaskedMethod(ModelMethod[S, Any], Generic[S, K]):
    """The base class. A method sets `votes`. Subclasses of this class define which elements are kept."""

    contract = Contract(base="required", least=1, most=8)
    votes: ClassVar[bool]
    kept_part: ClassVar[tuple[str, str]]
    """The kept part of a task vector in a formula, and its definition."""
    layout: ClassVar[Layout] = "flat"

    def formula_with(self, parameters: Mapping[str, Any]) -> str:
        settings: MaskedSettings = self.Settings.from_dict(parameters)
        return formula_of(self.kept_part, votes=self.votes, normalize=settings.normalize, rescale=settings.rescale)

    @abstractmethod
    def keep(self, block: Block, decision: K, place: int, vector: Float32, scratch: Scratch) -> Array | None:
        """The elements of a model's task vector that are kept, bool of the block's shape; None if all are kept. It may
        use all of the scratch memory, and the result may be a part of it."""

    def plan(self, info: TensorInfo, place: TensorPlace | None, settings: S) -> Treatment:
        return Treatment("merge", layout=self.layout, passes=settings.passes)

    def combine(self, block: Block, decision: K, out: Float32) -> None:
        keep = self._keep(block, decision)
        if self.votes:
            write_vote(block, decision.blend.ballots, decision.blend.shares, keep, out)
        else:
            write_masked_sum(block, decision.blend.summands, keep, out)

    def _keep(self, block: Block, decision: K) -> Keep:
        def keep(place: int, vector: Float32, scratch: Scratch) -> Array | None:
            return self.keep(block, decision, place, vector, scratch)

        return keep

    def kept(self, block: Block, decision: Any) -> Iterator[Array | None] | None:
        if not isinstance(decision, MaskDecision):
            return None
        keep, scratch = self._keep(block, decision), Scratch(block)  # type: ignore[arg-type]
        return (keep(place, block.task_vector(role), scratch) for place, role in enumerate(block.models))

    def agreeing(self, block: Block, decision: Any) -> Iterator[Array] | None:
        if not self.votes or not isinstance(decision, MaskDecision):
            return None
        return agreeing(block, decision.blend.ballots, self._keep(block, decision))  # type: ignore[arg-type]

    def blend(self, task: TensorTask, settings: S) -> Blend:
        """How a tensor's task vectors are combined, as far as the settings determine it."""
        densities = settings.each("density", task)
        inverse = settings.rescale == DENSITY
        factors = tuple(1.0 / each if inverse and each > 0.0 else 1.0 for each in densities)
        return Blend(settings.each("weights", task), factors, settings.of("lam", task), settings.normalize)

    def largest_result(
        self, task: TensorTask, measured: Any, settings: S, largest: Mapping[str, float]
    ) -> float | None:
        if settings.rescale == L1 and settings.passes:
            return None
        base = largest[BASE]
        magnitudes = [magnitude + base for role, magnitude in largest.items() if role != BASE]
        return base + self.blend(task, settings).bound(magnitudes, votes=self.votes)

    def entry(self, decision: K) -> dict[str, Any]:
        blend = decision.blend
        return {"weights": list(blend.weights), "rescale": list(blend.factors), "lambda": blend.lam}

    def read_blend(self, entry: Mapping[str, Any], settings: S) -> Blend:
        """The part of a recorded decision that all these methods share."""
        weights, factors = tuple(map(number, entry["weights"])), tuple(map(positive, entry["rescale"]))
        if len(weights) != len(factors) or not 1 <= len(weights) <= self.contract.most:
            raise ValueError(f"{len(weights)} weights and {len(factors)} factors do not fit")
        return Blend(weights, factors, between(entry["lambda"], -MAX_FLOAT32, MAX_FLOAT32), settings.normalize)

    def longest_blend(self, task: TensorTask, number: float) -> Blend:
        """A blend that takes as much room in the record as any other."""
        each = (number,) * len(task.numbers)
        return Blend(each, each, number, True)


def positive(value: Any) -> float:
    """A number above 0 that fits into a float32; ValueError for anything else."""
    if between(value, 0.0, MAX_FLOAT32) == 0.0:
        raise ValueError("expected a factor above 0, found 0")
    return float(value)


def magnitude_sums(block: Block, vector: Float32) -> Array:
    """The sums of a task vector's magnitudes by flat blocks of 1,024 elements, float64."""
    import numpy as np

    wide = block.wide()
    np.copyto(wide, vector)
    return block_sums(np.abs(wide, out=wide))


def kept_sums(block: Block, vector: Float32, mask: Array | None) -> Array:
    """The sums of the kept elements' magnitudes, as in `magnitude_sums`. The task vector is overwritten."""
    import numpy as np

    if mask is not None:
        bits = vector.view(np.uint32)
        np.multiply(bits, mask, out=bits)
    return magnitude_sums(block, vector)


def factor_of(whole: float, kept: float) -> float:
    """The factor that preserves the sum of magnitudes; 1 if one of the sums is too small to divide by."""
    return 1.0 if min(whole, kept) < SMALLEST_MAGNITUDES else whole / kept
