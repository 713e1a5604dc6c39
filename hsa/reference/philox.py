"""Random masks in plain torch, from the stateless generator Philox 4x32-10: a random word for each tensor element.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (the library Random123).

The key of a tensor is the first 8 bytes of a BLAKE3 digest, as two little-endian words. The digest is over the seed
(uint64, little-endian), the model's number (uint32, little-endian) and the tensor's canonical name in UTF-8. For the
counter ``i // 4``, the generator makes four words; the element with the flat index ``i`` has word ``i % 4`` of them. An
element with probability ``p`` is kept if its word is below ``floor(p * 2**32)``.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

ROUNDS = 10
WORD = (1 << 32) - 1
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Four random words for each counter.

    Args:
        counter: int64 [n, 4], each element a word in [0, 2**32), lowest word first.
        key: two words.

    Returns:
        int64 [n, 4] of words.
    """
    c0, c1, c2, c3 = counter.unbind(1)
    k0, k1 = key
    for _ in range(ROUNDS):
        one, two = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # the low 64 bits, in two's complement
        c0, c1, c2, c3 = _high(two) ^ c1 ^ k0, two & WORD, _high(one) ^ c3 ^ k1, one & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return torch.stack((c0, c1, c2, c3), dim=1)


def key_of(seed: int, number: int, name: str) -> tuple[int, int]:
    """The key for one tensor of one model. ``seed`` is below 2**64; ``number`` is the model's index among all models,
    from 0."""
    from blake3 import blake3

    digest = blake3(struct.pack("<QI", seed, number) + name.encode("utf-8")).digest()
    low, high = struct.unpack("<II", digest[:8])
    return low, high


def words(first: int, count: int, key: tuple[int, int]) -> Tensor:
    """The words of ``count`` elements, starting at the flat index ``first``: int64 [count]."""
    counters = torch.arange(first // 4, (first + count + 3) // 4, dtype=torch.int64)
    zeros = torch.zeros_like(counters)
    counter = torch.stack((counters & WORD, counters >> 32, zeros, zeros), dim=1)
    return philox4x32(counter, key).flatten()[first % 4 :][:count]


def kept(probability: float, shape: torch.Size, *, seed: int, number: int, name: str) -> Tensor:
    """The mask of elements that are kept with a probability in [0, 1]: bool of a tensor's shape."""
    limit = math.floor(probability * 2.0**32)
    return (words(0, shape.numel(), key_of(seed, number, name)) < limit).reshape(shape)


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & WORD
