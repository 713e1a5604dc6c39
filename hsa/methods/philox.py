"""Stateless random masks from Philox 4x32-10: any slice of a tensor's mask can be recomputed anywhere.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (the library Random123).

The key of a tensor is made from BLAKE3 over the seed (uint64, little-endian), the model's number (uint32,
little-endian) and the tensor's canonical name in UTF-8: the first 8 bytes, as two little-endian words. The element with
the flat index `i` gets word `i % 4` of the four words that the generator makes from the counter `i // 4`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from hsa.system.dtypes import Array

ROUNDS = 10
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

COUNTERS = 1 << 13
"""The number of counters that are computed at a time: six arrays of 64 KiB, which stay in a core's second-level
cache."""


class Key(NamedTuple):
    """The key of the generator: two words."""

    low: int
    high: int


def key_of(seed: int, number: int, name: str) -> Key:
    """The key for one tensor of one model.

    Args:
        seed: a whole number from 0, below 2**64.
        number: the model's place among all models of the merge, from 0.
        name: the tensor's canonical name.

    Example:
        >>> key_of(0, 0, "encoder.layers.0.fc1.weight") == key_of(0, 1, "encoder.layers.0.fc1.weight")
        False
    """
    from blake3 import blake3

    digest = blake3(struct.pack("<QI", seed, number) + name.encode("utf-8")).digest()
    return Key(*struct.unpack("<II", digest[:8]))


def limit_of(probability: float) -> int:
    """The number below which a word means "kept", for a probability from 0 to 1: `floor(probability * 2**32)`.

    Example:
        >>> limit_of(0.5), limit_of(1.0)
        (2147483648, 4294967296)
    """
    return math.floor(probability * 2.0**32)


def words(first: int, count: int, key: Key) -> Array:
    """The words of `count` elements from the flat index `first` on: uint32 [count]."""
    import numpy as np

    start = first // 4
    out = np.empty((-(-(first + count) // 4) - start, 4), np.uint32)
    for place, lanes in _lanes(start, len(out), key):
        for lane in range(4):
            out[place, lane] = lanes[lane]
    return out.reshape(-1)[first % 4 :][:count]


def kept(first: int, count: int, key: Key, limit: int) -> Array:
    """Which of `count` elements from the flat index `first` on have a word below `limit`: bool [count].

    Example:
        >>> kept(0, 4, Key(0, 0), limit_of(0.5)).tolist()  # of the words 6627e8d5 e169c58d bc57ac4c 9b00dbd8
        [True, False, False, False]
    """
    import numpy as np

    start, bound = first // 4, np.uint64(limit)
    out = np.empty((-(-(first + count) // 4) - start, 4), np.bool_)
    for place, lanes in _lanes(start, len(out), key):
        for lane in range(4):
            np.less(lanes[lane], bound, out=out[place, lane])
    return out.reshape(-1)[first % 4 :][:count]


def _lanes(start: int, count: int, key: Key) -> Iterator[tuple[slice, tuple[Array, Array, Array, Array]]]:
    """For runs of the `count` counters from `start` on: the slice of the run, and the four words of each counter, as
    uint64. The next run overwrites the arrays."""
    import numpy as np

    length = min(count, COUNTERS)
    rooms = [np.empty(length, np.uint64) for _ in range(6)]
    for begin in range(0, count, COUNTERS):
        place = slice(begin, min(begin + COUNTERS, count))
        yield place, _rounds(start + begin, key, [room[: place.stop - place.start] for room in rooms])


def _rounds(start: int, key: Key, rooms: list[Array]) -> tuple[Array, Array, Array, Array]:
    """The four words of each counter from `start` on, for as many counters as the rooms have elements.

    A round replaces (c0, c1, c2, c3). With the 64-bit products `one = m0 * c0` and `two = m1 * c2`, the new words are
    (high two ^ c1 ^ k0, low two, high one ^ c3 ^ k1, low one). Here c1 and c3 are stored in the upper half of their
    elements. So one exclusive or and one shift turn a product into a word, and one shift extracts its lower half.
    """
    import numpy as np

    c0, c1, c2, c3, one, two = rooms
    half, upper = np.uint64(32), np.uint64(WORD << 32)
    m0, m1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
    c0[:] = np.arange(start, start + len(c0), dtype=np.uint64)
    np.bitwise_and(c0, upper, out=c1)
    np.bitwise_and(c0, np.uint64(WORD), out=c0)
    c2[:] = 0
    c3[:] = 0
    low, high = key
    for _ in range(ROUNDS):
        np.multiply(c0, m0, out=one)
        np.multiply(c2, m1, out=two)
        np.bitwise_xor(c1, np.uint64(low << 32), out=c1)
        np.bitwise_xor(c3, np.uint64(high << 32), out=c3)
        np.bitwise_xor(two, c1, out=c0)
        np.right_shift(c0, half, out=c0)
        np.bitwise_xor(one, c3, out=c2)
        np.right_shift(c2, half, out=c2)
        np.left_shift(two, half, out=c1)
        np.left_shift(one, half, out=c3)
        low, high = (low + WEYL[0]) & WORD, (high + WEYL[1]) & WORD
    np.right_shift(c1, half, out=c1)
    np.right_shift(c3, half, out=c3)
    return c0, c1, c2, c3
