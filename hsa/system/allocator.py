"""Let the C library keep memory that decoding frees, instead of giving it back to the system and asking for it again.

Decoding allocates and frees blocks of some MB many times a second. By default glibc gets such blocks from the kernel
and returns them at once, and the kernel clears every page again. With Whisper tiny on two cores an encoder call for 16
utterances took about a third less time without this. Calls for one utterance, as hsa makes them, allocate smaller
blocks: their gain was not larger than the drift of the machine's speed.
"""

from __future__ import annotations

import ctypes

KEPT_BYTES = 1 << 30
"""The most free memory that stays with the process, in bytes."""

LARGEST_BYTES = 256 << 20
"""Blocks of at least this size still come from the kernel, and return to it."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt. Source: malloc.h of glibc."""


def keep_freed_memory() -> bool:
    """Keep up to `KEPT_BYTES` of freed memory in this process. False where the C library has no mallopt.

    Only for processes that hsa owns: commands and workers, not the process of a caller.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
