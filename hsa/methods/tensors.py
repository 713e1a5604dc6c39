"""Tensors of a merge: one to be computed, what came of it, and how records hold it; and what is said of all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from hsa.architectures.base import Partition, TensorInfo, TensorPlace

BASE = "base"
"""The role of the model that task vectors are taken from."""

Layout = Literal["flat", "rows", "columns", "whole", "heads"]
"""How a tensor is cut into blocks of float32 [rows, columns].

- `flat`: as one row [1, n] in the order of its elements. Blocks begin at multiples of 1,024 elements.
- `rows`: whole rows, of which one is what lies at an index of the first axis. Blocks begin at multiples of 1,024
  elements too; a vector is one row.
- `columns`: the same blocks, for methods that decide for each column.
- `whole`: one block, the tensor as a matrix; a vector is one column.
- `heads`: each attention head is a group by itself.
"""

UNIT = 1024
"""Elements of which blocks are multiples, but for heads and for the last of a tensor."""


class LayerSpan(NamedTuple):
    """Where a tensor lies in a stack of layers: the stack, the number of its layer, and how many there are."""

    stack: str
    layer: int
    layers: int


@dataclass(frozen=True)
class TensorTask:
    """A tensor to be computed: what it is, how it is split into groups, and what it is in each source.

    `layers` counts the layers of its stack (0 where it lies in none). `sources` maps roles to the tensor there, base
    first, then the models in their order. `out_code` is the element type of the result, `output_name` its name in the
    output. A tensor that is not `merged` is the anchor's in another element type; one that is not `listed` is in no
    record. `load_codes` are the element types that each source is cast to before any arithmetic; None for none.
    `layout` says how it is cut into blocks. `numbers` are the positions of its models among the `models_given`, of
    which it may lack some. `span` is its layer, None outside of any, where `follows_layers` says whether it comes after
    them; `depth` says how far down the layers it lies, from 0.0 to 1.0, and is 0.0 outside of them, as in mergekit.
    """

    name: str
    place: TensorPlace | None
    layers: int
    shape: tuple[int, ...]
    partition: Partition
    sources: Mapping[str, Any]
    anchor: str
    out_code: str
    output_name: str
    passes: int = 0
    merged: bool = True
    listed: bool = True
    load_codes: Mapping[str, str] | None = None
    layout: Layout = "flat"
    numbers: tuple[int, ...] = ()
    models_given: int = 0
    span: LayerSpan | None = None
    depth: float = 0.0
    follows_layers: bool = False

    @property
    def stored(self) -> TensorInfo:
        """The tensor of the anchor."""
        info: TensorInfo = self.sources[self.anchor]
        return info

    @property
    def by_rows(self) -> bool:
        """Whether blocks are whole rows."""
        return self.layout in ("rows", "columns")

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the arrays that a block is cut from: see `Layout`."""
        total = math.prod(self.shape)
        if self.layout == "flat":
            return 1, total
        if self.by_rows and len(self.shape) < 2:
            return 1, total
        rows = self.shape[0] if self.shape else 1
        return rows, total // rows if rows else math.prod(self.shape[1:])

    @property
    def step(self) -> int:
        """Elements of which slices and blocks of the tensor are multiples."""
        if not self.by_rows:
            return UNIT
        columns = self.matrix[1]
        return columns * (UNIT // math.gcd(columns, UNIT)) if columns else UNIT

    @property
    def group_size(self) -> int:
        """Rows (columns, where `partition.axis` is 1) of one group."""
        return self.matrix[self.partition.axis] // self.partition.groups

    def blocks(self, group: int, elements: int, count: int = 1) -> Iterator[tuple[slice, slice]]:
        """Row and column ranges that cover `count` groups from one on, each of at most about `elements` elements."""
        rows, columns = self.matrix
        if self.layout == "whole":
            yield slice(0, rows), slice(0, columns)
        elif self.layout == "flat":
            yield from self.part_blocks(columns, elements)
        elif self.by_rows:
            yield from self.part_blocks(rows * columns, elements)
        else:
            yield from self._head_blocks(group, elements, count)

    def part_blocks(self, total: int, elements: int) -> Iterator[tuple[slice, slice]]:
        """The same for so many elements of a flat tensor, or of whole rows."""
        per_block = max(1, elements // self.step) * self.step
        if self.layout == "flat":
            for first in range(0, total, per_block):
                yield slice(0, 1), slice(first, min(first + per_block, total))
            return
        columns = self.matrix[1]
        if columns:
            rows, step = total // columns, per_block // columns
            for row in range(0, rows, step):
                yield slice(row, min(row + step, rows)), slice(0, columns)

    def _head_blocks(self, group: int, elements: int, count: int) -> Iterator[tuple[slice, slice]]:
        rows, columns = self.matrix
        first, last = group * self.group_size, (group + count) * self.group_size
        if self.partition.axis == 0:
            span, across = range(first, last), slice(0, columns)
        else:
            span, across = range(rows), slice(first, last)
        step = max(1, elements // (across.stop - across.start))
        for row in range(span.start, span.stop, step):
            yield slice(row, min(row + step, span.stop)), across


@dataclass(frozen=True)
class DistanceSums:
    """Sums over so many elements of a tensor, all or a sample of them: `origin` is the squared norm of base, or without
    one of the anchor. `products` are those of every two distances from there, of the models and then, where there is
    one, of the `output`, before it is rounded to its element type; in the order of `hsa.methods.gram.pairs_of`."""

    elements: int
    origin: float
    products: tuple[float, ...]
    output: bool


@dataclass(frozen=True)
class Outcome:
    """A target that was merged: the decision, the byte ranges of the result that may differ from the anchor's, the
    digest of the tensor in each source (`hsa.planning.tensor_digests`), the pairs of sources that hold the same values
    in it, and the sums over its elements, where they were taken."""

    task: TensorTask
    decision: Any
    changed: tuple[tuple[int, int], ...]
    digests: Mapping[str, str]
    equal: frozenset[tuple[str, str]]
    sums: DistanceSums | None = None


@dataclass(frozen=True)
class TensorRecord:
    """A merged tensor as records and reports hold it: its name in the output, its canonical name, what that means, its
    shape and element type, how many groups (heads) it has, and what was decided.

    Attributes of the decision are attributes of the record: `record.selected` is `record.decision.selected`.
    """

    name: str
    canonical: str
    place: TensorPlace | None
    shape: tuple[int, ...]
    code: str
    partition: Partition
    decision: Any

    @classmethod
    def of(cls, outcome: Outcome) -> TensorRecord:
        """The record of a tensor that was merged."""
        task = outcome.task
        return cls(task.output_name, task.name, task.place, task.shape, task.out_code, task.partition, outcome.decision)

    @property
    def projection(self) -> TensorPlace:
        """The place of an attention projection; LookupError for any other tensor."""
        if self.place is None:
            raise LookupError(f"{self.name} is no attention projection")
        return self.place

    @property
    def heads(self) -> int:
        return self.partition.groups

    @property
    def group_size(self) -> int:
        """Rows (columns, where `partition.axis` is 1) of one group."""
        return (self.shape[self.partition.axis] if self.shape else 1) // self.partition.groups

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "decision":
            raise AttributeError(name)
        return getattr(self.decision, name)


class Summary(Protocol):
    """How much a merge merges, or will merge, and in how many tensors."""

    @property
    def tensors(self) -> int: ...

    @property
    def counted(self) -> str:
        """How many of what, in a few words."""

    @property
    def headline(self) -> str:
        """The same, and in how many tensors."""

    @property
    def details(self) -> str:
        """What it comes to, to be read after the headline; empty where there is no more to say."""

    @property
    def text(self) -> str:
        """One line for people that stands alone: what it comes to. The headline, where there is no more to say."""

    def counts(self) -> dict[str, Any]:
        """The numbers behind `counted` that every report and every index of outputs says."""

    def margins(self) -> dict[str, Any]:
        """How narrow the closest decision was, for reports and indexes of sweeps."""

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it, beside what it prints of every merge."""


@dataclass(frozen=True)
class CardText:
    """What a method says on a model card: Markdown.

    `method` is the paragraph under Method; `sections` are headings with their text, such as the merged heads. `merge`
    is what the title calls the merge; where it is empty, the title names the method. `decisions` is what the provenance
    holds of each tensor.
    """

    method: str
    sections: Sequence[tuple[str, str]] = ()
    merge: str = ""
    decisions: str = "decisions"
