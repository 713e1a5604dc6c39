"""Disks that fail: input/output errors, short reads and writes, filesystems that can do nothing special."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import snapshot

import hsa
from hsa.errors import MachineError
from hsa.system import fsio

Triple = dict[str, Path]

pytestmark = pytest.mark.unverified("calls are counted and made to fail here, and a verification would make more")


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, at: int) -> Iterator[list[int]]:
    """Let the `at`-th call fail with an input/output error (none for 0); yields the number of calls so far."""
    function: Callable[..., Any] = getattr(holder, name)
    calls = [0]

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return function(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, wrapped)
        yield calls


CALLS = [
    (os, "preadv"),
    (os, "pwritev"),
    (os, "fsync"),
    (os, "open"),
    (os, "mkdir"),
    (os, "rename"),
    (fsio, "_reserve"),
    (fsio, "clone"),
    (fsio, "exchange"),
]


@pytest.mark.parametrize("how", ["new", "overwrite", "overwrite without swap"])
@pytest.mark.parametrize(("holder", "name"), CALLS, ids=[name for _, name in CALLS])
def test_an_input_output_error_at_every_call(
    shared_triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, how: str
) -> None:
    if how != "new":
        hsa.merge(**shared_triple, output=place / "out", k=0.3)
    if how == "overwrite without swap":
        monkeypatch.setattr(fsio, "exchange", lambda first, second: False)
    before, descriptors = snapshot(place), open_files()
    failed, at = 0, 0
    while True:
        at += 1
        with failing(monkeypatch, holder, name, at) as calls:
            try:
                hsa.merge(**shared_triple, output=place / "out", overwrite=True, threads=1)
            except MachineError as error:
                assert error.exit_code == 1
                assert "Input/output error" in str(error), (name, at)
                assert calls[0] >= at
                assert snapshot(place) == before, (name, at)
                assert open_files() == descriptors, (name, at)
                failed += 1
                continue
        if calls[0] < at:
            break
        # A call that a run can do without: the output is whole, and beside it is nothing.
        assert name == "open" or (name == "fsync" and how != "new"), (name, at)
        assert os.listdir(place) == ["out"]
        shutil.rmtree(place / "out")
        if how != "new":
            hsa.merge(**shared_triple, output=place / "out", k=0.3)
    expected = {"preadv": 20, "pwritev": 5, "fsync": 10, "open": 10, "rename": 1 if how != "overwrite" else 0}
    assert failed >= expected.get(name, 0), failed
    assert sorted(os.listdir(place)) == ["out"]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("name", ["preadv", "pwritev", "fsync"])
def test_an_input_output_error_among_many_threads(
    shared_triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with failing(monkeypatch, os, name, 0) as calls:
        hsa.merge(**shared_triple, output=place.parent / "fresh", threads=6)
    for at in range(1, calls[0], max(1, calls[0] // 12)):
        with failing(monkeypatch, os, name, at), pytest.raises(MachineError, match="Input/output error"):
            hsa.merge(**shared_triple, output=place / "out", threads=6)
        assert snapshot(place) == {}


def test_short_reads_and_writes_are_completed(
    shared_triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:5000]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: pwritev(fd, [views[0][:4096]], offset))
    hsa.merge(**shared_triple, output=place / "short")
    monkeypatch.undo()
    hsa.merge(**shared_triple, output=place / "fresh")
    assert snapshot(place / "short") == snapshot(place / "fresh")


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_filesystem_that_can_do_nothing_special(
    shared_triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    """No fallocate, no O_DIRECT (or one that wants another alignment), no swap, no clone."""

    class Plain:
        def __getattr__(self, name: str) -> Callable[..., int]:
            def refused(*arguments: Any) -> int:
                import ctypes

                ctypes.set_errno(refusal)
                return -1

            return refused

    pwritev = os.pwritev

    def aligned(fd: int, views: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwritev(fd, views, offset)

    hsa.merge(**shared_triple, output=place / "fresh")
    hsa.merge(**shared_triple, output=place / "plain", k=0.3)
    monkeypatch.setattr(fsio, "_libc", Plain)
    monkeypatch.setattr(os, "pwritev", aligned)
    if refusal == errno.EOPNOTSUPP:
        monkeypatch.setattr(fsio, "reopen_direct", lambda path: None)
    hsa.merge(**shared_triple, output=place / "plain", overwrite=True)
    assert snapshot(place / "plain") == snapshot(place / "fresh")
    assert sorted(os.listdir(place)) == ["fresh", "plain"]


def test_threads_that_cannot_be_started(shared_triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    begin, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(MachineError, match=r"cannot start 5 threads.*lower threads"):
        hsa.merge(**shared_triple, output=place / "out", threads=5)
    assert snapshot(place) == {}
    assert not any(thread.is_alive() for thread in started)
