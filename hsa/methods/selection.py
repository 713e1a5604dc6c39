"""Which heads of a tensor are selected, by their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TIE_RISK = 1e-5
"""Relative gap of squared scores below which two correct backends could select different heads."""


MAX_SCORE = 1e150
"""No score that is read from a file may be as large, so that its square is finite in float64. The L2 norm of a tensor
of float32 numbers is far below."""


@dataclass(frozen=True)
class Selection:
    """The heads of one tensor: squared scores (float64), the heads selected, and the margin of the cut.

    `margin` is the relative gap between the squared scores of the last head selected and the first one left out, None
    where no head or every head is selected.
    """

    squared: tuple[float, ...]
    selected: tuple[int, ...]
    margin: float | None

    @property
    def scores(self) -> tuple[float, ...]:
        return tuple(math.sqrt(value) for value in self.squared)


def select(squared: Sequence[float], keep: int) -> Selection:
    """Select the heads whose squared score is not below the `keep`-th largest; ties at the cut are all in."""
    ranked = sorted(squared, reverse=True)
    if keep == 0:
        return Selection(tuple(squared), (), None)
    cut = ranked[keep - 1]
    return of_selected(squared, tuple(head for head, score in enumerate(squared) if score >= cut))


def of_selected(squared: Sequence[float], selected: tuple[int, ...]) -> Selection:
    """The selection with its margin, for heads that were chosen already."""
    chosen = set(selected)
    dropped = [score for head, score in enumerate(squared) if head not in chosen]
    margin = None
    if chosen and dropped:
        last = min(squared[head] for head in chosen)
        margin = (last - max(dropped)) / last if last > 0 else 0.0
    return Selection(tuple(squared), selected, margin)
