"""The oracle of random masks against Random123's known answers and arithmetic in Python's whole numbers."""

from __future__ import annotations

import math

import pytest
import torch
from blake3 import blake3

from hsa.reference import philox

KNOWN_ANSWERS = [  # Random123, kat_vectors: philox4x32 of 10 rounds: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    low, high = numbers(key)
    assert philox.philox4x32(torch.tensor([numbers(counter)]), (low, high)).tolist() == [numbers(expected)]


def test_words_are_those_of_the_counters() -> None:
    key = (7, 11)
    expected = philox.philox4x32(torch.tensor([[counter, 0, 0, 0] for counter in range(5)]), key).flatten()
    assert philox.words(0, 20, key).equal(expected)
    assert philox.words(0, 0, key).tolist() == []
    for first in range(9):
        assert philox.words(first, 6, key).equal(expected[first : first + 6])


def test_a_flat_index_beyond_32_bits_counts_on() -> None:
    first = 4 * (1 << 32) - 2
    below = philox.philox4x32(torch.tensor([[(1 << 32) - 1, 0, 0, 0]]), (1, 2))[0, 2:]
    above = philox.philox4x32(torch.tensor([[0, 1, 0, 0]]), (1, 2))[0, :2]
    assert philox.words(first, 4, (1, 2)).tolist() == [*below.tolist(), *above.tolist()]


def test_the_key_is_blake3_of_seed_number_and_name() -> None:
    data = bytes([5, 0, 0, 0, 0, 0, 0, 1]) + bytes([3, 0, 0, 0]) + "lagé.weight".encode()
    digest = blake3(data).digest()
    low, high = philox.key_of(5 + (1 << 56), 3, "lagé.weight")
    assert (low, high) == (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))


@pytest.mark.parametrize("probability", [0.0, 2.0**-33, 0.1, 0.5, 1 - 2.0**-33, 1.0])
def test_kept_is_where_the_word_is_below_the_limit(probability: float) -> None:
    shape = torch.Size([7, 3])
    mask = philox.kept(probability, shape, seed=1, number=2, name="x")
    words = philox.words(0, 21, philox.key_of(1, 2, "x"))
    assert mask.shape == shape
    assert mask.flatten().tolist() == [word < math.floor(probability * 2**32) for word in words.tolist()]
    assert probability not in (0.0, 2.0**-33, 1.0) or mask.all() == (probability == 1.0)


def test_the_limit_is_exact() -> None:
    word = int(philox.words(0, 1, philox.key_of(1, 0, "x")))
    just_above = (word + 1) / 2**32
    assert philox.kept(just_above, torch.Size([1]), seed=1, number=0, name="x").item() is True
    assert philox.kept(word / 2**32, torch.Size([1]), seed=1, number=0, name="x").item() is False


def test_shares_of_many_elements_are_near_the_probability() -> None:
    n = 40_000
    masks = [philox.kept(0.3, torch.Size([n]), seed=9, number=number, name="x") for number in range(2)]
    deviation = math.sqrt(0.3 * 0.7 * n)
    for mask in masks:
        assert abs(int(mask.sum()) - 0.3 * n) < 5 * deviation
    both = int((masks[0] & masks[1]).sum())  # the models' masks are independent
    assert abs(both - 0.09 * n) < 5 * math.sqrt(0.09 * 0.91 * n)
