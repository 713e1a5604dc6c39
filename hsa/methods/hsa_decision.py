"""HSA's measurement of a target and its decision: the scores of its heads, the merged heads, and the coefficients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hsa.methods.geometry import AnyGeometry, Geometry
from hsa.methods.hsa_formula import SOLE, coefficients_of, settings_of, shares_of
from hsa.methods.selection import Selection, select
from hsa.methods.tensors import TensorTask


@dataclass(frozen=True)
class HeadScores:
    """The measurement of a target: the squared scores of its heads, whether any element of each model's task vector is
    nonzero, and the geometry of the task vectors."""

    squared: tuple[float, ...]
    differ: tuple[bool, ...]
    geometry: AnyGeometry
    _selections: dict[int, Selection] = field(default_factory=dict, repr=False, compare=False)
    _blends: dict[tuple[float, ...], Geometry] = field(default_factory=dict, repr=False, compare=False)

    @property
    def primary_differs(self) -> bool:
        return self.differ[0]

    @property
    def secondary_differs(self) -> bool:
        return self.differ[1]

    @cached_property
    def largest(self) -> float:
        """The largest score of a head."""
        return math.sqrt(max(self.squared))

    def select(self, keep: int) -> Selection:
        """The selection of `keep` heads. It is cached for each number, because candidates often share it."""
        if keep not in self._selections:
            self._selections[keep] = select(self.squared, keep)
        return self._selections[keep]

    def blended(self, shares: tuple[float, ...]) -> Geometry:
        """The geometry of primary and the weighted mean of the secondaries, cached for each set of shares."""
        if shares not in self._blends:
            self._blends[shares] = self.geometry.blended(shares)
        return self._blends[shares]


@dataclass(frozen=True)
class HsaDecision:
    """The decision for one target.

    `keep` is the number of heads to merge, `coefficient` is lambda_i in float64. `coefficients` are those of the task
    vectors in the order of the models, each rounded to float32: lambda_i, then 1 - lambda_i times each secondary's
    share. `scale` is the factor on the task vectors. `selected` are the merged heads.
    """

    keep: int
    coefficient: float
    coefficients: tuple[float, ...]
    scale: float
    selection: Selection
    measured: HeadScores | None = None
    """The measurement; None if the decision comes from a record."""
    shares: tuple[float, ...] = SOLE
    """Each secondary's share of the blend, in float64: its weight over the sum of their weights."""

    @property
    def selected(self) -> tuple[int, ...]:
        return self.selection.selected

    @property
    def scores(self) -> tuple[float, ...]:
        return self.selection.scores

    @property
    def margin(self) -> float | None:
        return self.selection.margin

    @property
    def geometry(self) -> Geometry:
        """The geometry of primary's task vector and the weighted mean of the secondaries' task vectors. Only for a
        target that was measured."""
        assert self.measured is not None
        return self.measured.blended(self.shares)


@dataclass(frozen=True)
class ScaleDecision:
    """The decision for a tensor that is no target: B + scale * tv1."""

    scale: float


def decision_of(task: TensorTask, settings: Any, selection: Selection, measured: HeadScores) -> HsaDecision:
    """The decision for a target whose heads are selected."""
    keep, coefficient = settings_of(task, settings)
    shares = shares_of(task, settings)
    coefficients = coefficients_of(coefficient, shares)
    return HsaDecision(keep, coefficient, coefficients, settings.attention_scale, selection, measured, shares)
