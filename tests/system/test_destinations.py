"""What `--overwrite` may delete, and what may be written inside an earlier output: nothing that its record lacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import merge_arguments, mounted, run_hsa, snapshot

import hsa
from hsa.outputs.patch_reader import SUFFIX
from hsa.releases.plan import plan_release
from hsa.system import fsio
from hsa.system.manifest import PROVENANCE
from hsa.system.publish import StagedOutput
from hsa.system.staging import REPLACED

Triple = dict[str, Path]


@pytest.fixture(scope="module")
def kept(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output, for reading alone."""
    out = tmp_path_factory.mktemp("kept") / "out"
    hsa.merge(**shared_triple, output=out, k=0.3, sync=False)
    return out


@pytest.fixture
def out(kept: Path, tmp_path: Path) -> Path:
    """A copy of the output, in a place of its own."""
    return Path(shutil.copytree(kept, tmp_path / "place" / "out"))


def refused(triple: Triple, out: Path, *named: str) -> None:
    """Overwriting it is refused in one line that says these words, and nothing changes."""
    before = snapshot(out.parent)
    for more in ([], ["--dry-run"]):
        done = run_hsa(*merge_arguments(triple, out, "--overwrite", *more))
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
        assert all(word in done.stderr for word in (*named, str(out))), done.stderr
    assert snapshot(out.parent) == before


# What overwriting deletes ----------------------------------------------------------------------------------


def notes(out: Path) -> None:
    (out / "notes.txt").write_text("mine")


def repository(out: Path) -> None:
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main\n")


def licence(out: Path) -> None:
    (out / "LICENSE").write_text("MIT")


def hidden(out: Path) -> None:
    (out / ".gitattributes").write_text("*.safetensors filter=lfs\n")


def link(out: Path) -> None:
    (out / "latest").symlink_to("model.safetensors")


def link_under_a_listed_name(out: Path) -> None:
    shutil.move(out / "config.json", out.parent / "config.json")
    (out / "config.json").symlink_to("../config.json")


def directory_under_a_listed_name(out: Path) -> None:
    (out / "vocab.json").unlink(missing_ok=True)
    (out / "config.json").unlink()
    (out / "config.json").mkdir()


def hard_link(out: Path) -> None:
    os.link(out / "model.safetensors", out / "backup.safetensors")


def other_spelling(out: Path) -> None:
    (out / "readme.md").write_text("not the card")


def another_output(out: Path) -> None:
    shutil.copytree(out, out.parent / "copy")
    shutil.move(out.parent / "copy", out / "lambda_1")


@pytest.mark.parametrize(
    ("add", "name"),
    [
        (notes, "notes.txt"),
        (repository, ".git (a directory)"),
        (licence, "LICENSE"),
        (hidden, ".gitattributes"),
        (link, "latest (a link)"),
        (link_under_a_listed_name, "config.json (a link)"),
        (directory_under_a_listed_name, "config.json (a directory)"),
        (hard_link, "backup.safetensors"),
        (other_spelling, "readme.md"),
        (another_output, "lambda_1 (a directory)"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_overwrite_deletes_no_file_that_the_record_does_not_list(
    shared_triple: Triple, out: Path, add: Callable[[Path], None], name: str
) -> None:
    add(out)
    refused(shared_triple, out, name, "does not list")


def test_a_named_pipe_in_an_output_is_neither_opened_nor_deleted(shared_triple: Triple, out: Path) -> None:
    os.mkfifo(out / "pipe")
    with pytest.raises(hsa.DestinationError, match=r"pipe \(a device\), which its"):
        hsa.merge(**shared_triple, output=out, overwrite=True)
    assert (out / "pipe").is_fifo() and len(os.listdir(out)) > 4


def flipped(out: Path) -> None:
    text = (out / PROVENANCE).read_text().replace('"lambda": 0.5', '"lambda": 0.25', 1)
    (out / PROVENANCE).write_text(text)


def cut(out: Path) -> None:
    os.truncate(out / PROVENANCE, 100)


def empty(out: Path) -> None:
    os.truncate(out / PROVENANCE, 0)


def newer(out: Path) -> None:
    document = json.loads((out / PROVENANCE).read_text())
    (out / PROVENANCE).write_text(json.dumps({**document, "format": 3}, indent=1) + "\n")


@pytest.mark.parametrize("damage", [flipped, cut, empty, newer], ids=lambda damage: damage.__name__)
def test_a_damaged_record_or_another_version_lists_nothing(
    shared_triple: Triple, out: Path, damage: Callable[[Path], None]
) -> None:
    damage(out)
    refused(shared_triple, out, "lists no file, for it is damaged or of another version")


def test_an_edited_card_and_missing_files_do_not_keep_an_output_from_being_replaced(
    shared_triple: Triple, out: Path, tmp_path: Path
) -> None:
    (out / "README.md").write_text("edited")
    (out / "generation_config.json").unlink()
    hsa.merge(**shared_triple, output=out, overwrite=True, sync=False)
    hsa.merge(**shared_triple, output=tmp_path / "fresh", sync=False)
    assert snapshot(out) == snapshot(tmp_path / "fresh")
    assert os.listdir(out.parent) == ["out"]


def test_apply_deletes_no_file_that_the_record_does_not_list(shared_triple: Triple, out: Path, tmp_path: Path) -> None:
    patch = tmp_path / f"patch{SUFFIX}"
    hsa.merge_patch(**shared_triple, output=patch, sync=False)
    notes(out)
    before = snapshot(out)
    with pytest.raises(hsa.DestinationError, match=r"notes\.txt, which its hsa_merge\.json does not list"):
        hsa.apply(shared_triple["primary"], patch, output=out, overwrite=True)
    assert snapshot(out) == before


def test_a_file_that_appears_while_the_merge_runs_is_not_deleted(shared_triple: Triple, out: Path) -> None:
    with (
        pytest.raises(hsa.DestinationError, match=r"notes\.txt"),
        StagedOutput(out, overwrite=True, sync=False) as staging,
    ):
        staging.write(PROVENANCE, b"{}", fsio.Tally())
        notes(out)
        before = snapshot(out)
        staging.publish()
    assert snapshot(out) == before
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("swap", [True, False], ids=["swap", "no-swap"])
def test_a_file_that_appears_at_the_very_swap_is_kept_beside_the_output(
    shared_triple: Triple, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    rename, exchange = fsio.rename, fsio.exchange

    def meanwhile(source: Path, destination: Path) -> None:
        if source == out:
            notes(out)
        rename(source, destination)

    def swapped(first: Path, second: Path) -> bool:
        if swap:
            notes(out)
        return swap and exchange(first, second)

    monkeypatch.setattr(fsio, "rename", meanwhile)
    monkeypatch.setattr(fsio, "exchange", swapped)
    report = hsa.merge(**shared_triple, output=out, overwrite=True, sync=False)
    monkeypatch.undo()
    aside = out.parent / f".out{REPLACED}"
    assert (aside / "notes.txt").read_text() == "mine"
    (note,) = [note for note in report.notes if str(aside) in note]
    assert "it holds notes.txt, which its record does not list" in note
    again = hsa.merge(**shared_triple, output=out, overwrite=True, sync=False)
    assert any(str(aside) in note for note in again.notes)
    hsa.merge(**shared_triple, output=tmp_path / "fresh", sync=False)
    assert snapshot(out) == snapshot(tmp_path / "fresh")
    (aside / "notes.txt").unlink()
    hsa.merge(**shared_triple, output=out, overwrite=True, sync=False)
    assert os.listdir(out.parent) == ["out"]


def folded(path: Path) -> Path:
    """The entry that a filesystem without capital letters would find under a name."""
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    return next((path.parent / name for name in names if name.casefold() == path.name.casefold()), path)


def test_a_filesystem_that_folds_capital_letters_knows_its_own_files(
    shared_triple: Triple, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one can be mounted, see the next test."""
    (out / "README.md").rename(out / "readme.md")
    lstat = os.lstat
    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", lambda path: lstat(folded(Path(path))))
        hsa.merge(**shared_triple, output=out, overwrite=True, sync=False)
        assert hsa.verify(out).ok
        (out / "notes.txt").write_text("mine")
        with pytest.raises(hsa.DestinationError, match=r"notes\.txt, which"):
            hsa.merge(**shared_triple, output=out, overwrite=True, sync=False)


def test_a_mounted_filesystem_that_folds_capital_letters(shared_triple: Triple, tmp_path: Path) -> None:
    image = tmp_path / "image"
    if shutil.which("mkfs.vfat") is None:
        pytest.skip("mkfs.vfat is not installed, which makes a filesystem that folds capital letters")
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.vfat", str(image)], check=True, capture_output=True)
    with mounted(tmp_path / "disk", "-o", "loop", str(image)) as disk:
        hsa.merge(**shared_triple, output=disk / "out", k=0.3)
        (disk / "out" / "README.md").rename(disk / "out" / "readme.md")
        hsa.merge(**shared_triple, output=disk / "OUT", overwrite=True)
        assert hsa.verify(disk / "out").ok
        (disk / "out" / "notes.txt").write_text("mine")
        with pytest.raises(hsa.DestinationError, match=r"notes\.txt, which"):
            hsa.merge(**shared_triple, output=disk / "out", overwrite=True)


# Inside an earlier output ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["sub", "a/b", f"sub{SUFFIX}"])
def test_an_output_inside_an_output_is_refused(shared_triple: Triple, out: Path, place: str) -> None:
    before = snapshot(out)
    done = run_hsa(*merge_arguments(shared_triple, out / place))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"{out} is an earlier output of hsa" in done.stderr
    assert snapshot(out) == before


def test_a_link_into_an_output_is_refused(shared_triple: Triple, out: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(hsa.DestinationError, match="is an earlier output of hsa"):
        hsa.merge(**shared_triple, output=tmp_path / "link" / "sub")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_patch_on_or_inside_an_output_is_refused(shared_triple: Triple, out: Path, overwrite: bool) -> None:
    named = out.rename(out.parent / f"out{SUFFIX}")
    before = snapshot(named)
    more = ["--patch", *(["--overwrite"] if overwrite else [])]
    for place, word in (
        (named, "is a directory; a patch is one file"),
        (named / f"x{SUFFIX}", "is an earlier output of hsa"),
        (named / f"model{SUFFIX}", "is an earlier output of hsa"),
        (named / "a" / f"x{SUFFIX}", "is an earlier output of hsa"),
    ):
        done = run_hsa(*merge_arguments(shared_triple, place, *more))
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert word in done.stderr, done.stderr
    assert snapshot(named) == before


def test_an_output_given_as_a_patch_is_refused(shared_triple: Triple, out: Path) -> None:
    before = snapshot(out)
    with pytest.raises(hsa.DestinationError, match=r"expected one that ends in \.safetensors"):
        hsa.merge_patch(**shared_triple, output=out, overwrite=True)
    assert snapshot(out) == before


@pytest.mark.parametrize("full", [False, True], ids=["patches", "checkpoints"])
def test_a_sweep_on_or_inside_an_output_is_refused(shared_triple: Triple, out: Path, full: bool) -> None:
    (out / "index.json").write_text('{\n "kind": "hsa-sweep",')
    before = snapshot(out)
    for place in (out, out / "sweep"):
        with pytest.raises(hsa.DestinationError, match=f"{out} is an earlier output of hsa"):
            hsa.sweep(**shared_triple, output=place, full=full)
    assert snapshot(out) == before


def test_a_release_on_or_inside_an_output_is_refused(shared_triple: Triple, out: Path, tmp_path: Path) -> None:
    (out / "README.md").unlink()
    before = snapshot(out)
    recipe = tmp_path / "recipe.yaml"
    sources = "".join(f", {role}: {json.dumps(str(path))}" for role, path in shared_triple.items())
    recipe.write_text(f"merges: [{{name: a, group: g{sources}}}]")
    for place in (out, out / "tree"):
        with pytest.raises(hsa.HsaError, match=f"{out} is an earlier output of hsa"):
            hsa.release(recipe, place)
    assert snapshot(out) == before


def test_a_group_of_a_release_that_is_an_output_is_refused(shared_triple: Triple, out: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    sources = "".join(f", {role}: {json.dumps(str(path))}" for role, path in shared_triple.items())
    recipe.write_text(f"merges: [{{name: a, group: out{sources}}}]")
    before = snapshot(out)
    with pytest.raises(hsa.HsaError, match=f"{out} is an earlier output of hsa"):
        hsa.release(recipe, out.parent)
    assert snapshot(out.parent)["out"] == "directory" and snapshot(out) == before


# Sweeps and releases ---------------------------------------------------------------------------------------

POINT = {"full": True, "k": (0.6,), "lam": (0.5,), "sync": False}


def test_a_sweep_deletes_nothing_of_a_point_that_its_record_does_not_list(
    shared_triple: Triple, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    (name,) = hsa.sweep(**shared_triple, output=sweep, **POINT).made  # type: ignore[arg-type]
    notes(sweep / name)
    before = snapshot(sweep)
    for overwrite in (False, True):  # a finished point with somebody's notes beside it is sound, and left alone
        again = hsa.sweep(**shared_triple, output=sweep, overwrite=overwrite, **POINT)  # type: ignore[arg-type]
        assert again.skipped == (name,)
        assert snapshot(sweep) == before
    with pytest.raises(hsa.DestinationError, match=r"notes\.txt, which its"):
        hsa.sweep(**shared_triple, output=sweep, overwrite=True, card={"role": "new"}, **POINT)  # type: ignore[arg-type]
    assert snapshot(sweep) == before
    (sweep / name / "notes.txt").unlink()
    flipped(sweep / name)
    with pytest.raises(hsa.DestinationError, match="lists no file"):
        hsa.sweep(**shared_triple, output=sweep, overwrite=True, **POINT)  # type: ignore[arg-type]
    shutil.rmtree(sweep / name)
    assert hsa.sweep(**shared_triple, output=sweep, **POINT).made == (name,)  # type: ignore[arg-type]
    assert hsa.sweep(**shared_triple, output=sweep, **POINT).skipped == (name,)  # type: ignore[arg-type]


def test_a_release_leaves_an_entry_with_files_of_others_and_builds_the_rest(
    shared_triple: Triple, tmp_path: Path
) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "tree"
    sources = "".join(f", {role}: {json.dumps(str(path))}" for role, path in shared_triple.items())
    entries = "".join(f"{{name: {name}, group: g{sources}, k: K}}, " for name in "abc")
    recipe.write_text(f"merges: [{entries.replace('K', '0.6')}]")
    assert hsa.release(recipe, output, sync=False).ok
    licence(output / "g" / "a")
    flipped(output / "g" / "b")
    before = snapshot(output / "g")
    assert [each.action for each in plan_release(recipe, output).entries] == ["verify", "refuse", "verify"]
    recipe.write_text(f"merges: [{entries.replace('K', '0.3')}]")
    report = hsa.release(recipe, output, sync=False, overwrite=True)
    assert [entry.result for entry in report.entries] == ["failed", "failed", "built"]
    a, b = (entry.problem or "" for entry in report.failed)
    assert "LICENSE, which its hsa_merge.json does not list" in a and "lists no file, for it is damaged" in b
    after = snapshot(output / "g")
    assert {name: value for name, value in after.items() if not name.startswith("c")} == {
        name: value for name, value in before.items() if not name.startswith("c")
    }


# Options given twice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", "--base=b", "--base", "c", "--primary=p", "--secondary=s", "--output=o"),
        ("merge", "--base=b", "--primary=p", "--secondary=s", "--output=o", "--k=0.1", "--k=0.2"),
        ("sweep", "--base=b", "--primary=p", "--primary=q", "--secondary=s", "--output=o"),
        ("verify", "o", "--sources", "--base=b", "--base=c", "--primary=p", "--secondary=s"),
        ("inspect", "--base=b", "--primary=p", "--primary=q", "--secondary=s"),
        ("apply", "p", "patch", "--output=o", "--output=x"),
        ("release", "r", "--output=o", "--output=x"),
        ("demo", "--output=o", "--output=x"),
    ],
    ids=lambda arguments: " ".join(arguments[:1]),
)
def test_a_second_base_or_any_single_option_given_twice_is_refused(arguments: tuple[str, ...]) -> None:
    done = run_hsa(*arguments)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert "is given 2 times and takes one value; give it once" in done.stderr


def test_options_that_take_several_values_may_be_repeated(shared_triple: Triple, out: Path, tmp_path: Path) -> None:
    cards = ["--card=title=One", "--card=role=two"]
    done = run_hsa(*merge_arguments(shared_triple, tmp_path / "new", *cards, "--overwrite", "--overwrite"))
    assert done.returncode == 0, done.stderr
