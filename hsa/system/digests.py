"""BLAKE3 of bytes that are in memory at once, or were in slices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def digest_of(data: Any) -> str:
    """64 hexadecimal digits for anything with a buffer of bytes. Source: the BLAKE3 specification."""
    from blake3 import blake3

    return blake3(data).hexdigest()


def digest_of_slices(digests: Iterable[str]) -> str:
    """The digest of a tensor that was read in slices: of its slices' digests, one a line."""
    return digest_of("\n".join(digests).encode("ascii"))
