"""Where an output may go, and that its parents are made."""

from __future__ import annotations

import errno
import os
import pwd
import tempfile
from pathlib import Path

import pytest
from helpers import merge_arguments, mounted, run_hsa, snapshot
from staging import refused, thesis

import hsa
from hsa.errors import DestinationError, MachineError
from hsa.system import fsio
from hsa.system.destinations import check_destination
from hsa.system.manifest import PROVENANCE
from hsa.system.publish import StagedOutput, staging_path
from hsa.system.staging import NAME_MAX

Triple = dict[str, Path]


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
