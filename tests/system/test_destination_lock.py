"""One run at a time to one destination: the lock, and what a killed run left."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import merge_arguments, run_hsa, snapshot
from staging import refused, stage, thesis

import hsa
from hsa.errors import DestinationError
from hsa.system import fsio
from hsa.system.manifest import PROVENANCE
from hsa.system.publish import StagedOutput
from hsa.system.staging import StagingDirectory

Triple = dict[str, Path]

STAND = """
import sys
import hsa
from hsa.system.publish import StagedOutput
from hsa.system.staging import StagingDirectory
publish = StagedOutput.publish
def stand(self):
    print("standing", flush=True)
    sys.stdin.readline()
    publish(self)
StagedOutput.publish = stand
hsa.merge(base=sys.argv[1], primary=sys.argv[2], secondary=sys.argv[3], output=sys.argv[4])
"""
"""A run that stands still with everything staged, until it is told to go on."""


def test_a_second_run_to_one_destination_is_refused_at_once(triple: Triple, place: Path) -> None:
    out = place / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", STAND, *map(str, triple.values()), str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdin is not None and first.stdout is not None
        assert first.stdout.readline() == "standing\n"
        before = snapshot(place)
        (place / "link").symlink_to("out")
        for given, more in (out, []), (out, ["--overwrite"]), (place / "link", []):
            started = time.monotonic()
            second = run_hsa(*merge_arguments(triple, given, *more))
            assert time.monotonic() - started < 20
            assert second.returncode == 2
            assert len(second.stderr.splitlines()) == 1
            assert f"another run is writing to {out}" in second.stderr
        (place / "link").unlink()
        assert first.poll() is None
        assert snapshot(place) == before
        first.communicate("go\n", timeout=60)
        assert first.returncode == 0
    finally:
        first.kill()
        first.wait()
    hsa.merge(**triple, output=place / "fresh")
    assert snapshot(out) == snapshot(place / "fresh")
    assert sorted(os.listdir(place)) == ["fresh", "out"]


def test_the_lock_falls_with_the_run(place: Path) -> None:
    for overwrite in (False, True):
        stage(place / "out", b"one", overwrite=overwrite)
    with StagedOutput(place / "other", overwrite=False, sync=False):
        pass
    stage(place / "other", b"two")
    assert sorted(os.listdir(place)) == ["other", "out"]


def test_what_a_killed_run_left_is_cleared(triple: Triple, place: Path) -> None:
    left = place / ".out.hsa-staging"
    thesis(left / "deep" / "er")
    (left / "model.safetensors").write_bytes(b"half")
    (left / "link").symlink_to(triple["primary"])
    sources = snapshot(triple["primary"])
    hsa.merge(**triple, output=place / "out")
    hsa.merge(**triple, output=place / "fresh")
    assert snapshot(place / "out") == snapshot(place / "fresh")
    assert sorted(os.listdir(place)) == ["fresh", "out"]
    assert snapshot(triple["primary"]) == sources


@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_else_under_the_staging_name_is_left_alone(triple: Triple, place: Path, kind: str) -> None:
    if kind == "file":
        (place / ".out.hsa-staging").write_text("mine")
    else:
        (place / ".out.hsa-staging").symlink_to(thesis(place / "thesis"))
    refused(triple, place / "out", watched=place, match="is in the way")


def test_a_filesystem_without_locks(triple: Triple, place: Path, swap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    hsa.merge(**triple, output=place / "out", k=0.3)
    hsa.merge(**triple, output=place / "out", overwrite=True)
    hsa.merge(**triple, output=place / "fresh")
    assert snapshot(place / "out") == snapshot(place / "fresh")
    assert sorted(os.listdir(place)) == ["fresh", "out"]
    (place / ".new.hsa-staging").mkdir()
    refused(triple, place / "new", watched=place, match="remove what a killed run left")


def test_a_run_that_ends_while_the_next_one_looks_does_not_disturb_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lstat = Path.lstat
    (place / ".out.hsa-staging").mkdir()

    def gone(path: Path) -> os.stat_result:
        monkeypatch.setattr(Path, "lstat", lstat)
        path.rmdir()
        return path.lstat()

    monkeypatch.setattr(Path, "lstat", gone)
    stage(place / "out", b"mine")
    assert os.listdir(place) == ["out"]


def test_a_destination_that_another_run_filled_meanwhile_is_refused_at_once(place: Path) -> None:
    stage(place / "out", b"theirs")
    before = snapshot(place)
    with pytest.raises(DestinationError, match="not empty"):
        StagedOutput(place / "out", overwrite=False, sync=False)
    assert snapshot(place) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_destination_that_fills_during_the_run_is_left_alone(place: Path, overwrite: bool) -> None:
    with pytest.raises(DestinationError), StagedOutput(place / "out", overwrite=overwrite, sync=False) as staging:
        staging.write(PROVENANCE, b"{}", fsio.Tally())
        thesis(place / "out")
        before = snapshot(place / "out")
        staging.publish()
    assert snapshot(place / "out") == before
    assert os.listdir(place) == ["out"]


@pytest.mark.parametrize("levels", [1, 2])
def test_directories_that_a_failing_run_removes_meanwhile_are_made_again(
    levels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails removes the empty directories that it had made, which another run may have found there."""
    destination = tmp_path.joinpath(*map(str, range(levels)), "out")
    removals = [levels]

    def made_and_removed(self: StagingDirectory) -> None:
        make_parents(self)
        if removals:
            for parent in list(destination.parents)[: removals.pop()]:
                parent.rmdir()

    make_parents = StagingDirectory._make_parents
    monkeypatch.setattr(StagingDirectory, "_make_parents", made_and_removed)
    path = destination.parent / ".out.hsa-staging"
    with StagingDirectory(path, destination, sync=False):
        assert path.is_dir()
    assert not removals
    assert list(tmp_path.iterdir()) == []
