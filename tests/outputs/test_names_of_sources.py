"""Names of sources that say nothing: what the card calls them, and when that is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from warned_merges import warnings_of

import hsa

Triple = Mapping[str, Path]


@pytest.mark.parametrize("name", ["checkpoint-1000", "best", "final", "output", "model", "Checkpoint_20", "ckpt"])
def test_two_runs_of_one_name_are_told_apart_on_the_card(shared_triple: Triple, name: str, tmp_path: Path) -> None:
    sources = dict(shared_triple)
    for role, run in (("primary", "run-a"), ("secondary", "run-b")):
        sources[role] = tmp_path / run / name
        shutil.copytree(shared_triple[role], sources[role])
    report = hsa.merge(**sources, output=tmp_path / "merged", sync=False)
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    plain = card.replace("\\", "")
    assert f"# HSA merge of {name} in run-a and {name} in run-b\n" in plain
    assert "run-" not in card.split("---")[1], "a directory's name is no model on the Hub"
    recorded = json.loads((tmp_path / "merged" / "hsa_merge.json").read_text())["sources"]
    assert [recorded[role]["id"] for role in sources] == ["base", f"{name} in run-a", f"{name} in run-b"]
    assert not report.warnings
    assert any("call primary" in note and f"{name} in run-a" in note for note in report.notes)
    assert hsa.verify(tmp_path / "merged", **sources).ok


def test_names_that_say_something_stay_as_they_are(shared_triple: Triple, tmp_path: Path) -> None:
    for name in ("whisper-children", "checkpointed-model", "model-of-dialects", "best-of-three", "2024-06"):
        shutil.copytree(shared_triple["primary"], tmp_path / name)
        report = hsa.merge(**{**shared_triple, "primary": tmp_path / name}, output=tmp_path / "out", overwrite=True)
        recorded = json.loads((tmp_path / "out" / "hsa_merge.json").read_text())["sources"]["primary"]["id"]
        assert recorded == name
        assert not report.warnings


def test_parents_that_say_nothing_either_are_passed_over(shared_triple: Triple, tmp_path: Path) -> None:
    deep = tmp_path / "dialects" / "output" / "checkpoint-5"
    shutil.copytree(shared_triple["secondary"], deep)
    hsa.merge(**{**shared_triple, "secondary": deep}, output=tmp_path / "out", sync=False)
    recorded = json.loads((tmp_path / "out" / "hsa_merge.json").read_text())["sources"]["secondary"]["id"]
    assert recorded == "checkpoint-5 in dialects"


def test_a_name_that_says_nothing_and_has_no_parent_that_does_is_told(shared_triple: Triple, tmp_path: Path) -> None:
    deep = tmp_path / "output" / "model" / "best"
    shutil.copytree(shared_triple["secondary"], deep)
    sources = {**shared_triple, "secondary": deep}
    found = warnings_of(sources, tmp_path / "out")
    assert "the card calls secondary 'best', which says nothing; give secondary_id" in found
    assert "says nothing" not in warnings_of(sources, tmp_path / "named", secondary_id="org/name")


def test_the_home_directory_is_no_name(shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would put the user's name on a public card."""
    home = tmp_path / "somebody"
    shutil.copytree(shared_triple["secondary"], home / "best")
    monkeypatch.setenv("HOME", str(home))
    hsa.merge(**{**shared_triple, "secondary": home / "best"}, output=tmp_path / "out", sync=False)
    assert "somebody" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "somebody" not in (tmp_path / "out" / "hsa_merge.json").read_text()


def test_directories_of_one_name_are_told_apart_on_the_card(shared_triple: Triple, tmp_path: Path) -> None:
    """Names that say something, but the same."""
    sources = dict(shared_triple)
    for role, run in (("primary", "children"), ("secondary", "dialects")):
        sources[role] = tmp_path / run / "whisper-tiny-tuned"
        shutil.copytree(shared_triple[role], sources[role])
    hsa.merge(**sources, output=tmp_path / "out", sync=False)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert "# HSA merge of whisper-tiny-tuned in children and whisper-tiny-tuned in dialects\n" in card
