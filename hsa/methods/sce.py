"""SCE: select the elements in which the models differ most, calculate a share for each model, erase minority signs.

    where the variance of d_i over the models is among the int(select_topk * m) largest of the m that are not 0
    (everywhere with select_topk 1):
    B + sum of a_i * d_i over the models that agree, over the sum of their a_i (of 1e-6 at least)
    elsewhere: B

`a_i` is the mean of `d_i ** 2` over the tensor, with 0 for elements that are not selected, divided by the sum of these
means. If that sum is below 1e-6, `a_i` is 1 / N. A model agrees where its `d_i` has the sign of the sum over all
models, which is plus where that sum is 0.

Source: Wan, Zhong, Yang, Chen, Quan, FuseChat: knowledge fusion of chat models, 2024, arXiv 2408.07990.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Any

from hsa.architectures.base import TensorInfo, TensorPlace
from hsa.methods import thresholds
from hsa.methods.base import BASE, Block, Contract, Treatment
from hsa.methods.json_fields import between, count
from hsa.methods.masked import elected, smallest
from hsa.methods.model_method import ModelMethod, ModelSettings, Weights, by_role
from hsa.methods.settings import Settings, setting
from hsa.methods.sums import block_sums, total
from hsa.methods.tensors import TensorTask
from hsa.methods.thresholds import Counts, Place
from hsa.methods.votes import Scratch, agreeing, elect, masked, subsets, write_agreeing

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32

SMALLEST_SUM = 1e-6
"""If the sum of the mean squares is below this, all models have the same share. The sum of agreeing models' shares
counts as at least this much."""

MOST = 1.0 + 2.0**-40
"""Upper limit of shares, slightly above 1: a share may come out as 1."""


@dataclass(frozen=True)
class SceSettings(ModelSettings):
    """Settings of SCE."""

    method = "sce"

    select_topk: Weights = setting(
        1.0,
        "Share of the elements that differ between models which is merged, those that differ most.",
        low=0.0,
        high=1.0,
        scheduled=True,
        axis=True,
        search=(0.1, 1.0),
    )

    @property
    def passes(self) -> int:
        """The number of passes over a tensor before it is merged: for the threshold and the shares."""
        return 1 if smallest(self.select_topk) >= 1.0 else 3

    def structure(self) -> tuple[Any, ...]:
        return (*super().structure(), self.passes)

    def serves(self, other: Settings) -> bool:
        """A plan with three passes is valid too if only one is needed."""
        if not isinstance(other, SceSettings):
            return False
        return other.structure()[:-1] == self.structure()[:-1] and other.passes <= self.passes

    def for_all_candidates(self) -> SceSettings:
        return replace(self, select_topk=0.5)


@dataclass(frozen=True)
class Selected:
    """The decision for a tensor: the smallest variance that is selected (0 if all elements are selected, None if none
    is), the number of selected elements, and the models' shares."""

    threshold: float | None
    kept: int
    shares: tuple[float, ...]

    @cached_property
    def inverses(self) -> tuple[float, ...]:
        """One over the sum of the agreeing models' shares, for each set of models."""
        return tuple(1.0 / max(math.fsum(shares), SMALLEST_SUM) for shares in subsets(self.shares))


@dataclass(frozen=True)
class VarianceBin:
    """The state after the first of three passes: the bin of the threshold. If there is no threshold, the bin is None,
    and `everything` says whether all elements or none are selected."""

    place: Place | None
    everything: bool = False


class Sce(ModelMethod[SceSettings, Any]):
    """SCE.

    Example:
        >>> hsa.merge(method="sce", base="b", models=["m1", "m2"], select_topk=0.5, output="m")  # doctest: +SKIP
    """

    name = "sce"
    title = "SCE"
    formula = (
        f"B + sum(a_i * (M_i - B)) / sum(a_i), both sums {elected('sum(M_i - B)')}, "
        "a_i = mean((M_i - B)^2), or 1 / N where these sum to less than 1e-6"
    )
    source = "Wan et al., FuseChat, 2024, arXiv 2408.07990"
    citation = """@misc{wan2024fusechat,
  title={{FuseChat}: Knowledge Fusion of Chat Models},
  author={Wan, Fanqi and Zhong, Longguang and Yang, Ziyi and Chen, Ruijun and Quan, Xiaojun},
  year={2024},
  eprint={2408.07990},
  archivePrefix={arXiv}
}"""
    contract = Contract(base="required", least=2, most=8)
    Settings = SceSettings

    def formula_with(self, parameters: Mapping[str, Any]) -> str:
        if SceSettings.from_dict(parameters).passes == 1:
            return self.formula
        return (
            f"{self.formula}; this where the variance over the models is among the int(select_topk * m) largest of the "
            "m that are not 0; elsewhere B, and M_i - B counts as 0 in a_i"
        )

    def plan(self, info: TensorInfo, place: TensorPlace | None, settings: SceSettings) -> Treatment:
        return Treatment("merge", passes=settings.passes)

    def measure(self, block: Block, number: int, so_far: VarianceBin | Selected | None) -> Any:
        """Measure counts of the variance, then counts inside a bin of it, then sums of squares. With one pass, only the
        last."""
        if isinstance(so_far, Selected):
            mask = selection(block, so_far.threshold)
            return [squares(block, role, mask) for role in block.models]
        if so_far is None:
            if block.task.passes == 1:
                return [squares(block, role, None) for role in block.models]
            variance = variance_of(block)
            return thresholds.upper_counts(variance, block.wide()), nonzero(variance)
        if so_far.place is None:
            return thresholds.merged(())
        return thresholds.lower_counts(variance_of(block), so_far.place.bin, block.wide())

    def gather(self, task: TensorTask, sums: Sequence[Sequence[Any]]) -> Any:
        blocks = [block for group in sums for block in group]
        if not blocks:
            return None
        if isinstance(blocks[0], Counts):
            return thresholds.merged(blocks)
        if isinstance(blocks[0], tuple):
            return thresholds.merged(counts for counts, _ in blocks), sum(differing for _, differing in blocks)
        return [total(parts) for parts in zip(*blocks, strict=True)]

    def decision(
        self, task: TensorTask, measured: Any, settings: SceSettings, so_far: VarianceBin | Selected | None
    ) -> VarianceBin | Selected:
        elements = math.prod(task.shape)
        if measured is None:
            return Selected(0.0, elements, (1.0 / len(task.numbers),) * len(task.numbers))
        if task.passes == 1:
            return Selected(0.0, elements, shares_of(measured, elements))
        if isinstance(so_far, Selected):
            return replace(so_far, shares=shares_of(measured, elements))
        if so_far is None:
            counts, differing = measured
            return variance_bin(counts, differing, settings.of("select_topk", task))
        if so_far.place is None:
            return Selected(0.0, elements, ()) if so_far.everything else Selected(None, 0, ())
        lower = thresholds.locate(measured, so_far.place.rank).bin
        kept = so_far.place.above + measured.at_least(lower)
        return Selected(thresholds.value_of(so_far.place.bin, lower), kept, ())

    def combine(self, block: Block, decision: Selected, out: Float32) -> None:
        mask = selection(block, decision.threshold)
        scratch = Scratch(block)
        ballots = masked(block, (1.0,) * len(block.models), lambda place, vector, scratch: mask, scratch)
        elect(ballots, scratch.floats)
        write_agreeing(block, ballots, decision.inverses, scratch, out, decision.shares)

    def kept(self, block: Block, decision: Any) -> Iterator[Array | None] | None:
        if not isinstance(decision, Selected):
            return None
        return repeat(selection(block, decision.threshold), len(block.models))

    def agreeing(self, block: Block, decision: Any) -> Iterator[Array] | None:
        if not isinstance(decision, Selected):
            return None
        mask = selection(block, decision.threshold)
        return agreeing(block, (1.0,) * len(block.models), lambda place, vector, scratch: mask)

    def kept_counts(self, decision: Any) -> tuple[int, ...] | None:
        return (decision.kept,) * len(decision.shares) if isinstance(decision, Selected) else None

    def coefficients_of(self, decision: Any, models: Sequence[str]) -> dict[str, float]:
        if not isinstance(decision, Selected):
            return super().coefficients_of(decision, models)
        return by_role(models, decision.shares)

    def largest_result(
        self, task: TensorTask, measured: Any, settings: SceSettings, largest: Mapping[str, float]
    ) -> float | None:
        """A mean of task vectors is at most the largest of them, and the sum before it at most the sum of all."""
        base = largest[BASE]
        return base + math.fsum(magnitude + base for role, magnitude in largest.items() if role != BASE)

    def entry(self, decision: Selected) -> dict[str, Any]:
        return {"threshold": decision.threshold, "kept": decision.kept, "shares": list(decision.shares)}

    def read_entry(self, entry: Mapping[str, Any], settings: SceSettings) -> Selected:
        threshold = None if entry["threshold"] is None else between(entry["threshold"], 0.0, math.inf)
        shares = tuple(between(share, 0.0, MOST) for share in entry["shares"])
        if not 1 <= len(shares) <= self.contract.most:
            raise ValueError(f"expected a share for each of at most {self.contract.most} models, found {len(shares)}")
        return Selected(threshold, count(entry["kept"]), shares)

    def longest_decision(self, task: TensorTask, number: float) -> Selected:
        return Selected(number, math.prod(task.shape), (number,) * len(task.numbers))


def variance_bin(counts: Counts, differing: int, select_topk: float) -> VarianceBin:
    """The bin of the threshold of a tensor's variance. `differing` is the number of elements with a variance above
    0."""
    rank = int(select_topk * differing)
    if select_topk >= 1.0 or rank == 0:
        return VarianceBin(None, everything=select_topk >= 1.0)
    return VarianceBin(thresholds.locate(counts, rank))


def shares_of(sums: Sequence[float], elements: int) -> tuple[float, ...]:
    """The models' shares, by the sums of squares of their task vectors."""
    means = [each / elements for each in sums]
    whole = math.fsum(means)
    return tuple(1.0 / len(means) if whole < SMALLEST_SUM else mean / whole for mean in means)


def variance_of(block: Block) -> Float32:
    """The variance of every element's change over the models, formed in float64 and rounded to float32."""
    import numpy as np

    vectors = [block.task_vector(role) for role in block.models]
    mean, variance, part = vectors[0].astype(np.float64), np.zeros(vectors[0].shape), block.wide()
    for vector in vectors[1:]:
        np.add(mean, vector, out=mean)
    np.divide(mean, len(vectors), out=mean)
    for vector in vectors:
        np.subtract(vector, mean, out=part)
        np.add(variance, np.multiply(part, part, out=part), out=variance)
    return np.divide(variance, len(vectors), out=variance).astype(np.float32)


def nonzero(variance: Float32) -> int:
    """How many elements differ between the models."""
    import numpy as np

    return int(np.count_nonzero(variance))


def selection(block: Block, threshold: float | None) -> Array | None:
    """The elements that are selected: bool of the block's shape, None if all are selected."""
    import numpy as np

    if threshold == 0.0:
        return None
    if threshold is None:
        return np.zeros(block.weights(BASE).shape, np.bool_)
    return np.greater_equal(variance_of(block), np.float32(threshold))


def squares(block: Block, role: str, mask: Array | None) -> Array:
    """The sums of squares of a model's selected changes by flat blocks of 1,024 elements, float64."""
    import numpy as np

    vector, wide = block.task_vector(role), block.wide()
    np.copyto(wide, vector)
    np.multiply(wide, wide, out=wide)
    if mask is not None:
        np.multiply(wide, mask, out=wide)
    return block_sums(wide)
