"""Sums over tensors of task vectors: norms and products, sign conflicts, and the part that a method keeps of each.

Products of float32 elements are exact in float64. They are added in the order of `hsa.methods.gram`, so results do not
depend on slices or threads. Counts are integers.
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
    """The base class of sums over tensors: dataclasses whose fields are numbers, tuples of numbers, or None."""

    def plus(self: C, other: C) -> C:
        """The sum of both, field by field; a field that is None in one of them is None in the sum."""
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
    """Sums over the vectors of N models, which are task vectors or, without a base, the models themselves.

    `base` is |B|^2, None without a base. `products` are the products of all pairs of vectors [N (N + 1) / 2], in the
    order of `pairs_of`. `moved` counts the nonzero elements of each vector [N]. `shared` counts the elements that are
    nonzero in at least two vectors, and `disagreeing` counts those of them that do not have the same sign in all of
    these vectors.
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
        """The cosine of two vectors; None if one of them is zero."""
        squares = self.squares
        if one == two:
            return 1.0 if squares[one] > 0.0 else None
        return cosine(squares[one], squares[two], self.product(one, two))

    def apart(self, one: int, two: int) -> float | None:
        """The distance between two vectors, relative to the norm of the second; None if that norm is zero."""
        squares = self.squares
        return ratio(max(0.0, squares[one] + squares[two] - 2.0 * self.product(one, two)), squares[two])

    def relative(self, number: int) -> float | None:
        """The norm of a task vector over base's norm; None without a base, or if base's norm is zero."""
        return None if self.base is None else ratio(self.squares[number], self.base)

    @property
    def conflict(self) -> float | None:
        """The share of shared elements in which signs disagree; None if no element is shared."""
        return self.disagreeing / self.shared if self.shared else None


@dataclass(frozen=True)
class KeptSums(Counted):
    """Sums over what a method keeps of the task vectors of N models, in tensors where it decides this.

    `elements` counts the elements of each model [N], and `kept` those that are kept. `squares` and `kept_squares` are
    the sums of their squares. `kept_moved` counts the kept elements that are nonzero, and `agreeing` those of them that
    have the elected sign (None if the models do not vote). All but the first two are None if they come from a record.
    """

    elements: tuple[int, ...]
    kept: tuple[int, ...]
    squares: tuple[float, ...] | None = None
    kept_squares: tuple[float, ...] | None = None
    kept_moved: tuple[int, ...] | None = None
    agreeing: tuple[int, ...] | None = None

    def share(self, number: int) -> float | None:
        """The share of a model's elements that is kept; None if it has no elements."""
        return self.kept[number] / self.elements[number] if self.elements[number] else None

    def energy(self, number: int) -> float | None:
        """The share of a task vector's squared norm that is kept; None if it is not known or the vector is zero."""
        if self.squares is None or self.kept_squares is None or not self.squares[number] > 0.0:
            return None
        return min(1.0, self.kept_squares[number] / self.squares[number])

    def agreement(self, number: int) -> float | None:
        """The share of a model's kept nonzero elements that have the elected sign."""
        if self.agreeing is None or self.kept_moved is None or not self.kept_moved[number]:
            return None
        return self.agreeing[number] / self.kept_moved[number]


class BlockKept(NamedTuple):
    """The kept part of one model in one block: counts, and float64 sums of squares by flat blocks of 1,024 elements."""

    kept: int
    moved: int
    squares: Array


class BlockSums(NamedTuple):
    """The sums of one block: float64 [pairs, blocks] by flat blocks of 1,024 elements, and counts.

    `base` holds the products of base alone, or of base and the only model; None without a base.
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
    """The sums of one tensor. `angle` is the angle between base and the only model, in radians; None for several
    models, or if base or the model is zero."""

    vectors: VectorSums
    kept: KeptSums | None
    angle: float | None


def block_sums(method: Method[Any, Any], decision: Any, *, masks: bool) -> Callable[[Block], BlockSums]:
    """Return the function that sums up a block, with or without a base. With `masks`, it also sums up what the method
    keeps by its decision."""

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
    """Count the nonzero elements of each vector, the elements that are nonzero in at least two vectors, and those that
    have both signs."""
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
    """The products of all pairs of vectors by flat blocks [pairs, blocks]. Without `moved` they are zero and are not
    computed."""
    if moved:
        return row_products(vectors)[:, 0]
    return np.zeros((len(pairs_of(len(vectors))), -(-vectors[0].size // UNIT)))


def _kept(block: Block, place: int, products: Array, mask: Array | None) -> BlockKept:
    """The kept part of the model at a place. If all is kept, its squares are taken from the products."""
    vector = block.task_vector(block.models[place]).reshape(1, -1)
    if mask is None:
        squares = products[pairs_of(len(block.models)).index((place, place))]
        return BlockKept(vector.size, int(np.count_nonzero(vector)), squares)
    bits = block.room(block.models[place]).reshape(1, -1).view(np.uint32)
    kept = np.multiply(vector.view(np.uint32), mask.reshape(1, -1), out=bits).view(np.float32)
    moved = int(np.count_nonzero(kept))
    return BlockKept(int(np.count_nonzero(mask)), moved, _products([kept], moved > 0)[0])


def gather(blocks: Sequence[BlockSums], places: Sequence[int], models: int, *, base: bool, masks: bool) -> TensorSums:
    """Combine the sums of a tensor's blocks, in order.

    `places` are the numbers of the tensor's models among all `models`; a model without the tensor counts as a zero
    vector. `base` says whether there is a base, and `masks` whether the method drops elements.
    """
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
    """The sum of each model's parts, 0 for a model without parts."""
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
    """The angle between two vectors, from their squared norms and their product; None unless all three are given."""
    found = cosine(products[0], products[2], products[1]) if len(products) == 3 else None
    return None if found is None else math.acos(found)


def is_finite(sums: TensorSums) -> bool:
    """Whether all sources and task vectors are finite."""
    return all(map(math.isfinite, (*sums.vectors.products, sums.vectors.base or 0.0)))


def drops(decision: Any) -> bool:
    """Whether to ask a method what it keeps of a tensor: only if it has a decision and the tensor is not copied."""
    return decision is not None and decision is not COPIED
