"""BLAKE3 of bytes, in memory at once or in parts that arrive in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def digest_of(data: Any) -> str:
    """Return 64 hexadecimal digits for any object with a buffer of bytes. Source: the BLAKE3 specification."""
    from blake3 import blake3

    return blake3(data).hexdigest()


def digest_in_chunks(nbytes: int, chunk: int, digest: Callable[[int, int], str]) -> str:
    """Return the digest of `nbytes` bytes, where `digest(start, count)` is the digest of a range.

    If all bytes fit into one chunk of `chunk` bytes, it is their digest. Otherwise it is BLAKE3 over the digests of the
    consecutive chunks, one per line.

    Example:
        >>> data = b"abcde"
        >>> parts = [digest_of(b"abc"), digest_of(b"de")]
        >>> found = digest_in_chunks(5, 3, lambda start, count: digest_of(data[start : start + count]))
        >>> found == digest_of("\\n".join(parts).encode())
        True
    """
    if nbytes <= chunk:
        return digest(0, nbytes)
    digests = [digest(start, min(chunk, nbytes - start)) for start in range(0, nbytes, chunk)]
    return digest_of("\n".join(digests).encode("ascii"))


class ChunkedDigest:
    """`digest_in_chunks` of bytes that arrive in parts, in any order and from several threads.

    Each byte is digested once, as it arrives. A part is copied only if it continues a chunk and arrives before the part
    in front of it.
    """

    def __init__(self, nbytes: int, chunk: int) -> None:
        self._nbytes, self._chunk = nbytes, max(1, chunk)
        self._open: dict[int, _OpenChunk] = {}
        self._digests = {} if nbytes else {0: digest_of(b"")}
        self._lock = threading.Lock()

    def add(self, start: int, data: Any) -> None:
        """Add the bytes of a buffer, which begin at byte `start`; no byte may be added twice."""
        view = memoryview(data).cast("B")
        stop = start + len(view)
        for number in range(start // self._chunk, -(-stop // self._chunk)):
            first = number * self._chunk
            low, high = max(start, first), min(stop, first + self._chunk)
            self._add(number, low - first, view[low - start : high - start])

    def hexdigest(self) -> str:
        """Return the digest, once every byte was added. Raises KeyError before that."""
        return digest_in_chunks(self._nbytes, self._chunk, lambda start, _: self._digests[start // self._chunk])

    def _add(self, number: int, start: int, part: memoryview) -> None:
        with self._lock:
            chunk = self._open.setdefault(number, _OpenChunk())
        digested = chunk.add(start, part)
        if digested == min(self._chunk, self._nbytes - number * self._chunk):
            with self._lock:
                self._digests[number] = chunk.hexdigest()
                del self._open[number]


class _OpenChunk:
    """An incomplete chunk: the digest of its first bytes, and the parts that lie behind missing ones."""

    def __init__(self) -> None:
        from blake3 import blake3

        self._hasher = blake3()
        self._early: dict[int, bytes] = {}
        self._digested = 0
        self._lock = threading.Lock()

    def add(self, start: int, part: memoryview) -> int:
        """Add a part; returns how many bytes this call has digested."""
        with self._lock:
            if start != self._digested:
                self._early[start] = bytes(part)
                return 0
            self._take(part)
            while (early := self._early.pop(self._digested, None)) is not None:
                self._take(early)
            return self._digested

    def hexdigest(self) -> str:
        digest: str = self._hasher.hexdigest()
        return digest

    def _take(self, part: memoryview | bytes) -> None:
        self._hasher.update(part)
        self._digested += len(part)
