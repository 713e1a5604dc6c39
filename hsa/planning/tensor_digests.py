"""The digest of one tensor of a source, as records hold it.

It depends only on the tensor, not on how a program reads it: neither on slices nor on other sources.

- A tensor that is merged head by head: BLAKE3 of its bytes.
- Any other: the same if it has at most DIGEST_ELEMENTS elements, else BLAKE3 over the digests of its consecutive chunks
  of that many elements: 64 hexadecimal digits each, one a line.
"""

from __future__ import annotations

from collections.abc import Callable

from hsa.methods.tensors import TensorTask
from hsa.sources.roles import Role
from hsa.system.digests import ChunkedDigest, digest_in_chunks, digest_of
from hsa.system.dtypes import Array, size

DIGEST_ELEMENTS = 1 << 18
"""The number of elements of a chunk. It is part of the file format: with another, no output could be verified against
its sources."""


def tensor_digest(task: TensorTask, role: Role, data: Array) -> str:
    """The digest of a source's tensor whose bytes are in memory: uint8."""
    return digest_by_ranges(task, role, lambda start, count: digest_of(data[start : start + count].data))


def digest_by_ranges(task: TensorTask, role: Role, digest: Callable[[int, int], str]) -> str:
    """The digest of a source's tensor. `digest(start, count)` returns BLAKE3 of a range of its bytes."""
    return digest_in_chunks(task.sources[role].nbytes, _chunk_bytes(task, role), digest)


def digest_of_parts(task: TensorTask, role: Role) -> ChunkedDigest:
    """The digest of a source's tensor whose bytes are still to be added."""
    return ChunkedDigest(task.sources[role].nbytes, _chunk_bytes(task, role))


def _chunk_bytes(task: TensorTask, role: Role) -> int:
    ref = task.sources[role]
    nbytes: int = ref.nbytes
    return nbytes if task.layout == "heads" else DIGEST_ELEMENTS * size(ref.code)
