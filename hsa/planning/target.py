"""One target tensor to merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from hsa.architectures.base import TensorPlace
from hsa.sources.roles import Role
from hsa.sources.tensor_places import TensorRef


@dataclass(frozen=True)
class Target:
    """A target tensor: where its bytes lie in the three sources, its heads and its coefficients.

    `shape` is (d_out, d_in) or (d_out,). `coefficient` is lambda_i in float64, `c1` and `c2` its float32
    roundings of lambda_i and 1 - lambda_i. `load_codes` are the element types that reference numerics cast
    each source to first, None in exact numerics.
    """

    projection: TensorPlace
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

    def with_output_code(self, code: str) -> Target:
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
