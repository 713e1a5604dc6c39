"""`strict` makes warnings errors: nothing is written, and every warning is named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers import merge_arguments, run_hsa, snapshot

import hsa

Triple = Mapping[str, Path]


@pytest.fixture(scope="module", params=["made-up", "real"])
def whole_triple(request: pytest.FixtureRequest, shared_triple: Triple) -> Triple:
    """The same with the small files of real models."""
    return shared_triple if request.param == "made-up" else dict(request.getfixturevalue("real"))


def test_strict_makes_warnings_errors(shared_triple: Triple, tmp_path: Path) -> None:
    doubled = {**shared_triple, "secondary": shared_triple["primary"]}
    before = snapshot(tmp_path)
    with pytest.raises(hsa.StrictError, match="equal on all"):
        hsa.merge(**doubled, output=tmp_path / "out", strict=True)
    with pytest.raises(hsa.StrictError, match="equal on all"):
        hsa.merge_patch(**doubled, output=tmp_path / "out.safetensors", strict=True)
    with pytest.raises(hsa.StrictError, match="equal on all"):
        hsa.sweep(**doubled, output=tmp_path / "sweep", lam=[0.2, 0.5], strict=True)
    with pytest.raises(hsa.StrictError, match="equal on all"):
        hsa.sweep(**doubled, output=tmp_path / "sweep", lam=[0.2, 0.5], strict=True, full=True)
    assert snapshot(tmp_path) == before
    assert issubclass(hsa.StrictError, hsa.HsaError)


def test_strict_keeps_an_earlier_output(shared_triple: Triple, tmp_path: Path) -> None:
    hsa.merge(**shared_triple, output=tmp_path / "out", sync=False)
    before = snapshot(tmp_path)
    swapped = {**shared_triple, "base": shared_triple["secondary"], "secondary": shared_triple["base"]}
    with pytest.raises(hsa.StrictError, match="exchanged"):
        hsa.merge(**swapped, output=tmp_path / "out", overwrite=True, strict=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", ["merge", "dry run", "patch", "sweep", "full sweep"])
def test_strict_is_exit_code_2_in_one_line_with_nothing_written(
    shared_triple: Triple, command: str, tmp_path: Path
) -> None:
    more = {
        "merge": [],
        "dry run": ["--dry-run"],
        "patch": ["--patch"],
        "sweep": [],
        "full sweep": ["--full"],
    }[command]
    arguments = list(merge_arguments(shared_triple, tmp_path / "out.safetensors", "--lambda=1", "--strict", *more))
    arguments[0] = "sweep" if "sweep" in command else "merge"
    done = run_hsa(*arguments)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.match("hsa: error: .*strict.*(next to|changes) nothing", line)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_strict_names_every_warning(shared_triple: Triple, tmp_path: Path) -> None:
    """An exchange, and a lambda without effect."""
    swapped = {**shared_triple, "base": shared_triple["primary"], "primary": shared_triple["base"]}
    with pytest.raises(hsa.StrictError, match=r"2 warnings are errors.*exchanged.*next to nothing"):
        hsa.merge(**swapped, output=tmp_path / "out", lam=0.9999, alpha=0.01, strict=True)
    assert list(tmp_path.iterdir()) == []


def test_strict_lets_a_sound_merge_through(whole_triple: Triple, tmp_path: Path) -> None:
    assert hsa.merge(**whole_triple, output=tmp_path / "out", strict=True, sync=False).warnings == ()
    assert hsa.sweep(**whole_triple, output=tmp_path / "sweep", lam=[0.2, 0.5], strict=True, sync=False).warnings == ()


def recipe(path: Path, sources: Triple, *merges: str) -> Path:
    listed = "".join(f"  - {{{merge}}}\n" for merge in merges)
    defaults = "".join(f"  {role}: {place}\n" for role, place in sources.items())
    path.write_text(f"defaults:\n{defaults}merges:\n{listed}", encoding="utf-8")
    return path


def test_strict_releases_refuse_entries_that_warn(shared_triple: Triple, tmp_path: Path) -> None:
    path = recipe(
        tmp_path / "recipe.yaml",
        shared_triple,
        "group: g, name: sound",
        f"group: g, name: doubled, secondary: {shared_triple['primary']}",
    )
    done = run_hsa("release", path, f"--output={tmp_path / 'tree'}", "--strict", "--no-sync")
    assert done.returncode == 2, done.stderr
    assert re.search("hsa: error: g/doubled: .*strict.*primary and secondary are equal", done.stderr)
    assert (tmp_path / "tree" / "g" / "sound" / "hsa_merge.json").is_file()
    assert not (tmp_path / "tree" / "g" / "doubled").exists()
    told = run_hsa("release", path, f"--output={tmp_path / 'other'}", "--no-sync")
    assert told.returncode == 0
    assert "hsa: warning: g/doubled: primary and secondary are equal" in told.stderr
    assert "secondary weighs" in told.stderr


def test_what_headers_tell_stops_a_strict_release_before_the_first_byte(shared_triple: Triple, tmp_path: Path) -> None:
    path = recipe(tmp_path / "recipe.yaml", shared_triple, "group: g, name: sound", "group: g, name: still, alpha: 0")
    done = run_hsa("release", path, f"--output={tmp_path / 'tree'}", "--strict", "--no-sync")
    assert done.returncode == 2, done.stderr
    assert "g/still" in done.stderr and "changes nothing" in done.stderr
    assert not (tmp_path / "tree").exists()
