"""The tensors of a merge as tasks to compute, as outcomes and in records; and the texts about all of them."""

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
- `rows`: whole rows. A row is the slice at one index of the first axis; a vector is one row. Blocks begin at multiples
  of 1,024 elements too.
- `columns`: the same blocks, for methods that decide for each column.
- `whole`: one block, the tensor as a matrix; a vector is one column.
- `heads`: each attention head is a group by itself.
"""

UNIT = 1024
"""Blocks have a multiple of this number of elements, except for heads and for the last block of a tensor."""


class LayerSpan(NamedTuple):
    """The place of a tensor in a stack of layers: the stack, the number of its layer, and the number of layers."""

    stack: str
    layer: int
    layers: int


@dataclass(frozen=True)
class TensorTask:
    """A tensor to be computed: its properties, how it is split into groups, and its counterpart in each source.

    `layers` counts the layers of its stack (0 outside of any stack). `sources` maps roles to the tensor there: base
    first, then the models in their order. `out_code` is the element type of the result, `output_name` its name in the
    output. If not `merged`, the tensor is the anchor's in another element type. If not `listed`, it is in no record.
    `load_codes` are the element types that the sources are cast to before any arithmetic; None for no cast. `layout`
    says how it is cut into blocks. `numbers` are the positions of its models among the `models_given`; some models may
    lack the tensor. `span` is its layer, None outside of layers; then `follows_layers` says whether it comes after
    them. `depth` says how far down the layers it lies, from 0.0 to 1.0, and is 0.0 outside of them, as in mergekit.
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
        """Rows and columns of the matrix that blocks are cut from: see `Layout`."""
        total = math.prod(self.shape)
        if self.layout == "flat":
            return 1, total
        if self.by_rows and len(self.shape) < 2:
            return 1, total
        rows = self.shape[0] if self.shape else 1
        return rows, total // rows if rows else math.prod(self.shape[1:])

    @property
    def step(self) -> int:
        """The number of elements that slices and blocks of the tensor are multiples of."""
        if not self.by_rows:
            return UNIT
        columns = self.matrix[1]
        return columns * (UNIT // math.gcd(columns, UNIT)) if columns else UNIT

    @property
    def group_size(self) -> int:
        """Rows (columns, where `partition.axis` is 1) of one group."""
        return self.matrix[self.partition.axis] // self.partition.groups

    def blocks(self, group: int, elements: int, count: int = 1) -> Iterator[tuple[slice, slice]]:
        """Row and column ranges that cover `count` groups from `group` on, each of at most about `elements`
        elements."""
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
        """The ranges for `total` elements of a flat tensor, or of whole rows; see `blocks`."""
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
    """Sums over `elements` elements of a tensor, all or a sample of them. `origin` is the squared norm of base, or of
    the anchor if there is no base. `products` are those of every two distances from there, in the order of
    `hsa.methods.gram.pairs_of`: the distances of the models, and then, if `output`, that of the output before it is
    rounded to its element type."""

    elements: int
    origin: float
    products: tuple[float, ...]
    output: bool


@dataclass(frozen=True)
class Outcome:
    """A merged target: the decision, the byte ranges of the result that may differ from the anchor's, the digest of the
    tensor in each source (`hsa.planning.tensor_digests`), the pairs of sources with the same values in it, and the sums
    over its elements, if they were taken."""

    task: TensorTask
    decision: Any
    changed: tuple[tuple[int, int], ...]
    digests: Mapping[str, str]
    equal: frozenset[tuple[str, str]]
    sums: DistanceSums | None = None


@dataclass(frozen=True)
class TensorRecord:
    """A merged tensor in records and reports: its name in the output, its canonical name, the place that this name
    means, its shape and element type, its number of groups (heads), and the decision.

    Attributes of the decision are attributes of the record: `record.selected` is `record.decision.selected`.

    Example:
        >>> report = hsa.merge("whisper-small", "m1", "m2", "merged")
        >>> record = report.tensors["model.encoder.layers.0.self_attn.q_proj.weight"]
        >>> record.code, record.selected
        ('F32', (0, 2))
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
        """The count with its unit, in a few words."""

    @property
    def headline(self) -> str:
        """The count, and the number of tensors."""

    @property
    def details(self) -> str:
        """The result of the merge, to be read after the headline; empty if there is no more to say."""

    @property
    def text(self) -> str:
        """One line for people that is complete in itself: the result of the merge, or the headline if there is no more
        to say."""

    def counts(self) -> dict[str, Any]:
        """The numbers behind `counted`, for every report and every index of outputs."""

    def margins(self) -> dict[str, Any]:
        """The margin of the closest decision, for reports and indexes of sweeps."""

    def as_dict(self) -> dict[str, Any]:
        """The values that `--json` prints, besides those of every merge."""


@dataclass(frozen=True)
class CardText:
    """What a method says on a model card: Markdown.

    `method` is the paragraph under the heading Method; `sections` are headings with their text, such as the merged
    heads. `merge` is the title's name for the merge; if it is empty, the title names the method. `decisions` says what
    the provenance contains for each tensor.
    """

    method: str
    sections: Sequence[tuple[str, str]] = ()
    merge: str = ""
    decisions: str = "decisions"
