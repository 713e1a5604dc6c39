"""One tensor to merge, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from hsa.checkpoint import Role, TensorRef
from hsa.whisper import Projection

TIE_RISK = 1e-5
"""Relative gap of squared scores below which two correct backends could select different heads."""

MAX_SCORE = 1e150
"""No score that is read from a file may be as large, so that its square is finite in float64. The L2 norm of a tensor
of float32 numbers is far below."""


@dataclass(frozen=True)
class Target:
    """A target tensor: where its bytes lie in the three sources, its heads and its coefficients.

    `shape` is (d_out, d_in) or (d_out,). `coefficient` is lambda_i in float64, `c1` and `c2` its float32
    roundings of lambda_i and 1 - lambda_i. `load_codes` are the element types that reference numerics cast
    each source to first, None in exact numerics.
    """

    projection: Projection
    shape: tuple[int, ...]
    heads: int
    k: float
    keep: int
    coefficient: float
    c1: float
    c2: float
    scale: float
    base: TensorRef
    primary: TensorRef
    secondary: TensorRef
    out_code: str
    load_codes: Mapping[Role, str] | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape as rows and columns; a bias is one column."""
        return (self.shape[0], self.shape[1]) if len(self.shape) == 2 else (self.shape[0], 1)

    @property
    def output_name(self) -> str:
        """Its name in the output: primary's, or with reference numerics the one that transformers saves."""
        return self.primary.name if self.load_codes is None else f"model.{self.projection.name}"

    def ref(self, role: Role) -> TensorRef:
        """Where the tensor lies in a source."""
        return {"base": self.base, "primary": self.primary, "secondary": self.secondary}[role]

    def writing(self, code: str) -> Target:
        """The same target with its result in another element type."""
        return self if code == self.out_code else replace(self, out_code=code)

    @property
    def head_dim(self) -> int:
        return self.shape[self.projection.head_axis] // self.heads

    def blocks(self, head: int, elements: int, count: int = 1) -> Iterator[tuple[slice, slice]]:
        """Row and column ranges that cover `count` heads from one on, each of at most about `elements` elements."""
        rows, columns = self.matrix
        first, last = head * self.head_dim, (head + count) * self.head_dim
        if self.projection.head_axis == 0:
            span, across = range(first, last), slice(0, columns)
        else:
            span, across = range(rows), slice(first, last)
        step = max(1, elements // (across.stop - across.start))
        for row in range(span.start, span.stop, step):
            yield slice(row, min(row + step, span.stop)), across


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
