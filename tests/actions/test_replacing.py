"""Replacing an output that this user may not remove, that lies in a lower layer, or beside what a killed run left."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ordinary_user, run_hsa, snapshot

import hsa
from hsa.system import fsio
from hsa.system.manifest import PROVENANCE
from hsa.system.publish import StagedOutput, staging_path
from hsa.system.staging import REPLACED

Triple = dict[str, Path]

USER = 65534
OTHER = 65533


@pytest.fixture
def open_triple(shared_triple: Triple) -> Iterator[Triple]:
    """The sources where every user can read them, and a folder `place` beside them that every user may write to."""
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    (top / "place").mkdir()
    (top / "place").chmod(0o777)
    yield {role: Path(shutil.copytree(path, top / "sources" / role)) for role, path in shared_triple.items()}
    subprocess.run(["chmod", "-R", "u+rwX", str(top)], check=True)
    shutil.rmtree(top)


def place_of(triple: Triple) -> Path:
    return triple["base"].parents[1] / "place"


def merge_as(user: int, triple: Triple, out: Path, k: float = 0.6) -> tuple[int, str]:
    """Exit code, and the message or the notes, of a merge that overwrites, with another user's rights."""
    if os.geteuid() != 0:
        pytest.skip("a merge by another user needs root")
    with ordinary_user(user):
        try:
            report = hsa.merge(**triple, output=out, k=k, overwrite=True, threads=1)
        except hsa.HsaError as error:
            return error.exit_code, str(error)
    return 0, " | ".join(report.notes)


def kept_whole(triple: Triple, out: Path, user: int, *words: str) -> None:
    """A merge by this user is refused in these words; the old output stays whole and nothing lies beside it."""
    before = snapshot(out)
    code, said = merge_as(user, triple, out)
    assert code == 2 and all(word in said for word in words), (code, said)
    assert snapshot(out) == before
    assert os.listdir(out.parent) == [out.name]


# Owners and modes ------------------------------------------------------------------------------------------


def test_an_output_of_another_user_stays_whole(open_triple: Triple) -> None:
    out = place_of(open_triple) / "out"
    assert merge_as(OTHER, open_triple, out, 0.3)[0] == 0
    kept_whole(open_triple, out, USER, f"may not be removed by this user (uid {USER})", f"belongs to uid {OTHER}")
    assert merge_as(OTHER, open_triple, out)[0] == 0
    assert merge_as(0, open_triple, out)[0] == 0
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("mode", [0o555, 0o500, 0o600, 0o333], ids=oct)
def test_an_output_that_was_made_read_only_stays_whole(open_triple: Triple, mode: int) -> None:
    out = place_of(open_triple) / "out"
    assert merge_as(USER, open_triple, out, 0.3)[0] == 0
    before = snapshot(out)
    out.chmod(mode)
    code, said = merge_as(USER, open_triple, out)
    assert code == 2, (code, said)
    out.chmod(0o755)
    assert snapshot(out) == before and os.listdir(out.parent) == ["out"]
    assert merge_as(USER, open_triple, out)[0] == 0


def test_files_made_read_only_do_not_keep_their_directory_from_being_replaced(open_triple: Triple) -> None:
    out = place_of(open_triple) / "out"
    assert merge_as(USER, open_triple, out, 0.3)[0] == 0
    for path in out.iterdir():
        path.chmod(0o444)
    assert merge_as(USER, open_triple, out)[0] == 0
    assert os.listdir(out.parent) == ["out"]


def test_an_output_of_another_user_in_a_sticky_directory_stays_whole(open_triple: Triple) -> None:
    out = place_of(open_triple) / "out"
    assert merge_as(OTHER, open_triple, out, 0.3)[0] == 0
    out.chmod(0o777)
    out.parent.chmod(0o1777)
    kept_whole(open_triple, out, USER, "lets its owner alone remove")
    out.parent.chmod(0o777)
    out.chmod(0o1777)
    kept_whole(open_triple, out, USER, "lets its owner alone remove")


def test_an_output_that_becomes_read_only_during_the_run_stays_whole(shared_triple: Triple, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("root is needed to take on another user's rights and give them back")
    top = Path(tempfile.mkdtemp())
    try:
        top.chmod(0o777)
        out = top / "out"
        hsa.merge(**shared_triple, output=out, sync=False)
        os.chown(out, USER, USER)
        before = snapshot(out)
        os.seteuid(USER)
        try:
            with (
                pytest.raises(hsa.DestinationError, match="may not be removed by this user"),
                StagedOutput(out, overwrite=True, sync=False) as staging,
            ):
                out.chmod(0o555)
                staging.publish()
        finally:
            os.seteuid(0)
        assert snapshot(out) == before and os.listdir(top) == ["out"]
    finally:
        shutil.rmtree(top)


@pytest.mark.parametrize("swap", [True, False], ids=["swap", "no-swap"])
@pytest.mark.parametrize("call", ["unlink", "rmdir", "listdir"])
def test_an_old_output_that_cannot_be_removed_is_a_note_and_blocks_no_later_run(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, swap: bool
) -> None:
    """As on a filesystem that answers so when no permission tells it: an immutable file, a lost server."""
    place = tmp_path / "place"
    out, aside = place / "out", place / f".out{REPLACED}"
    hsa.merge(**shared_triple, output=out, k=0.3, sync=False)
    retire_old = StagedOutput._remove_or_restore
    if not swap:
        monkeypatch.setattr(fsio, "exchange", lambda first, second: False)

    def failing(*arguments: object, **keywords: object) -> object:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def retire(self: StagedOutput, *arguments: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            retire_old(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(StagedOutput, "_remove_or_restore", retire)
        report = hsa.merge(**shared_triple, output=out, overwrite=True, sync=False)
    (note,) = [note for note in report.notes if str(aside) in note]
    assert "Operation not permitted" in note and "remove it yourself" in note
    hsa.merge(**shared_triple, output=tmp_path / "fresh", sync=False)
    assert snapshot(out) == snapshot(tmp_path / "fresh")
    assert sorted(os.listdir(place)) == [f".out{REPLACED}", "out"]
    again = hsa.merge(**shared_triple, output=out, overwrite=True, sync=False)
    assert not any(str(aside) in note for note in again.notes)
    assert os.listdir(place) == ["out"]


# Leftovers of killed runs ----------------------------------------------------------------------------------


def test_a_leftover_staging_directory_lends_the_output_neither_mode_nor_owner(open_triple: Triple) -> None:
    out = place_of(open_triple) / "out"
    left = staging_path(out)
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    os.chown(left, OTHER, OTHER) if os.geteuid() == 0 else None
    left.chmod(0o2700)
    mask = os.umask(0o022)
    try:
        hsa.merge(**open_triple, output=out, sync=False)
    finally:
        os.umask(mask)
    status = out.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o755, os.geteuid())
    assert os.listdir(out.parent) == ["out"]


def test_a_leftover_of_another_user_is_refused_with_a_remedy(open_triple: Triple) -> None:
    out = place_of(open_triple) / "out"
    left = staging_path(out)
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    code, said = merge_as(USER, open_triple, out)
    assert code == 1
    assert f"{left}, which a killed run of uid 0 left, cannot be removed" in said and "remove it" in said
    assert os.listdir(out.parent) == [left.name]


def test_a_leftover_staging_directory_of_a_sweep_lends_its_files_no_mode(shared_triple: Triple, tmp_path: Path) -> None:
    """Its files are moved out of the staging directory and have the mode of the umask, whatever was left."""
    sweep = tmp_path / "sweep"
    (sweep / ".sweep.hsa-staging").mkdir(parents=True)
    (sweep / ".sweep.hsa-staging").chmod(0o700)
    mask = os.umask(0o022)
    try:
        hsa.sweep(**shared_triple, output=sweep, sync=False)
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in sweep.iterdir()} == {0o644}


# Overlay filesystems ---------------------------------------------------------------------------------------

OVERLAY = """
set -e
mount -t tmpfs none "$1"
mkdir "$1/lower" "$1/upper" "$1/work" "$1/all"
cp -r "$2" "$1/lower/out"
mount -t overlay overlay -o "lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work,redirect_dir=off" "$1/all" || exit 77
cd "$1/all"
rc=0
"$3" -m hsa merge --base "$4" --primary "$5" --secondary "$6" --output out --overwrite --threads 1 || rc=$?
echo "exit $rc"
ls -A
"$3" -m hsa verify out --quiet && echo "old: whole"
"$3" -m hsa merge --base "$4" --primary "$5" --secondary "$6" --output new --k 0.3 --quiet
"$3" -m hsa merge --base "$4" --primary "$5" --secondary "$6" --output new --overwrite --quiet && echo "upper: replaced"
rm -r out
"$3" -m hsa merge --base "$4" --primary "$5" --secondary "$6" --output out --quiet && echo "removed: written"
ls -A
"""


def test_an_output_in_a_lower_layer_of_a_container_stays_whole_and_the_remedy_is_said(
    shared_triple: Triple, tmp_path: Path
) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("an overlay filesystem needs root and unshare")
    kept = tmp_path / "kept"
    hsa.merge(**shared_triple, output=kept, k=0.3, sync=False)
    (tmp_path / "disk").mkdir()
    sources = [str(shared_triple[role]) for role in ("base", "primary", "secondary")]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", OVERLAY, "sh", str(tmp_path / "disk"), str(kept), sys.executable, *sources],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"cannot mount an overlay filesystem here: {done.stderr.strip()}")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout.splitlines() == [
        "exit 2",
        "out",
        "old: whole",
        "upper: replaced",
        "removed: written",
        "new",
        "out",
    ], (done.stdout, done.stderr)
    (line,) = done.stderr.splitlines()
    assert "lower layer of an overlay filesystem" in line and "choose another output" in line


def test_a_rename_across_layers_that_shows_at_the_end_alone_keeps_the_old_output(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "place" / "out"
    hsa.merge(**shared_triple, output=out, k=0.3, sync=False)
    before, rename = snapshot(out), fsio.rename

    def across(source: Path, destination: Path) -> None:
        if source == out:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, destination)

    monkeypatch.setattr(fsio, "exchange", lambda first, second: False)
    monkeypatch.setattr(fsio, "rename", across)
    with pytest.raises(hsa.DestinationError, match=r"lower layer of an overlay filesystem.*choose another output"):
        hsa.merge(**shared_triple, output=out, overwrite=True, sync=False)
    assert snapshot(out) == before and os.listdir(out.parent) == ["out"]


def test_nothing_of_this_disturbs_an_ordinary_replacement(shared_triple: Triple, tmp_path: Path) -> None:
    arguments = [f"--{role}={path}" for role, path in shared_triple.items()]
    for _ in range(2):
        done = run_hsa("merge", *arguments, f"--output={tmp_path / 'out'}", "--overwrite")
        assert done.returncode == 0 and "could not be removed" not in done.stderr
    assert (tmp_path / "out" / PROVENANCE).is_file()
