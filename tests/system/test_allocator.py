"""Memory that decoding frees stays with the process, up to a limit."""

from __future__ import annotations

import sys

import pytest
from forked import run_python

FAULTS = """
import ctypes, resource, sys
from hsa.system.allocator import keep_freed_memory
assert not int(sys.argv[1]) or keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def use(count):
    for _ in range(count):
        blocks = [libc.malloc(ctypes.c_size_t(40 << 20)) for _ in range(2)]
        for block in blocks:
            ctypes.memset(ctypes.c_void_p(block), 1, 40 << 20)
        for block in blocks:
            libc.free(block)
use(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use(10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted on Linux with glibc")
def test_blocks_that_are_used_again_cause_no_page_faults() -> None:
    plain, kept = (int(run_python(FAULTS, number, env={}).stdout) for number in ("0", "1"))
    assert kept < plain / 20, (kept, plain)
