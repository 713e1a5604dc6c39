"""Memory for direct writes: where it starts, what it holds, and what is said where there is none."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from hsa.errors import MachineError
from hsa.system.fsio import ALIGNMENT
from hsa.system.huge_pages import HUGE_PAGE, allocate


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@pytest.mark.parametrize("nbytes", [ALIGNMENT, 1 << 20, HUGE_PAGE, HUGE_PAGE + 4 * ALIGNMENT, 4 << 20])
def test_memory_is_zeroed_writable_and_on_a_page_boundary(nbytes: int) -> None:
    views = [allocate(nbytes) for _ in range(3)]
    for number, view in enumerate(views):
        assert len(view) == nbytes
        assert bytes(view) == bytes(nbytes)
        assert address(view) % (HUGE_PAGE if nbytes >= HUGE_PAGE else ALIGNMENT) == 0
        view[:] = bytes([number + 1]) * nbytes
    for number, view in enumerate(views):  # none lies on another
        assert bytes(view) == bytes([number + 1]) * nbytes


def test_large_memory_is_huge_pages_where_the_kernel_grants_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip(f"{setting} says that this kernel gives no huge pages")
    view = allocate(4 << 20)
    view[:] = b"\1" * len(view)
    entry = _mapping(address(view))
    assert re.search(r"^VmFlags:.* hg( |$)", entry, re.MULTILINE), entry  # as MADV_HUGEPAGE leaves it


def _mapping(at: int) -> str:
    """What /proc/self/smaps says of the mapping that holds an address."""
    entries = re.split(r"(?=^[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    for entry in entries:
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", entry)
        if bounds and int(bounds[1], 16) <= at < int(bounds[2], 16):
            return entry
    raise AssertionError(f"no mapping holds {at:#x}")


def test_more_than_there_is_is_an_error_of_the_machine_that_says_what_helps() -> None:
    with pytest.raises(MachineError, match=rf"out of memory: {1 << 60} bytes were needed; lower threads"):
        allocate(1 << 60)
