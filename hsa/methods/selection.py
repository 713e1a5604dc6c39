"""Select the heads of a tensor by their scores, and count them over tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeVar

TIE_RISK = 1e-5
"""Relative gap of squared scores below which two correct backends could select different heads."""


MAX_SCORE = 1e150
"""Upper limit of scores that are read from a file, so that their squares are finite in float64. The L2 norm of a tensor
of float32 numbers is far below it."""


@dataclass(frozen=True)
class Selection:
    """The heads of one tensor: squared scores (float64), the heads selected, and the margin of the cut.

    `margin` is the relative gap between the squared scores of the last head selected and the first one left out, None
    where no head or every head is selected.
    """

    squared: tuple[float, ...]
    selected: tuple[int, ...]
    margin: float | None
    recorded: tuple[float, ...] | None = None
    """The scores of a record, whose squares are rounded; None if the scores were measured."""

    @cached_property
    def scores(self) -> tuple[float, ...]:
        return tuple(math.sqrt(value) for value in self.squared) if self.recorded is None else self.recorded

    @cached_property
    def merged(self) -> frozenset[int]:
        """The heads selected, as a set."""
        return frozenset(self.selected)


def select(squared: Sequence[float], keep: int) -> Selection:
    """Select the heads whose squared score is at least the `keep`-th largest. All heads that tie at the cut are
    selected."""
    ranked = sorted(squared, reverse=True)
    if keep == 0:
        return Selection(tuple(squared), (), None)
    cut = ranked[keep - 1]
    return selection_of(squared, tuple(head for head, score in enumerate(squared) if score >= cut))


def selection_of(squared: Sequence[float], selected: tuple[int, ...]) -> Selection:
    """The selection with its margin, for heads that are already selected."""
    merged = set(selected)
    dropped = [score for head, score in enumerate(squared) if head not in merged]
    margin = None
    if selected and dropped:
        last = min(squared[head] for head in selected)
        margin = (last - max(dropped)) / last if last > 0 else 0.0
    return Selection(tuple(squared), selected, margin)


class SelectedHeads(Protocol):
    """A tensor with selected heads, such as a record of one, or what a report says of it."""

    @property
    def heads(self) -> int: ...

    @property
    def selected(self) -> tuple[int, ...]: ...


class HeadCounts(NamedTuple):
    """How many heads are selected, and how many there are."""

    selected: int
    total: int

    def __str__(self) -> str:
        return f"{self.selected} of {self.total}"


@dataclass(frozen=True)
class DecidedHeads:
    """A merged tensor, by the decision for it: how many heads it has, and which are selected."""

    heads: int
    selected: tuple[int, ...]


def count_heads(tensors: Iterable[SelectedHeads]) -> HeadCounts:
    """The counts over tensors.

    Example:
        >>> str(count_heads([]))
        '0 of 0'
    """
    counts = [(len(tensor.selected), tensor.heads) for tensor in tensors]
    return HeadCounts(sum(selected for selected, _ in counts), sum(heads for _, heads in counts))


class SelectedWithMargin(Protocol):
    """A tensor with the margin of its cut."""

    @property
    def margin(self) -> float | None: ...


Tensor = TypeVar("Tensor", bound=SelectedWithMargin)


def narrowest(tensors: Iterable[Tensor]) -> Tensor | None:
    """The first tensor with the smallest margin; None where no tensor has one."""
    measured = [tensor for tensor in tensors if tensor.margin is not None]
    return min(measured, key=lambda tensor: tensor.margin or 0.0, default=None)
