"""Where an output may go, and that it appears there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import merge_arguments, mounted, provenance_bytes, run_hsa, snapshot

import hsa
from hsa.errors import DestinationError, MachineError
from hsa.system import fsio
from hsa.system.destinations import check_destination
from hsa.system.manifest import PROVENANCE
from hsa.system.publish import StagedOutput, staging_path
from hsa.system.staging import NAME_MAX

Triple = dict[str, Path]

STAND = """
import sys
import hsa
from hsa.system.publish import StagedOutput
publish = StagedOutput.publish
def stand(self):
    print("standing", flush=True)
    sys.stdin.readline()
    publish(self)
StagedOutput.publish = stand
hsa.merge(base=sys.argv[1], primary=sys.argv[2], secondary=sys.argv[3], output=sys.argv[4])
"""
"""A run that stands still with everything staged, until it is told to go on."""


@pytest.fixture(params=[True, False], ids=["swap", "no-swap"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With a filesystem that can swap two directories, and as if on one that cannot."""
    if not request.param:
        monkeypatch.setattr(fsio, "exchange", lambda first, second: False)
    return bool(request.param)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory to put outputs in, so that anything stray beside them shows."""
    place = tmp_path / "place"
    place.mkdir()
    return place


def refused(triple: Triple, output: str | Path, *, watched: Path, match: str) -> None:
    """The output is refused with and without overwrite, and nothing below `watched` changes."""
    before = snapshot(watched)
    for overwrite in (False, True):
        with pytest.raises(DestinationError, match=match):
            hsa.merge(**triple, output=output, overwrite=overwrite)
    assert snapshot(watched) == before


def thesis(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "thesis.tex").write_text("Years of work.\n")
    (directory / "figures").mkdir()
    (directory / "figures" / "one.pdf").write_bytes(b"%PDF-1.7\n")
    (directory / "latest").symlink_to("figures")
    return directory


def stage(destination: Path, content: bytes, *, overwrite: bool = False) -> None:
    """A smallest output, staged and published."""
    with StagedOutput(destination, overwrite=overwrite, sync=True) as staging:
        staging.write("model.safetensors", content, fsio.Tally())
        staging.write(PROVENANCE, provenance_bytes("model.safetensors"), fsio.Tally())
        staging.publish()


def staged(content: bytes, at: Path) -> dict[str, str]:
    """What `stage` publishes."""
    at.mkdir()
    (at / "model.safetensors").write_bytes(content)
    (at / PROVENANCE).write_bytes(provenance_bytes("model.safetensors"))
    return snapshot(at)


# Where an output may go ------------------------------------------------------------------------------------


def test_the_root_is_refused(triple: Triple) -> None:
    for overwrite in (False, True):
        for root in ("/", "//", "/..", "/tmp/.."):
            with pytest.raises(DestinationError, match="root directory"):
                check_destination(root, triple.values(), overwrite=overwrite)


@pytest.mark.parametrize("given", ["~", "by path", "its parent"])
def test_a_home_is_refused(triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    home = tmp_path / "homes" / "me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    output = {"~": "~", "by path": home, "its parent": home.parent}[given]
    refused(triple, output, watched=tmp_path, match="is or holds a home directory")
    (home / PROVENANCE).write_text("{}")
    refused(triple, output, watched=tmp_path, match="is or holds a home directory")


def test_the_home_of_the_user_database_is_refused_whatever_HOME_says(  # noqa: N802
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for user in {pwd.getpwuid(os.getuid()).pw_dir, pwd.getpwnam("root").pw_dir} - {"/"}:
        with pytest.raises(DestinationError, match="is or holds a home directory"):
            check_destination(user, triple.values(), overwrite=True)


def test_a_user_whom_no_database_knows_may_merge(triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    hsa.merge(**triple, output=place / "out")
    assert (place / "out" / PROVENANCE).is_file()
    with pytest.raises(DestinationError, match="cannot be resolved"):
        hsa.merge(**triple, output="~/out")


def test_a_mount_point_is_refused(triple: Triple, tmp_path: Path) -> None:
    with mounted(tmp_path / "mo unt", "-t", "tmpfs", "-o", "size=1m", "none") as point:
        refused(triple, point, watched=tmp_path, match="is a mount point")
        (point / PROVENANCE).write_text("{}")
        refused(triple, point, watched=tmp_path, match="is a mount point")
        (point / PROVENANCE).unlink()
        hsa.merge(**triple, output=point / "inside")


def test_a_mount_point_on_the_same_device_is_refused(triple: Triple, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with mounted(tmp_path / "bind mount", "--bind", str(tmp_path / "elsewhere")) as point:
        refused(triple, point, watched=tmp_path, match="is a mount point")


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
@pytest.mark.parametrize("earlier", [False, True], ids=["source", "source that is an earlier output"])
def test_a_source_is_refused(triple: Triple, tmp_path: Path, role: str, earlier: bool) -> None:
    source = triple[role]
    if earlier:
        (source / PROVENANCE).write_text("{}")
    (tmp_path / "link").symlink_to(source)
    for output in (source, source / ".", source / "x" / "..", tmp_path / "link", f"{source}/"):
        refused(triple, output, watched=tmp_path, match=r"is the source .*; choose a directory apart")
    refused(triple, source.parent, watched=tmp_path, match="contains the source")
    refused(triple, source.parent.parent, watched=tmp_path, match="contains the source")
    for output in (source / "merged", source / "a" / "b", tmp_path / "link" / "merged"):
        refused(triple, output, watched=tmp_path, match="lies in the source")


def test_a_source_is_refused_under_the_name_of_a_bind_mount(triple: Triple, tmp_path: Path) -> None:
    (triple["primary"] / PROVENANCE).write_text("{}")
    with mounted(tmp_path / "other", "--bind", str(triple["primary"].parent)) as point:
        refused(triple, point / "primary", watched=tmp_path, match="is the source")
        refused(triple, point / "primary" / "merged", watched=tmp_path, match="lies in the source")
        (point / PROVENANCE).write_text("{}")
        with pytest.raises(DestinationError):
            hsa.merge(**triple, output=point, overwrite=True)


def test_a_thesis_is_refused(triple: Triple, tmp_path: Path) -> None:
    refused(triple, thesis(tmp_path / "thesis"), watched=tmp_path, match=r"holds figures, latest, thesis\.tex")


def test_a_thesis_is_refused_on_the_command_line_in_one_line(triple: Triple, tmp_path: Path) -> None:
    directory = thesis(tmp_path / "thesis")
    before = snapshot(tmp_path)
    for more, expected in ([], "is not empty"), (["--overwrite"], "is no earlier output of hsa"):
        done = run_hsa(*merge_arguments(triple, directory, *more))
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert expected in done.stderr and "thesis.tex" in done.stderr and str(directory) in done.stderr
    assert snapshot(tmp_path) == before


def test_a_thesis_behind_a_link_is_refused(triple: Triple, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(thesis(tmp_path / "thesis"))
    refused(triple, tmp_path / "link", watched=tmp_path, match=r"link \(which is .*/thesis\)")


def test_a_directory_named_like_the_provenance_makes_no_earlier_output(triple: Triple, tmp_path: Path) -> None:
    (thesis(tmp_path / "thesis") / PROVENANCE).mkdir()
    refused(triple, tmp_path / "thesis", watched=tmp_path, match="holds figures")


def test_a_file_is_refused(triple: Triple, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(triple, tmp_path / "file", watched=tmp_path, match="is not a directory")
    refused(triple, tmp_path / "file" / "below", watched=tmp_path, match="is not a directory")
    refused(triple, tmp_path / "file" / "far" / "below", watched=tmp_path, match="is not a directory")
    (tmp_path / "loop").symlink_to("loop")
    refused(triple, tmp_path / "loop", watched=tmp_path, match="loop")


def test_an_empty_path_is_refused(triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    refused(triple, "", watched=place, match="empty path")
    refused(triple, "nul\0", watched=place, match="cannot be resolved")


def test_a_directory_that_may_not_be_looked_into_is_refused(triple: Triple) -> None:
    if os.geteuid() == 0:
        as_user, back = lambda: os.seteuid(65534), lambda: os.seteuid(0)
    else:
        as_user, back = lambda: None, lambda: None
    place = Path(tempfile.mkdtemp())
    try:
        place.chmod(0)
        as_user()
        try:
            with pytest.raises(DestinationError, match="Permission denied"):
                check_destination(place / "out", triple.values(), overwrite=False)
            with pytest.raises(DestinationError, match="Permission denied"):
                check_destination(place / "further" / "out", triple.values(), overwrite=False)
        finally:
            back()
    finally:
        place.chmod(0o700)
        place.rmdir()


def test_names_of_staging_directories_are_refused(triple: Triple, place: Path) -> None:
    for suffix in ("staging", "replaced"):
        refused(triple, place / f".out.hsa-{suffix}", watched=place, match="keeps for its own")


def test_an_earlier_output_needs_overwrite(triple: Triple, place: Path, swap: bool) -> None:
    hsa.merge(**triple, output=place / "out", k=0.3)
    before = snapshot(place)
    with pytest.raises(DestinationError, match=r"not empty.*overwrite=True"):
        hsa.merge(**triple, output=place / "out")
    assert snapshot(place) == before
    hsa.merge(**triple, output=place / "fresh", k=0.6)
    hsa.merge(**triple, output=place / "out", k=0.6, overwrite=True)
    assert snapshot(place / "out") == snapshot(place / "fresh") != before
    assert sorted(os.listdir(place)) == ["fresh", "out"]


def test_nothing_of_an_earlier_output_shines_through(triple: Triple, place: Path, swap: bool) -> None:
    hsa.merge(**triple, output=place / "out", max_shard_size="100KB")
    left = staging_path(place / "out") / "left" / "by" / "a" / "killed" / "run"
    left.mkdir(parents=True)
    (left / "link").symlink_to(triple["primary"])
    sources = snapshot(triple["primary"])
    hsa.merge(**triple, output=place / "out", overwrite=True)
    hsa.merge(**triple, output=place / "fresh")
    assert snapshot(place / "out") == snapshot(place / "fresh")
    assert snapshot(triple["primary"]) == sources
    assert sorted(os.listdir(place)) == ["fresh", "out"]


def test_an_empty_directory_is_taken(triple: Triple, place: Path) -> None:
    for overwrite in (False, True):
        out = place / f"out {overwrite}"
        out.mkdir()
        hsa.merge(**triple, output=out, overwrite=overwrite)
        assert (out / PROVENANCE).is_file()
    assert len(os.listdir(place)) == 2


def test_a_link_leads_to_the_destination(triple: Triple, place: Path, swap: bool) -> None:
    (place / "link").symlink_to("real")
    hsa.merge(**triple, output=place / "link", k=0.3)
    assert hsa.merge(**triple, output=place / "link", overwrite=True).output == place / "real"
    hsa.merge(**triple, output=place / "fresh")
    assert os.readlink(place / "link") == "real"
    assert snapshot(place / "real") == snapshot(place / "fresh")
    assert sorted(os.listdir(place)) == ["fresh", "link", "real"]


def test_parent_of_a_link_means_what_the_kernel_means(triple: Triple, place: Path) -> None:
    (place / "far" / "inner").mkdir(parents=True)
    (place / "link").symlink_to("far/inner")
    assert hsa.merge(**triple, output=f"{place}/link/../out").output == place / "far" / "out"


@pytest.mark.parametrize(
    "name",
    [
        "-leading-dash",
        "--overwrite",
        "with spaces and 'quotes' \"both\" $HOME `x` ; & *",
        "größe-模型-🎙",
        "e\u0301 decomposed",
        "new\nline\ttab\x1b[31m",
        ".hidden",
        "...",
        "trailing.",
        "%s {0}",
        os.fsdecode(b"latin-1 \xe9 no utf-8"),
        "n" * (NAME_MAX - len("..hsa-staging")),
        "n" * (NAME_MAX - len("..hsa-staging") + 1),
        "n" * NAME_MAX,
        "模" * (NAME_MAX // 3),
    ],
    ids=lambda name: ascii(name)[:24],
)
def test_unusual_names(triple: Triple, place: Path, swap: bool, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(place)
    hsa.merge(**triple, output=name, k=0.3)
    assert os.listdir(place) == [name]
    hsa.merge(**triple, output=name, overwrite=True)
    assert os.listdir(place) == [name]
    hsa.merge(**triple, output="fresh")
    assert snapshot(place / name) == snapshot(place / "fresh")


@pytest.mark.parametrize("name", ["-x", "a b\nc", os.fsdecode(b"latin-1 \xe9")], ids=ascii)
def test_unusual_names_on_the_command_line(triple: Triple, place: Path, name: str) -> None:
    env = {"PYTHONIOENCODING": "utf-8:strict"}
    for _ in range(2):
        done = run_hsa(*merge_arguments(triple, place / name, "--overwrite", "--quiet"), env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert os.listdir(place) == [name]
    refusal = run_hsa(*merge_arguments(triple, place / name), env=env)
    assert refusal.returncode == 2
    assert len(refusal.stderr.splitlines()) == 1


def test_a_name_that_is_too_long_is_refused_before_anything_is_read(triple: Triple, place: Path) -> None:
    refused(triple, place / ("n" * (NAME_MAX + 1)), watched=place, match="256 bytes, at most 255")
    refused(triple, place / ("ü" * (NAME_MAX // 2 + 1)) / "out", watched=place, match="256 bytes, at most 255")
    deep = place.joinpath(*["n" * 200] * 30)
    refused(triple, deep, watched=place, match="File name too long")


# Parents that do not exist yet -----------------------------------------------------------------------------


def test_missing_parents_are_made(triple: Triple, place: Path) -> None:
    hsa.merge(**triple, output=place / "a" / "b" / "out")
    assert sorted(path.name for path in place.rglob("*") if path.is_dir()) == ["a", "b", "out"]


def test_missing_parents_go_when_the_merge_fails(triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "kept").mkdir()

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fsio, "sync", broken)
    with pytest.raises(MachineError):
        hsa.merge(**triple, output=place / "kept" / "a" / "b" / "out")
    assert snapshot(place) == {"kept": "directory"}


def test_missing_parents_go_when_one_of_them_cannot_be_made(
    triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    mkdir = os.mkdir

    def full(path: str, *rest: int) -> None:
        made.append(path)
        if len(made) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        mkdir(path, *rest)

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(MachineError, match="No space left"):
        hsa.merge(**triple, output=place / "a" / "b" / "c" / "out")
    assert len(made) == 3
    assert snapshot(place) == {}


def test_parents_that_somebody_else_uses_by_now_stay(place: Path) -> None:
    with StagedOutput(place / "a" / "b" / "out", overwrite=False, sync=False):
        (place / "a" / "notes.txt").write_text("mine")
    assert sorted(snapshot(place)) == ["a", "a/notes.txt"]


# The lock --------------------------------------------------------------------------------------------------


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
