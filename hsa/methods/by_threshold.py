"""Methods that keep elements whose magnitude lies between two thresholds, which two passes find exactly.

The first pass counts magnitudes by their upper 16 bits. The second counts those in the bin of a threshold by their
lower 16 bits; see `thresholds`. All elements that tie with a threshold are kept. If the kept elements are rescaled, a
third pass sums magnitudes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from hsa.findings import Findings
from hsa.methods import thresholds
from hsa.methods.base import Block
from hsa.methods.json_fields import between, count
from hsa.methods.masked import L1, MaskDecision, MaskedMethod, MaskedSettings, factor_of, kept_sums, magnitude_sums
from hsa.methods.model_method import is_running
from hsa.methods.sums import total
from hsa.methods.tensors import Outcome, TensorTask
from hsa.methods.thresholds import Counts, Place
from hsa.methods.votes import Scratch
from hsa.option_names import option

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32


class Ranks(NamedTuple):
    """The magnitudes of a task vector that are kept: from the `first`-th largest to the `last`-th, counted from 1. If
    `last` is 0, none is kept."""

    first: int
    last: int


class Range(NamedTuple):
    """The range of magnitudes that are kept, both ends included. If `low` is None, nothing is kept; if `high` is None,
    there is no upper end. `kept` is the number of elements."""

    low: float | None
    high: float | None
    kept: int


@dataclass(frozen=True)
class Trimmed(MaskDecision):
    """The decision for a tensor: the range of magnitudes that is kept of each model. If it is `unscaled`, a third pass
    has yet to find the factors."""

    ranges: tuple[Range, ...]
    unscaled: bool = False

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        return tuple(each.low for each in self.ranges)

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(each.kept for each in self.ranges)


@dataclass(frozen=True)
class ThresholdBins:
    """The state after the first pass: the ranks that are kept of each model, and the places of its thresholds."""

    ranks: tuple[Ranks | None, ...]
    places: tuple[tuple[Place, ...], ...]


S = TypeVar("S", bound=MaskedSettings)


class ThresholdMethod(MaskedMethod[S, Trimmed], Generic[S]):
    """The base class. A subclass defines by `ranks` which elements are kept."""

    drops_largest: ClassVar[bool] = False
    """Whether a range of magnitudes may end below the largest."""

    @abstractmethod
    def ranks(self, task: TensorTask, settings: S, elements: int) -> tuple[Ranks | None, ...]:
        """The ranks of the magnitudes that are kept of each model; None if all are kept."""

    def measure(self, block: Block, number: int, so_far: ThresholdBins | Trimmed | None) -> list[Any]:
        if so_far is None:
            return [thresholds.upper_counts(_magnitudes(block, role), block.wide()) for role in block.models]
        if isinstance(so_far, ThresholdBins):
            return [_inside(block, role, places) for role, places in zip(block.models, so_far.places, strict=True)]
        return [self._sums(block, so_far, place) for place in range(len(block.models) if so_far.unscaled else 0)]

    def _sums(self, block: Block, decision: Trimmed, place: int) -> tuple[Array, Array]:
        vector = block.task_vector(block.models[place])
        whole = magnitude_sums(block, vector)
        return whole, kept_sums(block, vector, self.keep(block, decision, place, vector, Scratch(block)))

    def gather(self, task: TensorTask, sums: Sequence[Sequence[Any]]) -> Any:
        blocks = [block for group in sums for block in group]
        by_model = list(zip(*blocks, strict=True))
        return [_gathered(parts) for parts in by_model] or None

    def decision(
        self, task: TensorTask, measured: Any, settings: S, so_far: ThresholdBins | Trimmed | None
    ) -> ThresholdBins | Trimmed:
        elements = math.prod(task.shape)
        if isinstance(so_far, Trimmed):
            if measured is None or not so_far.unscaled:
                return so_far
            scaled = so_far.rescaled([factor_of(whole, kept) for whole, kept in measured])
            return replace(scaled, unscaled=False)
        if isinstance(so_far, ThresholdBins):
            found = zip(so_far.ranks, so_far.places, measured, strict=True)
            ranges = tuple(_range(elements, *each) for each in found)
            return Trimmed(self.blend(task, settings), ranges, unscaled=settings.rescale == L1)
        ranks = self.ranks(task, settings, elements)
        if measured is None:
            return Trimmed(self.blend(task, settings), (Range(0.0, None, elements),) * len(ranks))
        return ThresholdBins(ranks, tuple(_places(each, counts) for each, counts in zip(ranks, measured, strict=True)))

    def keep(self, block: Block, decision: Trimmed, place: int, vector: Float32, scratch: Scratch) -> Array | None:
        import numpy as np

        low, high, _ = decision.ranges[place]
        if low == 0.0 and high is None:
            return None
        mask = scratch.flags(0)
        if low is None:
            mask[...] = False
            return mask
        magnitudes = np.abs(vector, out=scratch.floats)
        np.greater_equal(magnitudes, np.float32(low), out=mask)
        if high is not None:
            np.logical_and(mask, np.less_equal(magnitudes, np.float32(high), out=scratch.flags(1)), out=mask)
        return mask

    def planned_findings(self, tasks: Sequence[TensorTask], settings: S) -> Findings:
        empty = []
        for task in tasks:
            elements = math.prod(task.shape)
            ranks = () if is_running(task.name) or not elements else self.ranks(task, settings, elements)
            if any(each is not None and each.last == 0 for each in ranks):
                empty.append(task.name)
        return Findings(tuple(zero_notes(empty)))

    def decision_findings(self, outcomes: Sequence[Outcome]) -> Findings:
        decisions = ((each.task.name, each.decision) for each in outcomes)
        empty = [name for name, decision in decisions if isinstance(decision, Trimmed) and None in decision.thresholds]
        return Findings(tuple(zero_notes(empty)))

    def kept_counts(self, decision: Any) -> tuple[int, ...] | None:
        return decision.kept if isinstance(decision, Trimmed) else None

    def entry(self, decision: Trimmed) -> dict[str, Any]:
        entry = {**super().entry(decision), "thresholds": list(decision.thresholds), "kept": list(decision.kept)}
        return {**entry, "limits": [each.high for each in decision.ranges]} if self.drops_largest else entry

    def read_entry(self, entry: Mapping[str, Any], settings: S) -> Trimmed:
        blend = self.read_blend(entry, settings)
        lows = [_magnitude(each) for each in entry["thresholds"]]
        highs = [_magnitude(each) for each in entry["limits"]] if self.drops_largest else [None] * len(lows)
        ranges = tuple(map(Range, lows, highs, map(count, entry["kept"])))
        if not len(lows) == len(highs) == len(ranges) == len(blend.weights) == len(entry["kept"]):
            raise ValueError(f"{len(blend.weights)} weights and {len(lows)} thresholds do not fit")
        return Trimmed(blend, ranges)

    def longest_decision(self, task: TensorTask, number: float) -> Trimmed:
        widest = Range(number, number, math.prod(task.shape))
        return Trimmed(self.longest_blend(task, number), (widest,) * len(task.numbers))


def zero_notes(names: Sequence[str]) -> Iterator[str]:
    """A note on the tensors of which a density keeps no element."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield (
            f"int(density * n) is 0 for a model of {names[0]}{more}: such a task vector counts as zero; a larger "
            f"{option('density')} keeps elements of it"
        )


def _magnitude(value: Any) -> float | None:
    return None if value is None else between(value, 0.0, math.inf)


def _magnitudes(block: Block, role: str) -> Float32:
    """The magnitudes of a task vector, computed in place."""
    import numpy as np

    vector = block.task_vector(role)
    return np.abs(vector, out=vector)


def _inside(block: Block, role: str, places: Sequence[Place]) -> dict[int, Counts]:
    """The counts of lower halves in the bins of the places, by bin."""
    bins = {place.bin for place in places}
    magnitudes = _magnitudes(block, role) if bins else None
    return {bin: thresholds.lower_counts(magnitudes, bin, block.wide()) for bin in bins if magnitudes is not None}


def _gathered(parts: Sequence[Any]) -> Any:
    """The combined measurement of one model's task vector in a pass, from the parts of the blocks."""
    if isinstance(parts[0], Counts):
        return thresholds.merged(parts)
    if isinstance(parts[0], dict):
        return {upper: thresholds.merged(part[upper] for part in parts) for upper in parts[0]}
    return tuple(map(total, zip(*parts, strict=True)))


def _places(ranks: Ranks | None, counts: Counts) -> tuple[Place, ...]:
    """The places of the lower threshold and, where the largest are dropped, of the upper one."""
    if ranks is None or ranks.last == 0:
        return ()
    bounds = (ranks.last,) if ranks.first == 1 else (ranks.last, ranks.first)
    return tuple(thresholds.locate(counts, bound) for bound in bounds)


def _range(elements: int, ranks: Ranks | None, places: Sequence[Place], inside: Mapping[int, Counts]) -> Range:
    """The range of magnitudes that are kept of a model, with their number."""
    if ranks is None:
        return Range(0.0, None, elements)
    if not places:
        return Range(None, None, 0)
    values, counts = [], []
    for beyond, place in enumerate(places):
        lower = thresholds.locate(inside[place.bin], place.rank).bin
        values.append(thresholds.value_of(place.bin, lower))
        counts.append(place.above + inside[place.bin].at_least(lower + beyond))
    high = values[1] if len(values) > 1 else None
    return Range(values[0], high, counts[0] - sum(counts[1:]))
