"""Sums over tensors of task vectors: norms and products, sign conflicts, and what a method keeps of each.

Products of float32 elements are exact in float64, and are added as `hsa.methods.gram` says, so that nothing depends on
slices or threads. Counts are whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hsa.methods.base import BASE, Block, Method
from hsa.methods.copied import COPIED
from hsa.methods.geometry import cosine, ratio
from hsa.methods.gram import pairs_of, row_products
from hsa.methods.sums import total
from hsa.methods.tensors import UNIT
from hsa.system.dtypes import Array, Float32

C = TypeVar("C", bound="Counted")


class Counted:
    """The base class of what is added up over tensors: dataclasses of numbers, of tuples of them, and of None."""

    def plus(self: C, other: C) -> C:
        """The sum of both; what one of them does not know, the sum does not know either."""
        mine, others = ([getattr(each, field.name) for field in fields(each)] for each in (self, other))  # type: ignore[arg-type]
        return type(self)(*map(_plus, mine, others))


def _plus(one: Any, two: Any) -> Any:
    if one is None or two is None:
        return None
    if isinstance(one, tuple):
        return tuple(a + b for a, b in zip(one, two, strict=True))
    return one + two


@dataclass(frozen=True)
class VectorSums(Counted):
    """Of the vectors of N models, which are task vectors or, without a base, the models themselves.

    `base` is |B|^2, None without a base. `products` are those of every two vectors [N (N + 1) / 2], in the order of
    `pairs_of`. `moved` counts the elements of each that are not 0 [N]. `shared` counts the elements that are not 0 in
    two vectors or more, `disagreeing` those of them in which not all of these have one sign.
    """

    base: float | None
    products: tuple[float, ...]
    moved: tuple[int, ...]
    shared: int
    disagreeing: int

    @property
    def squares(self) -> tuple[float, ...]:
        """The squared norm of each vector [N]."""
        return tuple(self.product(number, number) for number in range(len(self.moved)))

    def product(self, one: int, two: int) -> float:
        """The product of two vectors, by the numbers of their models."""
        return self.products[pairs_of(len(self.moved)).index((min(one, two), max(one, two)))]

    def cosine(self, one: int, two: int) -> float | None:
        """The cosine of two vectors; None where one of them is zero."""
        squares = self.squares
        if one == two:
            return 1.0 if squares[one] > 0.0 else None
        return cosine(squares[one], squares[two], self.product(one, two))

    def apart(self, one: int, two: int) -> float | None:
        """The distance between two vectors, relative to the norm of the second; None where that is zero."""
        squares = self.squares
        return ratio(max(0.0, squares[one] + squares[two] - 2.0 * self.product(one, two)), squares[two])

    def relative(self, number: int) -> float | None:
        """The norm of a task vector over base's; None without a base, and where that is zero."""
        return None if self.base is None else ratio(self.squares[number], self.base)

    @property
    def conflict(self) -> float | None:
        """The share of shared elements in which signs disagree; None where no element is shared."""
        return self.disagreeing / self.shared if self.shared else None


@dataclass(frozen=True)
class KeptSums(Counted):
    """What a method keeps of the task vectors of N models, of the tensors in which it decides on that.

    `elements` are those of each model [N], and `kept` those that are kept. `squares` and `kept_squares` are the sums of
    their squares; `kept_moved` are the kept elements that are not 0, and `agreeing` those of them that have the elected
    sign (None where the models do not vote). All but the first two are None where they come from a record.
    """

    elements: tuple[int, ...]
    kept: tuple[int, ...]
    squares: tuple[float, ...] | None = None
    kept_squares: tuple[float, ...] | None = None
    kept_moved: tuple[int, ...] | None = None
    agreeing: tuple[int, ...] | None = None

    def share(self, number: int) -> float | None:
        """The share of a model's elements that is kept; None where there are none."""
        return self.kept[number] / self.elements[number] if self.elements[number] else None

    def energy(self, number: int) -> float | None:
        """The share of a task vector's squared norm that is kept; None where it is not known or the vector is zero."""
        if self.squares is None or self.kept_squares is None or not self.squares[number] > 0.0:
            return None
        return min(1.0, self.kept_squares[number] / self.squares[number])

    def agreement(self, number: int) -> float | None:
        """The share of a model's kept elements that have the elected sign, of those that are not 0."""
        if self.agreeing is None or self.kept_moved is None or not self.kept_moved[number]:
            return None
        return self.agreeing[number] / self.kept_moved[number]


class BlockKept(NamedTuple):
    """Of one model in one block: counts, and sums of squares by flat blocks of 1,024 elements, float64."""

    kept: int
    moved: int
    squares: Array


class BlockSums(NamedTuple):
    """What is seen of one block: sums by flat blocks of 1,024 elements, float64 [pairs, blocks], and counts.

    `base` is of base alone, or of base and of the only model; None without a base.
    """

    elements: int
    base: Array | None
    products: Array
    moved: tuple[int, ...]
    shared: int
    disagreeing: int
    kept: tuple[BlockKept, ...] | None
    agreeing: tuple[int, ...] | None


@dataclass(frozen=True)
class TensorSums:
    """The sums of one tensor. `angle` is that between base and the only model, in radians; None of several models, and
    where one of them is zero."""

    vectors: VectorSums
    kept: KeptSums | None
    angle: float | None


def block_sums(method: Method[Any, Any], decision: Any, *, masks: bool) -> Callable[[Block], BlockSums]:
    """What sums up a block whose task has a base or none. `masks`: what the method keeps by its decision, too."""

    def sums_of(block: Block) -> BlockSums:
        based = BASE in block.task.sources
        vectors = [(block.task_vector if based else block.weights)(role).reshape(1, -1) for role in block.models]
        moved, shared, disagreeing = _signs(vectors)
        base = None
        if based:
            rows = [block.weights(role).reshape(1, -1) for role in (BASE, *(block.models if len(vectors) == 1 else ()))]
            base = row_products(rows)[:, 0]
        products = _products(vectors, any(moved))
        kept = method.kept(block, decision) if masks else None
        every = None if kept is None else tuple(_kept(block, place, products, mask) for place, mask in enumerate(kept))
        agreeing = method.agreeing(block, decision) if masks else None
        votes = None if agreeing is None else tuple(int(np.count_nonzero(each)) for each in agreeing)
        return BlockSums(vectors[0].size, base, products, moved, shared, disagreeing, every, votes)

    return sums_of


def _signs(vectors: Sequence[Float32]) -> tuple[tuple[int, ...], int, int]:
    """How many elements of each vector are not 0, and how many in two or more, with one sign or with both."""
    several = np.zeros(vectors[0].shape, np.uint8)
    up, down = np.zeros(vectors[0].shape, np.bool_), np.zeros(vectors[0].shape, np.bool_)
    moved = []
    for vector in vectors:
        nonzero = vector != 0
        moved.append(int(np.count_nonzero(nonzero)))
        several += nonzero
        up |= vector > 0
        down |= vector < 0
    return tuple(moved), int(np.count_nonzero(several > 1)), int(np.count_nonzero(up & down))


def _products(vectors: Sequence[Float32], moved: bool) -> Array:
    """The products of every two vectors by flat blocks [pairs, blocks]: zeros, unformed, where none has `moved`."""
    if moved:
        return row_products(vectors)[:, 0]
    return np.zeros((len(pairs_of(len(vectors))), -(-vectors[0].size // UNIT)))


def _kept(block: Block, place: int, products: Array, mask: Array | None) -> BlockKept:
    """What is kept of a model by its place; where all is, its squares are those among the products."""
    vector = block.task_vector(block.models[place]).reshape(1, -1)
    if mask is None:
        squares = products[pairs_of(len(block.models)).index((place, place))]
        return BlockKept(vector.size, int(np.count_nonzero(vector)), squares)
    bits = block.room(block.models[place]).reshape(1, -1).view(np.uint32)
    kept = np.multiply(vector.view(np.uint32), mask.reshape(1, -1), out=bits).view(np.float32)
    moved = int(np.count_nonzero(kept))
    return BlockKept(int(np.count_nonzero(mask)), moved, _products([kept], moved > 0)[0])


def gather(blocks: Sequence[BlockSums], places: Sequence[int], models: int, *, base: bool, masks: bool) -> TensorSums:
    """The sums of a tensor from those of its blocks in order. `places` are the numbers of its models among so many,
    whose vectors count as zero where they lack the tensor. `base`: there is one. `masks`: the method drops elements."""
    own = pairs_of(len(places))
    numbers = {(places[i], places[j]): n for n, (i, j) in enumerate(own)}
    sums = [total(block.products[n] for block in blocks) for n in range(len(own))]
    products = tuple(sums[numbers[pair]] if pair in numbers else 0.0 for pair in pairs_of(models))
    of_base = [total(parts) for parts in zip(*(b.base for b in blocks if b.base is not None), strict=True)]
    vectors = VectorSums(
        (of_base[0] if of_base else 0.0) if base else None,
        products,
        _spread([[block.moved[n] for block in blocks] for n in range(len(places))], places, models),
        sum(block.shared for block in blocks),
        sum(block.disagreeing for block in blocks),
    )
    return TensorSums(vectors, _gather_kept(blocks, vectors, places, models) if masks else None, _angle(of_base))


def _spread(parts: Sequence[Sequence[int]], places: Sequence[int], models: int) -> tuple[int, ...]:
    """The sum of each model's parts, 0 for a model that has none."""
    by_place = dict(zip(places, map(sum, parts), strict=True))
    return tuple(by_place.get(number, 0) for number in range(models))


def _gather_kept(
    blocks: Sequence[BlockSums], vectors: VectorSums, places: Sequence[int], models: int
) -> KeptSums | None:
    of_models = [[block.kept[n] for block in blocks if block.kept is not None] for n in range(len(places))]
    if blocks and not all(of_models):
        return None
    squares = dict(zip(places, (total(each.squares for each in parts) for parts in of_models), strict=True))
    votes = [[block.agreeing[n] for block in blocks if block.agreeing is not None] for n in range(len(places))]
    return KeptSums(
        _spread([[block.elements for block in blocks] for _ in places], places, models),
        _spread([[each.kept for each in parts] for parts in of_models], places, models),
        vectors.squares,
        tuple(squares.get(number, 0.0) for number in range(models)),
        _spread([[each.moved for each in parts] for parts in of_models], places, models),
        _spread(votes, places, models) if all(votes) else None,
    )


def _angle(products: Sequence[float]) -> float | None:
    """The angle between two vectors by their squared norms and their product."""
    found = cosine(products[0], products[2], products[1]) if len(products) == 3 else None
    return None if found is None else math.acos(found)


def is_finite(sums: TensorSums) -> bool:
    """Whether no source, and no task vector, holds NaN or Inf."""
    return all(map(math.isfinite, (*sums.vectors.products, sums.vectors.base or 0.0)))


def drops(decision: Any) -> bool:
    """Whether a method is asked what it keeps of a tensor: not of one that is copied."""
    return decision is not None and decision is not COPIED
