"""What HSA measures of a target and decides of it: the scores of its heads, the merged ones, and the coefficients."""

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
    """What is measured of a target: the squared scores of its heads, whether any element of each model's task vector is
    nonzero, and how the task vectors lie to each other."""

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
        """The selection of so many heads; made once for each number, since candidates often share it."""
        if keep not in self._selections:
            self._selections[keep] = select(self.squared, keep)
        return self._selections[keep]

    def blended(self, shares: tuple[float, ...]) -> Geometry:
        """The geometry of primary and the weighted mean of the secondaries; worked out once for each shares."""
        if shares not in self._blends:
            self._blends[shares] = self.geometry.blended(shares)
        return self._blends[shares]


@dataclass(frozen=True)
class HsaDecision:
    """What is merged in one target.

    `keep` is how many heads were to be, `coefficient` lambda_i in float64. `coefficients` are those of the task
    vectors in the order of the models, each rounded to float32: lambda_i, and 1 - lambda_i times each secondary's
    share. `scale` is the factor on the task vectors. `selected` are the merged heads.
    """

    keep: int
    coefficient: float
    coefficients: tuple[float, ...]
    scale: float
    selection: Selection
    measured: HeadScores | None = None
    """What was measured; None where the decision comes from a record."""
    shares: tuple[float, ...] = SOLE
    """What each secondary has of the blend, in float64: its weight over the sum of their weights."""

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
        """How primary's task vector and the weighted mean of the secondaries' lie to each other. Only of a target that
        was measured."""
        assert self.measured is not None
        return self.measured.blended(self.shares)


@dataclass(frozen=True)
class ScaleDecision:
    """A tensor that is no target: B + scale * tv1."""

    scale: float


def decision_of(task: TensorTask, settings: Any, selection: Selection, measured: HeadScores) -> HsaDecision:
    """The decision for a target whose heads are selected."""
    keep, coefficient = settings_of(task, settings)
    shares = shares_of(task, settings)
    coefficients = coefficients_of(coefficient, shares)
    return HsaDecision(keep, coefficient, coefficients, settings.attention_scale, selection, measured, shares)
