"""BLAKE3 of bytes that are in memory at once."""

from __future__ import annotations

from typing import Any


def digest_of(data: Any) -> str:
    """64 hexadecimal digits for anything with a buffer of bytes. Source: the BLAKE3 specification."""
    from blake3 import blake3

    return blake3(data).hexdigest()
