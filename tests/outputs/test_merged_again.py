"""Merges that are merged again are told, and what only looks like one is not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import merge_arguments, read_tensors, run_hsa
from warned_merges import EVERY, random_like, rewritten, warnings_of

import hsa

pytestmark = pytest.mark.long

Triple = Mapping[str, Path]


@pytest.fixture(scope="module", params=["made-up", "real"])
def triple(request: pytest.FixtureRequest, shared_triple: Triple) -> Triple:
    """A made-up triple, and the real one where there is one."""
    return shared_triple if request.param == "made-up" else dict(request.getfixturevalue("real_weights"))


@pytest.fixture(scope="module", params=["made-up", "real"])
def whole_triple(request: pytest.FixtureRequest, shared_triple: Triple) -> Triple:
    """The same with the small files of real models."""
    return shared_triple if request.param == "made-up" else dict(request.getfixturevalue("real"))


BASE_IS_A_MERGE = "base is an output of hsa"
AGAIN = "was merged from"


def merged(triple: Triple, output: Path, **parameters: Any) -> Path:
    return hsa.merge(**triple, output=output, sync=False, **parameters).output


@pytest.mark.parametrize("way", ["merge", "patch", "sweep", "full sweep", "merger"])
@pytest.mark.parametrize(
    ("again", "expected"),
    [
        ({"primary": "r1o"}, r"primary was merged from secondary already: .* names secondary's model as the secondary"),
        ({"secondary": "r1o"}, r"secondary was merged from primary already: .* names primary's model as the primary"),
        (
            {"primary": "secondary", "secondary": "r1o"},
            r"secondary was merged from primary already: .* names primary's model as the secondary",
        ),
        (
            {"base": "primary", "primary": "r1o", "secondary": "base"},
            r"primary was merged from base already: .* as the primary of that merge; give the pretrained model as base",
        ),
        ({"base": "r1o"}, BASE_IS_A_MERGE),
    ],
    ids=["primary", "secondary", "exchanged", "base a fine-tune", "base"],
)
def test_a_merge_that_is_merged_again_is_told(
    triple: Triple, again: Mapping[str, str], expected: str, way: str, tmp_path: Path
) -> None:
    known = {**triple, "r1o": merged(triple, tmp_path / "r1o")}
    sources = {role: known[again.get(role, role)] for role in triple}
    if way == "merger":
        with pytest.warns(hsa.HsaWarning, match=expected):
            told = hsa.Merger(**sources).warnings
    elif way == "merge":
        told = list(hsa.merge(**sources, output=tmp_path / "out", sync=False).warnings)
    elif way == "patch":
        told = list(hsa.merge_patch(**sources, output=tmp_path / "out.safetensors", sync=False).warnings)
    else:
        full = way == "full sweep"
        told = list(hsa.sweep(**sources, output=tmp_path / "out", lam=[0.2, 0.5], full=full, sync=False).warnings)
    assert sum(bool(re.search(expected, text)) for text in told) == 1, told


def test_a_merge_of_merges_with_a_further_fine_tune_is_not_told(triple: Triple, tmp_path: Path) -> None:
    """Chained merges, on either side, whatever the presets."""
    third = rewritten(
        triple["secondary"], tmp_path / "third", lambda held: third_of(held, read_tensors(triple["base"]))
    )
    first = merged(triple, tmp_path / "first")
    other = merged(triple, tmp_path / "other", targets="attention-all")
    for made in (first, other):
        for sources in ({"primary": made, "secondary": third}, {"primary": third, "secondary": made}):
            found = warnings_of({**triple, **sources}, tmp_path / "out", overwrite=True)
            assert AGAIN not in found and BASE_IS_A_MERGE not in found, found
            told = hsa.Merger(**{**triple, **sources}).warnings
            assert not any(AGAIN in text or BASE_IS_A_MERGE in text for text in told), told


def third_of(held: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Another fine-tune: the task vectors with their columns reversed."""
    return {
        name: (base[name].float() + (tensor.float() - base[name].float()).flip(-1)).to(tensor.dtype)
        if name.endswith(EVERY)
        else tensor
        for name, tensor in held.items()
    }


@pytest.mark.parametrize(
    ("first_id", "second_id", "told"),
    [
        ("org/children", "org/children", True),
        ("org/children@a", "org/children@a", True),
        ("org/children@a", "org/children@b", False),
        ("org/children", "org/adults", False),
        (None, None, False),
    ],
)
def test_merges_of_other_presets_are_compared_by_ids_on_the_hub(
    shared_triple: Triple, first_id: str | None, second_id: str | None, told: bool, tmp_path: Path
) -> None:
    made = merged(shared_triple, tmp_path / "r1o", targets="attention-all", secondary_id=first_id)
    found = warnings_of({**shared_triple, "primary": made}, tmp_path / "out", secondary_id=second_id)
    assert ("primary was merged from secondary already" in found) == told, found


def test_a_damaged_record_of_a_source_tells_nothing(shared_triple: Triple, tmp_path: Path) -> None:
    made = merged(shared_triple, tmp_path / "r1o")
    place = made / "hsa_merge.json"
    whole = place.read_text()
    for damaged in ("", "[]", "{" * 100_000, whole.replace('"keep"', '"kept"', 1), whole[:-9]):
        place.write_text(damaged)
        for role in ("base", "primary"):
            found = warnings_of({**shared_triple, role: made}, tmp_path / "out", overwrite=True)
            assert AGAIN not in found and BASE_IS_A_MERGE not in found, found


def test_strict_refuses_a_base_that_is_a_merge_before_it_merges(shared_triple: Triple, tmp_path: Path) -> None:
    made = merged(shared_triple, tmp_path / "r1o")
    arguments = merge_arguments({**shared_triple, "base": made}, tmp_path / "out", "--strict", "--dry-run")
    done = run_hsa(*arguments)
    assert done.returncode == 2 and BASE_IS_A_MERGE in done.stderr, done.stderr
    with pytest.raises(hsa.StrictError, match=AGAIN):
        hsa.merge(**{**shared_triple, "primary": made}, output=tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()


def test_no_hint_contradicts_a_warning_of_the_sources(whole_triple: Triple, tmp_path: Path) -> None:
    made = merged(whole_triple, tmp_path / "r1o")
    stranger = rewritten(whole_triple["secondary"], tmp_path / "stranger", random_like(4))
    for changed in (
        {"secondary": whole_triple["primary"]},
        {"base": whole_triple["primary"], "primary": whole_triple["base"]},
        {"secondary": stranger},
        {"primary": made},
        {"base": made},
    ):
        report = hsa.merge(**{**whole_triple, **changed}, output=tmp_path / "out", sync=False, overwrite=True)
        assert report.warnings and report.hint is None and report.as_dict()["hint"] is None, changed
        patch = hsa.merge_patch(
            **{**whole_triple, **changed}, output=tmp_path / "p.safetensors", sync=False, overwrite=True
        )
        assert patch.hint is None, changed
    assert hsa.merge(**whole_triple, output=tmp_path / "out", sync=False, overwrite=True).hint is not None
