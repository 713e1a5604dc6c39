"""The order in which an output reaches the disk: write, fsync, fsync of the directory, rename, fsync of the parent.

Once as the kernel sees it, with strace; and once in this process, around the functions of `os`, which shows the
same where strace is not to be had and on a filesystem that cannot swap two directories.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import merge_arguments

import hsa
from hsa.system import fsio

Triple = dict[str, Path]

WRITES = ("pwritev", "pwritev2", "pwrite64", "write", "writev")
SYNCS = ("fsync", "fdatasync")
RENAMES = ("rename", "renameat", "renameat2")
REMOVALS = ("unlink", "unlinkat", "rmdir")
CALLS = (*WRITES, *SYNCS, *RENAMES, *REMOVALS, "sync_file_range")
SHAPES = [
    pytest.param([], id="one file"),
    pytest.param(["--max-shard-size=100KB"], id="shards"),
    pytest.param(["--no-hash", "--threads=4"], id="no digests, four threads"),
    pytest.param(["--dtype=float16"], id="another type"),
]


@dataclass(frozen=True)
class Event:
    """A system call: what it did to which path (for a rename: from there to `other`), and when."""

    call: str
    path: str
    other: str
    begin: float
    end: float


def check_order(events: Sequence[Event], out: Path, *, earlier: bool) -> None:
    """The promise, on the events of one run. `earlier` says that an earlier output was replaced."""
    staging = str(out.with_name(f".{out.name}.hsa-staging"))
    renames = [e for e in events if e.call in RENAMES]
    swapped = any(e.path == staging and e.other == str(out) for e in renames)
    assert swapped, renames
    first = min(renames, key=lambda e: e.begin)
    publish = next(e for e in renames if (e.path, e.other) == (staging, str(out)))

    # Replaced in place, the old output has the staging directory's name after the swap: look before the rename.
    before = [e for e in events if e.begin < first.begin]
    folder_sync = [e for e in before if e.call in SYNCS and e.path == staging]
    assert len(folder_sync) == 1, "the staging directory is fsynced once, before the rename"
    names = sorted(os.listdir(out))
    assert len(names) >= 4
    for name in names:
        path = f"{staging}/{name}"
        writes = [e for e in events if e.call in WRITES and e.path in (path, f"{out}/{name}")]
        syncs = [e for e in before if e.call in SYNCS and e.path == path]
        assert writes, f"{name} is never written"
        assert syncs, f"{name} is never fsynced"
        last = max(e.end for e in writes)
        assert last <= max(e.begin for e in syncs), f"{name} is written after its last fsync began"
        assert max(e.end for e in syncs) <= folder_sync[0].begin, f"{name} is fsynced after its directory"
    assert folder_sync[0].end <= first.begin

    parent_sync = [e for e in events if e.call in SYNCS and e.path == str(out.parent) and e.begin >= publish.end]
    assert parent_sync, "the parent is not fsynced after the rename"
    own = [e for e in before if e.call in REMOVALS and e.path.startswith(f"{staging}/")]  # after an attempt to clone
    removals = [e for e in events if e.call in REMOVALS and e not in own]
    assert bool(removals) == earlier, removals
    for removal in removals:
        assert removal.begin >= parent_sync[0].end, f"{removal} comes before the rename is lasting"


# With strace -----------------------------------------------------------------------------------------------


def strace(tmp_path: Path, *arguments: str) -> list[Event]:
    """Run the command line under strace: the system calls of all its threads, in order of their start."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    trace.mkdir()
    options = ["-ff", "-qq", "-y", "-ttt", "-T", "-s", "0", "-o", str(trace / "t")]
    probe = subprocess.run(["strace", *options[:-2], "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"strace may not trace here: {probe.stderr.strip()}")
    command = ["strace", *options, "-e", f"trace={','.join(CALLS)}", sys.executable, "-m", "hsa", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for file in trace.iterdir() for line in file.read_text(errors="surrogateescape").splitlines()]
    return sorted((e for line in lines for e in parse(line)), key=lambda e: e.begin)


def parse(line: str) -> Iterator[Event]:
    found = re.fullmatch(
        r"(?P<at>\d+\.\d+) (?P<call>\w+)\((?P<what>.*)\) += (?P<result>\d+)\S* <(?P<took>[\d.]+)>", line
    )
    if found is None:
        return  # a signal, an exit, or a call that failed
    quoted = re.findall(r'"([^"]*)"', found["what"])
    opened = re.findall(r"\b(?:\d+|AT_FDCWD)<([^>]*)>", found["what"])
    if found["call"] in REMOVALS and opened:
        paths = [f"{opened[0]}/{quoted[0]}"]
    else:
        paths = quoted if found["call"] in RENAMES + REMOVALS else opened
    if paths:
        begin = float(found["at"])
        other = paths[1] if len(paths) > 1 else ""
        yield Event(found["call"], paths[0], other, begin, begin + float(found["took"]))


@pytest.mark.parametrize("more", SHAPES)
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "overwrite"])
def test_the_kernel_sees_the_right_order(triple: Triple, tmp_path: Path, more: list[str], earlier: bool) -> None:
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    if earlier:
        hsa.merge(**triple, output=out, k=0.3)
    events = strace(tmp_path, *merge_arguments(triple, out, "--overwrite", *more))
    check_order(events, out, earlier=earlier)


def test_the_kernel_sees_no_fsync_with_no_sync(triple: Triple, tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"
    events = strace(tmp_path, *merge_arguments(triple, out, "--no-sync"))
    assert [e for e in events if e.call in (*SYNCS, "sync_file_range")] == []
    assert [e for e in events if e.call in RENAMES and e.other == str(out)]
    assert (out / "model.safetensors").stat().st_size > 0


# In this process -------------------------------------------------------------------------------------------


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, *, swap: bool) -> Iterator[list[Event]]:
    """Every call of the functions through which `hsa` writes, with the paths of that moment."""
    events: list[Event] = []
    lock, clock = threading.Lock(), [0]

    def tick() -> int:
        with lock:
            clock[0] += 1
            return clock[0]

    def place(argument: Any, dir_fd: int | None = None) -> str:
        if isinstance(argument, int):
            return os.readlink(f"/proc/self/fd/{argument}")
        folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}") + "/"
        return folder + os.fspath(argument)

    def watch(holder: Any, name: str, call: str) -> None:
        function: Callable[..., Any] = getattr(holder, name)

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            path = place(arguments[0], keywords.get("dir_fd"))
            other = place(arguments[1]) if call in RENAMES else ""
            begin = tick()
            result = function(*arguments, **keywords)
            if result is not False:
                with lock:
                    events.append(Event(call, path, other, begin, clock[0]))
            tick()
            return result

        patch.setattr(holder, name, wrapped)

    with monkeypatch.context() as patch:
        if not swap:
            patch.setattr(fsio, "exchange", lambda first, second: False)
        for name in ("pwritev", "fsync", "fdatasync", "rename", "unlink", "rmdir"):
            watch(os, name, name)
        watch(fsio, "exchange", "renameat2")
        yield events


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to tell the path of a descriptor")
@pytest.mark.parametrize("swap", [True, False], ids=["swap", "no-swap"])
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("size", [None, "100KB"], ids=["one file", "shards"])
def test_the_calls_come_in_the_right_order(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool, earlier: bool, size: str | None
) -> None:
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    if earlier:
        hsa.merge(**triple, output=out, k=0.3)
    with recorded(monkeypatch, swap=swap) as events:
        hsa.merge(**triple, output=out, overwrite=True, max_shard_size=size)
    check_order(events, out, earlier=earlier)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to tell the path of a descriptor")
def test_every_directory_that_gained_an_entry_is_synced(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded(monkeypatch, swap=True) as events:
        hsa.merge(**triple, output=tmp_path / "a" / "b" / "out")
    publish = next(e for e in events if e.call in RENAMES)
    synced = {e.path for e in events if e.call in SYNCS and e.begin > publish.end}
    assert synced == {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to tell the path of a descriptor")
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "overwrite"])
def test_no_sync_syncs_nothing(triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool) -> None:
    if earlier:
        hsa.merge(**triple, output=tmp_path / "out", k=0.3)
    with recorded(monkeypatch, swap=True) as events:
        hsa.merge(**triple, output=tmp_path / "out", overwrite=True, sync=False)
    calls = {e.call for e in events}
    assert "pwritev" in calls and calls & set(RENAMES)
    assert not calls & set(SYNCS)


# The check itself ------------------------------------------------------------------------------------------


def good(out: Path) -> list[Event]:
    """The events of a run that keeps every promise, one a second."""
    staging = f"{out.parent}/.{out.name}.hsa-staging"
    calls: Iterable[tuple[str, str, str]] = (
        *(("pwritev", f"{staging}/{name}", "") for name in "abcd"),
        *(("fsync", f"{staging}/{name}", "") for name in "abcd"),
        ("fsync", staging, ""),
        ("renameat2", staging, str(out)),
        ("fsync", str(out.parent), ""),
        ("unlinkat", f"{staging}/a", ""),
    )
    return [Event(*call, begin=at, end=at + 0.5) for at, call in enumerate(calls)]


def test_the_check_accepts_the_right_order_and_no_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in "abcd":
        (out / name).touch()
    events = good(out)
    check_order(events, out, earlier=True)
    for left in range(len(events) - 1):
        if left == 3:
            continue  # writes among themselves, and fsyncs, may come in any order: swap across the groups alone
        for right in range(left + 1, len(events)):
            if (left < 4 and right < 4) or (4 <= left < 8 and right < 8):
                continue
            mixed = list(events)
            a, b = events[left], events[right]
            mixed[left] = Event(b.call, b.path, b.other, a.begin, a.end)
            mixed[right] = Event(a.call, a.path, a.other, b.begin, b.end)
            if {left, right} <= set(range(8)) and a.path != b.path:
                continue  # one file's write beside another file's fsync
            with pytest.raises((AssertionError, StopIteration)):
                check_order(mixed, out, earlier=True)
    for missing in range(len(events)):
        with pytest.raises((AssertionError, StopIteration)):
            check_order(events[:missing] + events[missing + 1 :], out, earlier=True)
