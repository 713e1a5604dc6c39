"""Byte ranges against sets of bytes, and the file that holds some of them."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsa.errors import MachineError, SourceChanged, SourceError
from hsa.sources.hub.partial_file import PartialFile, load_record, save_record
from hsa.system.fsio import SourceFile, Tally
from hsa.system.ranges import Range, coalesce, covers, subtract, total, union

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8)


def members(ranges: object) -> set[int]:
    return {byte for start, stop in ranges for byte in range(start, stop)}  # type: ignore[attr-defined]


def tidy(ranges: tuple[Range, ...]) -> bool:
    return all(start < stop for start, stop in ranges) and all(
        before[1] < after[0] for before, after in pairwise(ranges)
    )


@given(RANGES, RANGES)
def test_union_and_difference_are_those_of_sets(some: list[Range], others: list[Range]) -> None:
    assert members(union(some)) == members(some)
    assert tidy(union(some))
    left = subtract(some, union(others))
    assert members(left) == members(some) - members(others)
    assert total(left) == len(members(left))
    assert tidy(left)


@given(RANGES, st.integers(0, 41), st.integers(0, 41))
def test_covers_says_whether_every_byte_is_there(held: list[Range], start: int, stop: int) -> None:
    assert covers(union(held), start, stop) == (set(range(start, stop)) <= members(held))


@given(RANGES, st.integers(0, 12), st.integers(0, 20))
def test_what_is_bridged_is_within_bounds(ranges: list[Range], gap: int, budget: int) -> None:
    found = coalesce(ranges, gap, budget)
    extra = members(found) - members(ranges)
    assert members(ranges) <= members(found)
    assert tidy(found)
    assert len(extra) <= budget
    bridged = union(subtract(found, union(ranges)))
    assert all(stop - start <= gap for start, stop in bridged)
    left = [after[0] - before[1] for before, after in pairwise(found)]
    assert not any(size <= gap and size <= budget - len(extra) for size in left)


def test_the_smallest_gaps_are_bridged_first() -> None:
    apart = [(0, 10), (15, 20), (22, 30), (31, 40)]
    assert coalesce(apart, 10, 3) == ((0, 10), (15, 40))
    assert coalesce(apart, 10, 8) == ((0, 40),)
    assert coalesce(apart, 1, 8) == ((0, 10), (15, 20), (22, 40))


def test_a_part_counts_once_it_is_committed(tmp_path: Path) -> None:
    partial = PartialFile(tmp_path / "files", "x", 100, "tag")
    with partial.locked():
        partial.write(10, b"abc")
        partial.write(13, b"def")
        assert partial.missing([(0, 20)]) == ((0, 20),)
        assert PartialFile(tmp_path / "files", "x", 100, "tag").ranges == ()
        partial.commit()
        partial.write(50, b"lost")
    assert partial.ranges == ((10, 16),)
    again = PartialFile(tmp_path / "files", "x", 100, "tag")
    assert again.ranges == ((10, 16),)
    with again.locked():
        again.write(16, b"g")
        again.commit()
    assert again.missing([(8, 20)]) == ((8, 10), (17, 20))
    assert (again.path.stat().st_size, again.path.read_bytes()[10:17]) == (100, b"abcdefg")


def test_another_file_is_another(tmp_path: Path) -> None:
    partial = PartialFile(tmp_path, "x", 100, "tag")
    with partial.locked():
        partial.write(0, b"abc")
        partial.commit()
    assert PartialFile(tmp_path, "x", 100, "other").ranges == ()
    assert PartialFile(tmp_path, "x", 101, "tag").ranges == ()
    other = PartialFile(tmp_path, "x", 100, "other")
    with other.locked():
        other.write(1, b"z")
        other.commit()
    assert other.path.read_bytes()[:3] == b"\0z\0"


def test_holes_cannot_be_read(tmp_path: Path) -> None:
    """Where nothing was fetched there are zeros, which no one must take for weights."""
    partial = PartialFile(tmp_path, "x", 100, "tag")
    with partial.locked():
        partial.write(10, b"abcdef")
        partial.commit()
    source = SourceFile(partial.path, "base", Tally(), partial.ranges)
    try:
        assert source.read(6, 10) == b"abcdef"
        assert source.read(0, 50) == b""
        for count, offset in ((1, 9), (7, 10), (1, 16), (100, 0)):
            with pytest.raises(SourceError, match=f"^base: {count} bytes at {offset} of .* were not fetched"):
                source.read(count, offset)
        with partial.locked():  # another run adds what this one does not read
            partial.write(20, b"more")
            partial.commit()
        source.check_unchanged()
        with pytest.raises(SourceError, match="were not fetched"):
            source.read(4, 20)
        os.truncate(partial.path, 99)
        with pytest.raises(SourceChanged):
            source.check_unchanged()
    finally:
        source.close()


@pytest.mark.parametrize("damaged", [b"", b"{}", b"[]", b"\xff", b'{"a": 2, "sha256": "0"}', b"[" * 100_000])
def test_a_damaged_record_is_none(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "new" / "record.json"
    assert load_record(path) is None
    save_record(path, {"a": 1, "b": [[1, 2]]})
    assert load_record(path) == {"a": 1, "b": [[1, 2]]}
    assert os.listdir(path.parent) == ["record.json"]
    path.write_bytes(damaged)
    assert load_record(path) is None


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    partial = PartialFile(tmp_path / "file" / "below", "x", 100, "tag")
    with pytest.raises(MachineError, match="cannot write"), partial.locked():
        pass
