"""Random masks in numpy against Random123's known answers, and against the oracle."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from hsa.methods import philox
from hsa.reference import philox as oracle

LENGTHS = [0, 1, 3, 4, 5, 1024, 4 * philox.COUNTERS - 1, 4 * philox.COUNTERS, 4 * philox.COUNTERS + 6]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (0, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((1 << 62) - 1, (0xFFFFFFFF, 0xFFFFFFFF), None),
        (0x85A308D3243F6A88 >> 2, (0xA4093822, 0x299F31D0), None),
    ],
)
def test_known_answers(counter: int, key: tuple[int, int], expected: str | None) -> None:
    found = philox.words(4 * counter, 4, philox.Key(*key)).tolist()
    wide = torch.tensor([[counter & 0xFFFFFFFF, counter >> 32, 0, 0]])
    assert found == oracle.philox4x32(wide, key)[0].tolist()
    assert expected is None or found == [int(word, 16) for word in expected.split()]


@pytest.mark.parametrize("first", [0, 1, 2, 1024, (1 << 34) - 4096, (1 << 34) - 2])
@pytest.mark.parametrize("count", LENGTHS)
def test_words_and_masks_are_the_oracles(first: int, count: int) -> None:
    key = philox.key_of(12345, 3, "decoder.embed_tokens.weight")
    assert key == oracle.key_of(12345, 3, "decoder.embed_tokens.weight")
    expected = oracle.words(first, count, tuple(key)).numpy()
    words = philox.words(first, count, key)
    assert (words.dtype, words.shape) == (np.uint32, (count,))
    assert (words == expected).all()
    for limit in (0, 1, 1 << 31, 0xFFFFFFFF, 1 << 32):
        mask = philox.kept(first, count, key, limit)
        assert (mask.dtype, mask.shape) == (np.bool_, (count,))
        assert (mask == (expected < limit)).all()


def test_slices_make_the_mask_of_the_whole() -> None:
    key, n = philox.Key(5, 6), 5000
    whole = philox.kept(0, n, key, 1 << 30)
    cuts = [0, 7, 1024, 1025, 4097, n]
    parts = [philox.kept(a, b - a, key, 1 << 30) for a, b in pairwise(cuts)]
    assert (np.concatenate(parts) == whole).all()


@pytest.mark.parametrize("probability", [0.0, 2.0**-33, 2.0**-32, 0.1, 0.3, 1 - 2.0**-40, 1.0])
def test_limits_are_the_oracles(probability: float) -> None:
    words = philox.words(0, 4096, philox.key_of(1, 0, "x"))
    expected = oracle.kept(probability, torch.Size([4096]), seed=1, number=0, name="x")
    assert ((words < philox.limit_of(probability)) == expected.numpy()).all()
