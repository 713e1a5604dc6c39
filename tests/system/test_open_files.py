"""How many files are open at a time, and what is said where that is too many."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import merge_arguments, read_tensors, snapshot, write_pickle, write_tensors

import hsa
from hsa.actions import merge as merge_module
from hsa.outputs.patch_reader import SUFFIX
from hsa.system import descriptors, fsio
from hsa.system.descriptors import MAX_OPEN
from hsa.system.fsio import SourceFile, Tally

Triple = dict[str, Path]

pytestmark = pytest.mark.unverified("open files are counted here, and a verification opens every shard")

FEW = 48
"""Files that a process may open in these tests: what Python and its libraries need, and not one for each shard."""


@contextmanager
def at_most(files: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The largest number of files that are open beyond those of before, looked at whenever one is opened."""
    before = len(os.listdir("/proc/self/fd"))
    most, opened = [0], os.open

    def counting(*arguments: Any, **keywords: Any) -> int:
        fd = opened(*arguments, **keywords)
        most[0] = max(most[0], len(os.listdir("/proc/self/fd")) - before)
        return fd

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", counting)
        yield most
    assert len(os.listdir("/proc/self/fd")) == before, "files were left open"


@pytest.fixture
def sharded(triple: Triple) -> Triple:
    """Sources in a shard for each tensor: 89 of each."""
    for path in triple.values():
        tensors = read_tensors(path)
        write_tensors(path, tensors, shards=len(tensors))
    return triple


def limited(files: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process that may open so many files."""
    code = (
        f"import resource as r; r.setrlimit(r.RLIMIT_NOFILE, ({files}, {files})); from hsa.__main__ import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=120
    )


# Bounded ---------------------------------------------------------------------------------------------------


def test_sources_and_outputs_of_many_shards_need_few_descriptors(sharded: Triple, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    hsa.merge(**sharded, output=whole, sync=False)
    shards = len(list(whole.glob("*.safetensors")))
    assert 3 * shards > 4 * FEW
    with at_most(FEW):
        hsa.merge(**sharded, output=tmp_path / "out")
        assert hsa.verify(tmp_path / "out", **sharded, threads=2).ok
        hsa.merge_patch(**sharded, output=tmp_path / f"p{SUFFIX}")
        hsa.apply(sharded["primary"], tmp_path / f"p{SUFFIX}", output=tmp_path / "applied")
        assert hsa.inspect(**sharded).tensors
    assert snapshot(tmp_path / "out") == snapshot(whole) == snapshot(tmp_path / "applied")


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "no-sync"])
@pytest.mark.parametrize("threads", [1, 4])
def test_an_output_in_tiny_shards_has_no_more_open_than_its_threads_write(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool, threads: int
) -> None:
    out = tmp_path / "out"
    with counted(monkeypatch) as most:
        hsa.merge(**shared_triple, output=out, max_shard_size=1, threads=threads, sync=sync)
    assert len(list(out.glob("*.safetensors"))) == 89
    assert most[0] <= 3 + 1 + 2 * threads + 2, "three sources, the lock, two for each thread's file, one being made"
    assert hsa.verify(out).ok


def test_pickles_in_many_shards_need_few_descriptors(triple: Triple, tmp_path: Path) -> None:
    hsa.merge(**triple, output=tmp_path / "whole", sync=False)
    for role in ("base", "secondary"):
        write_pickle(triple[role], read_tensors(triple[role]), shards=89)
    with at_most(FEW):
        hsa.merge(**triple, output=tmp_path / "out", sync=False)
    same = "model.safetensors"
    assert (tmp_path / "out" / same).read_bytes() == (tmp_path / "whole" / same).read_bytes()


def test_a_sweep_with_many_shards_keeps_within_the_limit(sharded: Triple, tmp_path: Path) -> None:
    grid: dict[str, Any] = {"k": (0.3, 0.6), "lam": tuple(n / 50 for n in range(51))}
    with at_most(160):
        assert len(hsa.sweep(**sharded, output=tmp_path / "sweep", sync=False, **grid).made) == 102


def test_no_more_sources_stay_open_than_are_said(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(MAX_OPEN + 50)]
    for number, path in enumerate(paths):
        path.write_bytes(number.to_bytes(2, "little") * 8)
    before = len(os.listdir("/proc/self/fd"))
    sources = [SourceFile(path, "test", Tally()) for path in paths]
    assert len(os.listdir("/proc/self/fd")) - before <= MAX_OPEN
    for _ in range(2):
        assert [int.from_bytes(source.read(2, 6), "little") for source in sources] == list(range(len(paths)))
    for source in sources:
        source.check_unchanged()
        source.close()
        source.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_share_the_descriptors(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(40)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 4096)
    wrong: list[object] = []

    def read(start: int) -> None:
        try:
            for turn in range(200):
                number = (start * 7 + turn * 11) % len(paths)
                wrong.extend(byte for byte in sources[number].read(64, turn) if byte != number)
        except BaseException as error:
            wrong.append(error)

    soft = len(os.listdir("/proc/self/fd")) + 12
    sources: list[SourceFile] = []
    with at_most(soft):
        sources += [SourceFile(path, "test", Tally()) for path in paths]
        threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    for source in sources:
        source.close()


# Opened again ----------------------------------------------------------------------------------------------


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def replaced(path: Path) -> None:
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def removed(path: Path) -> None:
    path.unlink()


def made_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [grown, replaced, removed, made_a_directory], ids=lambda change: change.__name__)
def test_a_file_that_is_opened_again_must_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(descriptors, "MAX_OPEN", 1)
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_bytes(b"0123456789")
    one, two = SourceFile(first, "test", Tally()), SourceFile(second, "test", Tally())
    assert two.read(2) == b"01"
    change(first)
    for work in (lambda: one.read(2), one.check_unchanged):
        with pytest.raises(hsa.SourceChanged, match=r"changed while it was read|vanished during the run"):
            work()
    one.close()
    two.close()


def test_a_shard_that_changes_between_two_looks_withdraws_the_output(
    sharded: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "MAX_OPEN", 4)
    shard = sorted(sharded["secondary"].glob("*.safetensors"))[40]
    execute = merge_module.execute

    def meanwhile(*arguments: Any, **keywords: Any) -> Any:
        digests = execute(*arguments, **keywords)
        grown(shard)
        return digests

    monkeypatch.setattr(merge_module, "execute", meanwhile)
    with pytest.raises(hsa.SourceChanged, match=shard.name):
        hsa.merge(**sharded, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Too many --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [5, 6, 8, 10, 12, 14, 16])
def test_too_many_open_files_are_named_with_ulimit(shared_triple: Triple, tmp_path: Path, files: int) -> None:
    """Wherever the limit is met: a library that is imported, a small file, a source, an output."""
    done = limited(files, *merge_arguments(shared_triple, tmp_path / "out"))
    if done.returncode == 0:
        assert hsa.verify(tmp_path / "out").ok
        return
    if "hsa: error:" not in done.stderr:  # Python itself did not get as far as hsa
        assert files < 8 and "Too many open files" in done.stderr, done.stderr
        return
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"Too many open files: this process may open {files}; raise the limit (ulimit -n)" in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_the_remedy_is_said_wherever_a_file_is_opened(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """At every call in turn: from then on no file can be opened."""
    remedy = "ulimit -n" if code == errno.EMFILE else "fs.file-max"
    real, place = os.open, tmp_path / "place"
    place.mkdir()
    for at in range(1, 60):
        calls = [0]

        def failing(path: Any, *rest: Any, at: int = at, calls: list[int] = calls, **keywords: Any) -> int:
            if not str(path).startswith(str(tmp_path)):
                return real(path, *rest, **keywords)
            calls[0] += 1
            if calls[0] >= at:
                raise OSError(code, os.strerror(code), path)
            return real(path, *rest, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", failing)
            try:
                hsa.merge(**triple, output=place / "out", threads=1)
            except hsa.HsaError as error:
                assert error.exit_code == 1 and remedy in str(error), (at, error)
        if calls[0] < at:
            break
        shutil.rmtree(place)
        place.mkdir()
    assert at > 10


def test_a_library_that_cannot_be_loaded_names_the_limit() -> None:
    @fsio.map_os_errors()
    def imports() -> None:
        raise ImportError(f"libx.so: cannot open shared object file: {os.strerror(errno.EMFILE)}")

    with pytest.raises(hsa.MachineError, match=r"a library cannot be loaded: Too many open files: .*ulimit -n"):
        imports()

    @fsio.map_os_errors()
    def lacks() -> None:
        raise ImportError("No module named 'x'")

    with pytest.raises(ImportError, match="No module named"):
        lacks()
