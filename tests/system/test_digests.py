"""Digests of bytes that come in parts: those of the bytes, whatever the parts, their order and the threads."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import blake3
import pytest

from hsa.system import digests
from hsa.system.digests import ChunkedDigest, digest_in_chunks


def of(data: bytes) -> str:
    return str(blake3.blake3(data).hexdigest())


def defined(data: bytes, chunk: int) -> str:
    """The definition, spelt out."""
    if len(data) <= chunk:
        return of(data)
    return of("\n".join(of(data[start : start + chunk]) for start in range(0, len(data), chunk)).encode())


def parts_of(data: bytes, draw: random.Random) -> list[tuple[int, bytes]]:
    """The bytes, cut somewhere and shuffled."""
    cuts = sorted({0, len(data), *(draw.randint(0, len(data)) for _ in range(draw.randint(0, 12)))})
    parts = [(start, data[start:stop]) for start, stop in pairwise(cuts)]
    draw.shuffle(parts)
    return parts


@pytest.mark.parametrize("seed", range(20))
def test_parts_in_any_order_from_many_threads(seed: int) -> None:
    draw = random.Random(seed)
    data, chunk = draw.randbytes(draw.choice((1, 7, 64, 4096, 100_003))), draw.choice((1 << 20, 4096, 999, 64))
    expected = defined(data, chunk)
    assert digest_in_chunks(len(data), chunk, lambda start, count: of(data[start : start + count])) == expected
    digest = ChunkedDigest(len(data), chunk)
    with ThreadPoolExecutor(draw.randint(1, 5)) as threads:
        list(threads.map(lambda part: digest.add(*part), parts_of(data, draw)))
    assert digest.hexdigest() == expected


def test_no_bytes() -> None:
    assert ChunkedDigest(0, 0).hexdigest() == ChunkedDigest(0, 5).hexdigest() == of(b"")


def test_bytes_that_are_missing() -> None:
    digest = ChunkedDigest(10, 4)
    digest.add(1, b"123456789")
    with pytest.raises(KeyError):
        digest.hexdigest()
    digest.add(0, b"0")
    assert digest.hexdigest() == defined(b"0123456789", 4)


@pytest.mark.parametrize("in_order", [True, False])
def test_each_byte_is_digested_once_and_copied_only_out_of_order(
    monkeypatch: pytest.MonkeyPatch, in_order: bool
) -> None:
    copied, digested, really = [0], [0], digests._OpenChunk._take

    def counting(chunk: digests._OpenChunk, part: memoryview | bytes) -> None:
        digested[0] += len(part)
        copied[0] += len(part) if isinstance(part, bytes) else 0
        really(chunk, part)

    monkeypatch.setattr(digests._OpenChunk, "_take", counting)
    data, step, chunk = random.Random(3).randbytes(100_000), 3_000, 4_096
    digest, starts = ChunkedDigest(len(data), chunk), list(range(0, len(data), step))
    for start in starts if in_order else reversed(starts):
        digest.add(start, data[start : start + step])
    assert digest.hexdigest() == defined(data, chunk)
    assert digested == [len(data)]
    assert (copied == [0]) == in_order
