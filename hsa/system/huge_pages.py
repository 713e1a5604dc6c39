"""Allocate aligned memory, in huge pages where the kernel has them, for direct writes."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

from hsa.errors import MachineError
from hsa.option_names import option

HUGE_PAGE = 2 << 20
"""Bytes. A direct write passes its memory page by page, and a disk accepts a limited number of pages in one request.
With pages of 4 KiB that is often one MiB; with huge pages it is as many bytes as the disk accepts at all."""


def allocate(nbytes: int) -> memoryview:
    """Allocate `nbytes` of zeroed private memory on a page boundary, as huge pages if the kernel has any; MachineError.

    From `HUGE_PAGE` bytes on, it starts on a multiple of that, and the last huge page may extend beyond `nbytes`.
    """
    spare = HUGE_PAGE if nbytes >= HUGE_PAGE else 0
    try:
        memory = mmap.mmap(-1, nbytes + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MachineError(f"out of memory: {nbytes} bytes were needed; lower {option('threads')}") from error
    if not spare:
        return memoryview(memory)
    with suppress(AttributeError, OSError):  # a system, or a kernel, without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    return memoryview(memory)[start : start + nbytes]
