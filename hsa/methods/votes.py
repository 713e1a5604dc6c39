"""How masked task vectors are combined: by a weighted sum, or by a vote on the sign of every element.

`d_i` is the task vector of a model, with 0 for dropped elements, `w_i` is its weight, and `f_i` is the factor that
rescales for dropped elements:

    sum:   B + sum of a_i * d_i,  a_i = lambda * w_i / W * f_i; W is the sum of the weights with `normalize`, else 1
    vote:  B + lambda / W * sum of x_i over the models that agree,  x_i = w_i * f_i * d_i; a model agrees where its x_i
           has the sign of the sum of all x_i (plus where that is 0); W is the sum of the weights of those that agree
           with `normalize`, else 1

Coefficients are formed in float64 and rounded to float32 once; every product and sum of elements is rounded to float32,
in the order of the models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, product
from typing import TYPE_CHECKING

from hsa.methods.base import BASE, Block
from hsa.methods.weights import divisor

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32

CANCELLED = 2.0**-24
"""Weights of agreeing models cancel if their sum is at most this share of their magnitudes' sum, which a float32 cannot
tell from 0. Then the result is not divided by their sum."""


class Scratch:
    """Temporary memory of a block, in the float64 memory of `Block.wide`: float32 numbers and three arrays of bytes."""

    def __init__(self, block: Block) -> None:
        import numpy as np

        wide = block.wide()
        self._shape, self._size = wide.shape, wide.size
        self._bytes = wide.reshape(-1).view(np.uint8)
        self.floats: Float32 = self._bytes[: 4 * wide.size].view(np.float32).reshape(wide.shape)

    def small(self, number: int) -> Array:
        """One of three arrays of uint8, 0 to 2."""
        first = (4 + number) * self._size
        return self._bytes[first : first + self._size].reshape(self._shape)

    def flags(self, number: int) -> Array:
        """The same memory for bool."""
        import numpy as np

        return self.small(number).view(np.bool_)


Keep = Callable[[int, "Float32", Scratch], "Array | None"]
"""A function of the place of a model, its task vector in a block, and the scratch. It returns the elements that are
kept, as bool, or None if all are. It may use all of the scratch, and the result may be a part of it."""


@dataclass(frozen=True)
class Blend:
    """How the task vectors of a tensor are combined.

    `weights` and `factors` are the models' in their order: `w_i` and `f_i`.
    """

    weights: tuple[float, ...]
    factors: tuple[float, ...]
    lam: float
    normalize: bool

    @cached_property
    def summands(self) -> tuple[float, ...]:
        """The coefficients of a sum."""
        whole = divisor(self.weights) if self.normalize else 1.0
        return tuple(self.lam * w / whole * f for w, f in zip(self.weights, self.factors, strict=True))

    @cached_property
    def ballots(self) -> tuple[float, ...]:
        """The coefficients of the models in a vote."""
        return tuple(w * f for w, f in zip(self.weights, self.factors, strict=True))

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The factors on the sum over the agreeing models: one for each set of models, in the order of `subsets`; or
        one for all."""
        if not self.normalize:
            return (self.lam,)
        return tuple(map(self._share, subsets(self.weights)))

    def _share(self, weights: tuple[float, ...]) -> float:
        whole = math.fsum(weights)
        return self.lam / whole if abs(whole) > CANCELLED * math.fsum(map(abs, weights)) else self.lam

    def bound(self, magnitudes: Sequence[float], *, votes: bool) -> float:
        """A bound on the merged task vector, from bounds on those of the models."""
        coefficients = self.ballots if votes else self.summands
        whole = math.fsum(abs(a) * each for a, each in zip(coefficients, magnitudes, strict=True))
        return max(map(abs, self.shares)) * whole if votes else whole


def subsets(values: Sequence[float]) -> Iterator[tuple[float, ...]]:
    """Every set of the models, as the values of those in it. The number of a set has one bit for each model; the first
    model's bit is the highest.

    Example:
        >>> list(subsets([1.0, 2.0]))
        [(), (2.0,), (1.0,), (1.0, 2.0)]
    """
    return (tuple(compress(values, chosen)) for chosen in product((False, True), repeat=len(values)))


def write_masked_sum(block: Block, coefficients: Sequence[float], keep: Keep, out: Float32) -> None:
    """Write base plus the sum of the kept elements times their coefficients. `out` is written last."""
    import numpy as np

    total, *others = masked(block, coefficients, keep, Scratch(block))
    for term in others:
        np.add(total, term, out=total)
    np.add(block.weights(BASE), total, out=out)


def write_vote(block: Block, coefficients: Sequence[float], shares: Sequence[float], keep: Keep, out: Float32) -> None:
    """Write base plus the sum over the agreeing models, times the share of their set. `out` is written last."""
    scratch = Scratch(block)
    ballots = masked(block, coefficients, keep, scratch)
    elect(ballots, scratch.floats)
    write_agreeing(block, ballots, shares, scratch, out)


def masked(block: Block, coefficients: Sequence[float], keep: Keep, scratch: Scratch) -> list[Float32]:
    """The kept elements of each task vector times its coefficient, and +0 for the others; in the models' rooms."""
    import numpy as np

    terms = []
    for place, (role, coefficient) in enumerate(zip(block.models, coefficients, strict=True)):
        vector = block.task_vector(role)
        mask = keep(place, vector, scratch)
        term = np.multiply(vector, np.float32(coefficient), out=block.room(role))
        if mask is not None:
            bits = term.view(np.uint32)  # a float32 times False would be -0 for a negative one
            np.multiply(bits, mask, out=bits)
        terms.append(term)
    return terms


def elect(ballots: Sequence[Float32], signs: Float32) -> None:
    """Write the sign of the sum of all ballots into `signs`: the bits of +0 or of -0."""
    import numpy as np

    np.copyto(signs, ballots[0])
    for ballot in ballots[1:]:
        np.add(signs, ballot, out=signs)
    bits = signs.view(np.uint32)
    np.bitwise_and(bits, np.uint32(1 << 31), out=bits)


def agreeing(block: Block, coefficients: Sequence[float], keep: Keep) -> Iterator[Array]:
    """The elements of each model that agree with the elected sign: one bool array of the block's shape per model, all
    in the same memory. The models' rooms are overwritten."""
    import numpy as np

    scratch = Scratch(block)
    ballots = masked(block, coefficients, keep, scratch)
    elect(ballots, scratch.floats)
    signs = scratch.floats.view(np.uint32)
    return (np.greater(aligned(ballot, signs), 0, out=scratch.flags(2)) for ballot in ballots)


def aligned(ballot: Float32, signs: Array) -> Array:
    """The bits of a ballot as int32 whole numbers, in its own memory. Its sign is flipped where `signs` contains minus.

    An element agrees if its number is above 0. Elements that do not agree have numbers of 0 or below.
    """
    import numpy as np

    bits: Array = ballot.view(np.int32)
    np.bitwise_xor(bits.view(np.uint32), signs, out=bits.view(np.uint32))
    return bits


def write_agreeing(
    block: Block,
    ballots: Sequence[Float32],
    shares: Sequence[float],
    scratch: Scratch,
    out: Float32,
    coefficients: Sequence[float] = (),
) -> None:
    """Write base plus the sum of the ballots whose sign is that in the scratch's floats, times the share of their set.
    If there are `coefficients`, each at least 0, they are the factors of the ballots in this sum.

    The signs of the ballots are flipped where minus is elected (`aligned`), and that of the sum is flipped back.
    """
    import numpy as np

    signs, number, agrees = scratch.floats.view(np.uint32), scratch.small(1), scratch.flags(2)
    number[...] = 0
    for place, ballot in enumerate(ballots):
        bits = aligned(ballot, signs)
        if len(shares) > 1:
            np.add(number, number, out=number)
            np.add(number, np.greater(bits, 0, out=agrees).view(np.uint8), out=number)
        np.maximum(bits, 0, out=bits)
        if coefficients:
            np.multiply(ballot, np.float32(coefficients[place]), out=ballot)
    total = ballots[0]
    for ballot in ballots[1:]:
        np.add(total, ballot, out=total)
    np.bitwise_xor(total.view(np.uint32), signs, out=total.view(np.uint32))
    np.add(total, 0, out=total)  # -0 becomes +0
    if len(shares) > 1:
        table = np.array(shares, np.float64).astype(np.float32)
        np.multiply(total, table.take(number, out=scratch.floats, mode="wrap"), out=total)
    elif shares[0] != 1.0:
        np.multiply(total, np.float32(shares[0]), out=total)
    np.add(block.weights(BASE), total, out=out)
