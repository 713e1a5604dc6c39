"""An output appears in its place whole or not at all: crashes, interrupts, modes and leftovers."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import provenance_bytes, snapshot
from staging import stage

import hsa
from hsa.errors import DestinationError, MachineError
from hsa.system import fsio
from hsa.system.manifest import PROVENANCE
from hsa.system.publish import StagedOutput, staging_path
from hsa.system.staging import NAME_MAX

Triple = dict[str, Path]


def staged(content: bytes, at: Path) -> dict[str, str]:
    """What `stage` publishes."""
    at.mkdir()
    (at / "model.safetensors").write_bytes(content)
    (at / PROVENANCE).write_bytes(provenance_bytes("model.safetensors"))
    return snapshot(at)


# Into place ------------------------------------------------------------------------------------------------


def test_a_crash_between_the_two_renames_is_made_good(triple: Triple, place: Path) -> None:
    out, aside = place / "out", place / ".out.hsa-replaced"
    hsa.merge(**triple, output=out, k=0.3)
    old = snapshot(out)
    out.rename(aside)
    (place / ".out.hsa-staging").mkdir()
    (place / ".out.hsa-staging" / "model.safetensors").write_bytes(b"whole or not")
    with pytest.raises(DestinationError, match="not empty"):
        hsa.merge(**triple, output=out)
    assert snapshot(out) == old
    assert os.listdir(place) == ["out"]

    out.rename(aside)
    hsa.merge(**triple, output=out, overwrite=True)
    assert os.listdir(place) == ["out"]
    hsa.merge(**triple, output=place / "fresh")
    assert snapshot(out) == snapshot(place / "fresh")


def test_a_crash_after_the_second_rename_is_made_good(place: Path) -> None:
    stage(place / "out", b"old")
    (place / "out").rename(place / ".out.hsa-replaced")
    stage_by_hand = staged(b"new", place / "out")
    with pytest.raises(DestinationError):
        StagedOutput(place / "out", overwrite=False, sync=False)
    assert os.listdir(place) == ["out"]
    assert snapshot(place / "out") == stage_by_hand


def test_an_old_output_that_stepped_aside_outlives_an_empty_directory_in_its_place(place: Path) -> None:
    stage(place / "out", b"old")
    old = snapshot(place / "out")
    (place / "out").rename(place / ".out.hsa-replaced")
    (place / "out").mkdir()
    with StagedOutput(place / "out", overwrite=True, sync=False):
        pass
    assert snapshot(place / "out") == old
    assert os.listdir(place) == ["out"]


def test_an_old_output_that_a_live_run_still_removes_is_left_to_it(place: Path) -> None:
    aside = place / ".out.hsa-replaced"
    staged(b"old", aside)
    before = snapshot(aside)
    staged(b"new", place / "out")
    held = os.open(aside, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        stage(place / "out", b"newer", overwrite=True)
        assert snapshot(aside) == before
    finally:
        os.close(held)


def interrupted_after(function: Callable[..., object]) -> Callable[..., object]:
    def wrapped(*arguments: object) -> object:
        function(*arguments)
        raise KeyboardInterrupt

    return wrapped


@pytest.mark.parametrize("name", ["rename", "exchange"])
def test_an_interrupt_right_after_the_rename_does_no_damage(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    new = staged(b"new", tmp_path / "expected")
    if name == "exchange":
        stage(place / "out", b"old")
    monkeypatch.setattr(fsio, name, interrupted_after(getattr(fsio, name)))
    with pytest.raises(KeyboardInterrupt):
        stage(place / "out", b"new", overwrite=True)
    assert snapshot(place / "out") == new
    assert os.listdir(place) == ["out"]


@pytest.mark.parametrize("renames", [1, 2])
def test_an_interrupt_between_the_two_renames_puts_the_old_output_back(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    stage(place / "out", b"old")
    expected = snapshot(place / "out") if renames == 1 else staged(b"new", tmp_path / "expected")
    rename, calls = fsio.rename, []

    def interrupted(source: Path, destination: Path) -> None:
        rename(source, destination)
        calls.append(source)
        if len(calls) == renames:
            raise KeyboardInterrupt

    monkeypatch.setattr(fsio, "exchange", lambda first, second: False)
    monkeypatch.setattr(fsio, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage(place / "out", b"new", overwrite=True)
    assert snapshot(place / "out") == expected
    assert os.listdir(place) == ["out"]


def test_an_interrupt_while_the_old_output_is_removed_leaves_nothing_of_it(
    tmp_path: Path, place: Path, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = staged(b"new", tmp_path / "expected")
    stage(place / "out", b"old")
    unlink = os.unlink

    def interrupted(path: str, *, dir_fd: int | None = None) -> None:
        monkeypatch.setattr(os, "unlink", unlink)
        unlink(path, dir_fd=dir_fd)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage(place / "out", b"new", overwrite=True)
    assert os.unlink is unlink
    assert snapshot(place / "out") == new
    assert os.listdir(place) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_parent_that_cannot_be_synced_withdraws_the_output(
    place: Path, swap: bool, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        stage(place / "out", b"old")
    before = snapshot(place)
    sync_directory = fsio.sync_directory

    def broken(path: Path) -> None:
        if path == place:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync_directory(path)

    monkeypatch.setattr(fsio, "sync_directory", broken)
    with pytest.raises(MachineError, match="Input/output error"):
        stage(place / "out", b"new", overwrite=overwrite)
    assert snapshot(place) == before


def test_exchange_really_swaps_where_the_kernel_can(place: Path) -> None:
    staged(b"one", place / "one")
    staged(b"two", place / "two")
    one, two = snapshot(place / "one"), snapshot(place / "two")
    if not fsio.exchange(place / "one", place / "two"):
        pytest.skip("this filesystem cannot swap two directories")
    assert (snapshot(place / "one"), snapshot(place / "two")) == (two, one)


# Modes and leftovers ---------------------------------------------------------------------------------------


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_follow_the_umask(triple: Triple, place: Path, umask: int) -> None:
    hsa.merge(**triple, output=place / "a" / "out", max_shard_size="100KB")
    weights = 0
    for path in [place / "a", *(place / "a").rglob("*")]:
        ordinary = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o7777 == ordinary & ~umask, path
        weights += path.suffix == ".safetensors"
    assert weights > 1


def test_a_failed_run_leaves_nothing_and_the_earlier_output_whole(
    triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hsa.merge(**triple, output=place / "out")
    before = snapshot(place)
    shutil.copy(triple["base"] / "config.json", triple["primary"] / "config.json")
    weights = triple["secondary"] / "model.safetensors"
    with weights.open("r+b") as file:  # NaN from the middle to the end
        file.seek(weights.stat().st_size // 8 * 4)
        file.write(b"\xff" * (weights.stat().st_size - file.tell()))
    for output, overwrite in (place / "out", True), (place / "new", False), (place / "a" / "new", False):
        with pytest.raises(hsa.NonFiniteError):
            hsa.merge(**triple, output=output, overwrite=overwrite, targets="attention-all")
        assert snapshot(place) == before


def test_the_staging_name_is_hidden_beside_the_destination_and_always_valid(place: Path) -> None:
    assert staging_path(place / "out") == place / ".out.hsa-staging"
    long, other = staging_path(place / ("n" * NAME_MAX)), staging_path(place / ("n" * (NAME_MAX - 1) + "m"))
    assert len(long.name) <= NAME_MAX and long != other and long.name.startswith(".")
