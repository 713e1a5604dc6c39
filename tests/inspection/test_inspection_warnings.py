"""`hsa inspect` warns of sources that a merge would warn of, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, read_tensors, run_hsa, write_tensors

import hsa
from hsa.views import csv_file, page, table

Triple = dict[str, Path]


def test_a_fine_tune_that_is_base_is_warned_of(shared_triple: Triple) -> None:
    found = hsa.inspect(base=shared_triple["base"], primary=shared_triple["primary"], secondary=shared_triple["base"])
    assert any("base and secondary are equal" in warning for warning in found.warnings)
    assert found.energy is not None
    assert (found.energy[1].total, found.energy[1].share(found.energy[1].inside)) == (0.0, None)
    assert found.energy[0].share(found.energy[0].total) == 1.0


def warned(sources: Triple, output: Path | None = None, **parameters: Any) -> list[str]:
    """The warnings of an inspection."""
    return list(hsa.inspect(output, **sources, energy=False, **parameters).warnings)


@pytest.fixture(params=["made-up", "real"])
def sound(request: pytest.FixtureRequest, shared_triple: Triple) -> Triple:
    """A made-up triple, and the real one where there is one."""
    return shared_triple if request.param == "made-up" else dict(request.getfixturevalue("real"))


def as_merged(sources: Triple, output: Path, **parameters: Any) -> list[str]:
    """What a merge of the same sources says of their values, without what it says of the names on the card."""
    report = hsa.merge(**sources, output=output, sync=False, **parameters)
    return [text for text in report.warnings if "the card calls" not in text]


@pytest.mark.parametrize("other", ["primary", "secondary"])
def test_inspect_warns_of_a_base_exchanged_with_a_fine_tune(sound: Triple, other: str, tmp_path: Path) -> None:
    swapped = {**sound, "base": sound[other], other: sound["base"]}
    found = warned(swapped)
    assert any(f"are base and {other} exchanged" in text for text in found), found
    assert [text[:20] for text in found] == [text[:20] for text in as_merged(swapped, tmp_path / "out")]
    assert any("exchanged" in text for text in warned(swapped, tmp_path / "out"))


@pytest.mark.parametrize(("one", "two"), [("base", "primary"), ("base", "secondary"), ("secondary", "primary")])
def test_inspect_warns_of_a_model_given_twice(sound: Triple, one: str, two: str) -> None:
    (found,) = [text for text in warned({**sound, one: sound[two]}) if "equal on all" in text]
    assert one in found
    assert two in found


def test_inspect_warns_of_a_model_given_twice_in_another_element_type(triple: Triple) -> None:
    write_tensors(triple["secondary"], {name: t.half() for name, t in read_tensors(triple["primary"]).items()})
    assert any("primary and secondary are equal on all" in text for text in warned(triple))


def test_inspect_warns_of_sources_that_were_not_trained_from_base(triple: Triple) -> None:
    torch.manual_seed(3)
    write_tensors(triple["base"], {name: torch.randn(t.shape) for name, t in read_tensors(triple["base"]).items()})
    assert any("primary and secondary were hardly trained from this base" in text for text in warned(triple))


@pytest.mark.parametrize("parameters", [{"k": 0}, {"lam": 1}, {"alpha": 0}], ids=str)
def test_inspect_warns_of_parameters_that_change_next_to_nothing(
    shared_triple: Triple, merged: Path, parameters: dict[str, float]
) -> None:
    for output in (None, merged):
        assert any("the merge changes next to nothing" in text for text in warned(shared_triple, output, **parameters))


BREAKAGES: dict[str, dict[str, int]] = {
    "vocab_size off by one": {"vocab_size": 1},
    "a decoder layer too many": {"decoder_layers": 1},
    "max_target_positions off by two": {"max_target_positions": -2},
}


@pytest.mark.parametrize("sizes", BREAKAGES.values(), ids=BREAKAGES)
def test_inspect_warns_of_a_primary_that_a_merge_refuses(triple: Triple, sizes: dict[str, int], tmp_path: Path) -> None:
    config = triple["primary"] / "config.json"
    before = json.loads(config.read_text(encoding="utf-8"))
    hsa.merge(**triple, output=tmp_path / "out", sync=False)
    edit_json(config, **{key: before[key] + more for key, more in sizes.items()})
    with pytest.raises(hsa.MismatchError) as refused:
        hsa.merge(**triple, output=tmp_path / "other", sync=False)
    expected = [f"a merge would refuse these sources: {refused.value}"]
    assert next(iter(sizes)) in expected[0]
    assert warned(triple) == expected
    assert warned(triple, tmp_path / "out") == expected


def test_inspect_says_nothing_of_sound_sources(sound: Triple, tmp_path: Path) -> None:
    assert warned(sound) == []
    hsa.merge(**sound, output=tmp_path / "out", sync=False)
    assert warned(sound, tmp_path / "out") == []


def test_the_command_shows_the_warnings_of_a_merge(triple: Triple) -> None:
    swapped = {**triple, "base": triple["primary"], "primary": triple["base"]}
    edit_json(swapped["primary"] / "config.json", vocab_size=5)
    done = run_hsa("inspect", *(f"--{role}={path}" for role, path in swapped.items()), "--no-energy", "--json")
    assert done.returncode == 0, done.stderr
    refusal, exchanged = done.stderr.splitlines()
    assert refusal.startswith("hsa: warning: a merge would refuse these sources: primary ")
    assert "vocab_size 5" in refusal
    assert exchanged.startswith("hsa: warning: secondary is nearer to primary than to base")
    assert [f"hsa: warning: {text}" for text in json.loads(done.stdout)["warnings"]] == [refusal, exchanged]


def test_every_format_shows_sources_that_a_merge_would_warn_of(triple: Triple) -> None:
    swapped = {**triple, "base": triple["primary"], "primary": triple["base"]}
    edit_json(swapped["primary"] / "config.json", vocab_size=5)
    found = hsa.inspect(**swapped)
    assert len(found.warnings) == 2
    assert json.loads(json.dumps(found.as_dict()))["warnings"] == list(found.warnings)
    assert len(csv_file.render(found).splitlines()) == found.total_heads + 1
    assert page.render(found).count(b"exchanged") >= 1
    assert max(map(len, table.render(found).splitlines())) <= 80
