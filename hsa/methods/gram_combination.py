"""Linear combinations whose coefficients follow from the Gram matrix of a tensor, or of each row or column of it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hsa.architectures.base import TensorInfo, TensorPlace
from hsa.errors import shown
from hsa.methods.base import BASE, Block, NotFiniteSums, Treatment
from hsa.methods.coefficients import Coefficients, LinearCombination
from hsa.methods.gram import Gram, RowRun, column_products, gram_of, merged_runs, row_products, totals
from hsa.methods.json_fields import count as whole_number
from hsa.methods.json_fields import text
from hsa.methods.model_method import ModelSettings, by_role
from hsa.methods.sums import total
from hsa.methods.tensors import TensorTask

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32

S = TypeVar("S", bound=ModelSettings)

Axis = Literal["rows", "columns"]
"""Whether vectors run along the last axis of a tensor or along its first."""


class GramCombination(LinearCombination[S]):
    """The base class of methods with one Gram matrix for a tensor: of the task vectors if there is a base, else of the
    models. A subclass overrides `coefficients`."""

    def plan(self, info: TensorInfo, place: TensorPlace | None, settings: S) -> Treatment:
        return Treatment("merge", passes=1)

    def vectors(self, block: Block) -> list[Float32]:
        """The vectors of the matrix: float32 arrays of the block's shape."""
        vector = block.task_vector if BASE in block.task.sources else block.weights
        return [vector(role) for role in block.models]

    def vector_count(self, task: TensorTask) -> int:
        """The number of vectors of the matrix."""
        return len(task.numbers)

    def measure(self, block: Block, number: int, so_far: Coefficients | None) -> Any:
        return row_products(self.vectors(block))[:, 0]

    def gather(self, task: TensorTask, sums: Sequence[Sequence[Array]]) -> Gram:
        (blocks,) = sums
        count = self.vector_count(task)
        entries = [total(parts) for parts in zip(*blocks, strict=True)] or [0.0] * (count * (count + 1) // 2)
        if not all(map(math.isfinite, entries)):
            raise NotFiniteSums(0)
        return gram_of(entries, count)

    def decision(self, task: TensorTask, measured: Gram, settings: S, so_far: Coefficients | None) -> Coefficients:
        return Coefficients(tuple(self.coefficients(task, measured, settings)))

    @abstractmethod
    def coefficients(self, task: TensorTask, gram: Gram, settings: S) -> Sequence[float]:
        """The coefficient of each vector, in float64. Raises RequestError if there are none."""


@dataclass(frozen=True)
class GroupCoefficients:
    """The coefficients of a tensor that has them for each row or column, float32 [groups, models]. A record contains
    only the BLAKE3 digest of their bytes, so `values` is None if the decision comes from a record."""

    groups: int
    models: int
    digest: str
    values: Array | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, coefficients: Array) -> GroupCoefficients:
        """From coefficients in float64 [groups, models]."""
        import numpy as np
        from blake3 import blake3

        values = np.ascontiguousarray(coefficients, dtype=np.dtype("<f4"))
        return cls(values.shape[0], values.shape[1], blake3(values.tobytes()).hexdigest(), values)


Decision = Coefficients | GroupCoefficients


class GroupedCombination(GramCombination[S]):
    """The base class of methods that may have a Gram matrix for each vector along an axis. A subclass overrides `axis`,
    `coefficients` and `group_coefficients`."""

    def plan(self, info: TensorInfo, place: TensorPlace | None, settings: S) -> Treatment:
        axis = self.axis(settings)
        many = len(info.shape) > 1 and 0 not in info.shape
        return Treatment("merge", passes=1, layout=axis if axis is not None and many else "flat")

    @abstractmethod
    def axis(self, settings: S) -> Axis | None:
        """The axis along which a tensor is cut into vectors; None where it is one vector."""

    @abstractmethod
    def group_coefficients(self, task: TensorTask, entries: Array, settings: S) -> Array:
        """The coefficients of each group, float64 [groups, models], from the entries of its Gram matrix, float64
        [pairs, groups]."""

    def measure(self, block: Block, number: int, so_far: Any) -> Any:
        task, vectors = block.task, self.vectors(block)
        if task.layout == "columns":
            return column_products(vectors, block.first // task.matrix[1])
        if task.layout == "rows":
            return totals(row_products([vector.reshape(-1, task.shape[-1]) for vector in vectors]))
        return super().measure(block, number, so_far)

    def gather(self, task: TensorTask, sums: Sequence[Sequence[Any]]) -> Any:
        import numpy as np

        if not task.by_rows:
            return super().gather(task, sums)
        (blocks,) = sums
        entries: Array = _merged(blocks) if task.layout == "columns" else np.concatenate(blocks, axis=1)
        if not np.isfinite(entries).all():
            raise NotFiniteSums(0)
        return entries

    def decision(self, task: TensorTask, measured: Any, settings: S, so_far: Any) -> Any:
        if not task.by_rows:
            return super().decision(task, measured, settings, so_far)
        return GroupCoefficients.of(self.group_coefficients(task, measured, settings))

    def combine(self, block: Block, decision: Decision, out: Float32) -> None:
        if isinstance(decision, Coefficients):
            super().combine(block, decision, out)
            return
        if decision.values is None:
            raise ValueError("the record holds the digest of its coefficients alone")
        add_up(_scaled(block, decision.values), out, block.weights(BASE) if BASE in block.task.sources else None)

    def coefficients_of(self, decision: Any, models: Sequence[str]) -> dict[str, float]:
        """The coefficients of a tensor, or the means of those of its groups. A record does not contain the latter."""
        if not isinstance(decision, GroupCoefficients):
            return super().coefficients_of(decision, models)
        if decision.values is None:
            return {}
        wide = decision.values.astype("f8")
        means = [math.fsum(column) / decision.groups for column in wide.T.tolist()]
        return by_role(models, means)

    def applied(self, recorded: Any, decision: Any) -> Any:
        return decision if isinstance(recorded, GroupCoefficients) and recorded.values is None else recorded

    def largest_result(
        self, task: TensorTask, measured: Any, settings: S, largest: Mapping[str, float]
    ) -> float | None:
        if not task.by_rows:
            return super().largest_result(task, measured, settings, largest)
        coefficients = abs(self.decision(task, measured, settings, None).values).max(axis=0).tolist()
        base = largest.get(BASE, 0.0)
        models = (magnitude for role, magnitude in largest.items() if role != BASE)
        return base + math.fsum(a * (magnitude + base) for a, magnitude in zip(coefficients, models, strict=True))

    def entry(self, decision: Decision) -> dict[str, Any]:
        if isinstance(decision, Coefficients):
            return super().entry(decision)
        return {"groups": decision.groups, "models": decision.models, "digest": decision.digest}

    def read_entry(self, entry: Mapping[str, Any], settings: S) -> Any:
        if "digest" not in entry:
            return super().read_entry(entry, settings)
        digest = text(entry["digest"])
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise ValueError(f"expected a digest of 64 hexadecimal digits, found {shown(digest)}")
        return GroupCoefficients(whole_number(entry["groups"]), whole_number(entry["models"]), digest)

    def longest_decision(self, task: TensorTask, number: float) -> Any:
        if not task.by_rows:
            return super().longest_decision(task, number)
        return GroupCoefficients(math.prod(task.shape), len(task.numbers), "0" * 64)


def _merged(blocks: Sequence[Sequence[RowRun]]) -> Array:
    return merged_runs(run for block in blocks for run in block)


def _scaled(block: Block, values: Array) -> Iterator[Float32]:
    """The models' vectors times the coefficients of their rows or columns, in the order of the models."""
    import numpy as np

    task = block.task
    vector = block.task_vector if BASE in task.sources else block.weights
    if task.layout == "rows":
        length = task.shape[-1]
        first = block.first // length
        values = values[first : first + block.weights(block.models[0]).size // length, None]
    else:
        length = task.matrix[1]
        values = values[None]
    for number, role in enumerate(block.models):
        out = block.room(role)
        np.multiply(vector(role).reshape(-1, length), values[..., number], out=out.reshape(-1, length))
        yield out


def add_up(terms: Iterator[Float32], out: Float32, base: Float32 | None) -> None:
    """Write the sum of two terms or more into `out`. The terms are added one after another, then the sum is added to
    base, if there is one. Terms are overwritten. `out` is written only by the last operation."""
    import numpy as np

    result, pending = next(terms), next(terms)
    for term in terms:
        result, pending = np.add(result, pending, out=result), term
    if base is None:
        np.add(result, pending, out=out)
    else:
        np.add(base, np.add(result, pending, out=result), out=out)
