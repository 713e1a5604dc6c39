"""The small files of an output: where each comes from, and what is never copied."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import edit_json, merge_arguments, run_hsa, snapshot

import hsa

Triple = dict[str, Path]
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""SPEC section 3."""

TRAINING_STATE = (
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
    "rng_state.pth",
    "rng_state_0.pth",
    "scaler.pt",
    "all_results.json",
    "train_results.json",
    "run.log",
    "pytorch_model.bin",
    "model.onnx",
    "README.md",
    ".gitattributes",
    "adapter_model.safetensors",
    "unrelated.txt",
    "runs/events.out.tfevents.1",
    "global_step10/zero_pp_rank_0.pt",
)
WRITTEN = ("config.json", "generation_config.json", "model.safetensors", "README.md", "hsa_merge.json")


def merge(triple: Triple, output: Path, **options: Any) -> hsa.MergeReport:
    return hsa.merge(**triple, output=output, sync=False, **options)


def strip(directory: Path) -> None:
    for name in PROCESSOR_FILES:
        (directory / name).unlink(missing_ok=True)


def fill(directory: Path, text: str, names: tuple[str, ...] = PROCESSOR_FILES) -> None:
    for name in names:
        (directory / name).write_text(f'{{"from": "{text}", "file": "{name}"}}\n', encoding="utf-8")


@pytest.fixture
def nested(triple: Triple, tmp_path: Path) -> Triple:
    """The triple in the layout of training runs (run/checkpoint-10), without any processor file."""
    moved = {}
    for role, path in triple.items():
        moved[role] = tmp_path / "runs" / role / "checkpoint-10"
        shutil.copytree(path, moved[role])
        strip(moved[role])
    return moved


# --- where each file comes from -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSOR_FILES)
@pytest.mark.parametrize("role", ["primary", "secondary", "base"])
def test_each_file_is_taken_from_the_first_place_that_has_it(
    nested: Triple, role: str, name: str, tmp_path: Path
) -> None:
    chosen = nested[role]
    places = {role: chosen, f"the directory above {role}": chosen.parent, "base": nested["base"]}
    for label, place in places.items():
        fill(place, label)
    for other in {"primary", "secondary"} - {role}:  # never looked at
        fill(nested[other], "wrong")
        fill(nested[other].parent, "wrong")
    for number, (label, place) in enumerate(places.items()):
        if role == "base" and label == "base" and number:
            continue
        report = merge(nested, tmp_path / str(number), assets_from=role)
        assert (tmp_path / str(number) / name).read_bytes() == (place / name).read_bytes()
        notes = [note for note in report.notes if note.startswith(f"{name} comes from")]
        assert notes == ([] if number == 0 else [f"{name} comes from {label}, for {role} has none"])
        (place / name).unlink()
    merge(nested, tmp_path / "none", assets_from=role)
    assert not (tmp_path / "none" / name).exists()


def test_files_may_come_from_three_places_at_once_and_each_is_said_on_the_console(
    nested: Triple, tmp_path: Path
) -> None:
    fill(nested["primary"], "primary", ("vocab.json",))
    fill(nested["primary"].parent, "above", ("vocab.json", "merges.txt"))
    fill(nested["base"], "base", ("vocab.json", "merges.txt", "normalizer.json"))
    done = run_hsa(*merge_arguments(nested, tmp_path / "out", "--no-sync"))
    assert done.returncode == 0
    written = {
        n: json.loads((tmp_path / "out" / n).read_text())["from"]
        for n in PROCESSOR_FILES
        if (tmp_path / "out" / n).exists()
    }
    assert written == {"vocab.json": "primary", "merges.txt": "above", "normalizer.json": "base"}
    assert "note: merges.txt comes from the directory above primary" in done.stderr
    assert "note: normalizer.json comes from base" in done.stderr
    assert "vocab.json comes" not in done.stderr


def test_bytes_are_copied_as_they_are(triple: Triple, tmp_path: Path) -> None:
    odd = b'\xef\xbb\xbf{"a": 1}\r\n\x00\xff'
    (triple["primary"] / "merges.txt").write_bytes(odd)
    (triple["primary"] / "vocab.json").write_bytes(b"")
    merge(triple, tmp_path / "out")
    assert (tmp_path / "out" / "merges.txt").read_bytes() == odd
    assert (tmp_path / "out" / "vocab.json").read_bytes() == b""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (triple["primary"] / name).read_bytes()


def test_generation_config_is_primarys_else_bases(triple: Triple, tmp_path: Path) -> None:
    for role, path in triple.items():
        edit_json(path / "generation_config.json", note=role)
    report = merge(triple, tmp_path / "own", assets_from="secondary")
    assert json.loads((tmp_path / "own" / "generation_config.json").read_text())["note"] == "primary"
    assert not any("generation_config" in note for note in report.notes)
    (triple["primary"] / "generation_config.json").unlink()
    report = merge(triple, tmp_path / "bases")
    assert json.loads((tmp_path / "bases" / "generation_config.json").read_text())["note"] == "base"
    assert any("generation_config.json comes from base" in note for note in report.notes)
    (triple["base"] / "generation_config.json").unlink()
    merge(triple, tmp_path / "none")
    assert not (tmp_path / "none" / "generation_config.json").exists()


def test_config_is_primarys_wherever_the_processor_comes_from(triple: Triple, tmp_path: Path) -> None:
    edit_json(triple["primary"] / "config.json", note="primary")
    merge(triple, tmp_path / "out", assets_from="base")
    assert (tmp_path / "out" / "config.json").read_bytes() == (triple["primary"] / "config.json").read_bytes()


def test_an_unknown_role_is_refused(triple: Triple, tmp_path: Path) -> None:
    with pytest.raises(hsa.RequestError, match="assets_from"):
        merge(triple, tmp_path / "out", assets_from="tertiary")
    assert not (tmp_path / "out").exists()


# --- nowhere -----------------------------------------------------------------------------------------------------


def test_no_processor_file_anywhere_warns_and_the_result_is_valid(nested: Triple, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    report = merge(nested, tmp_path / "out")
    (warning,) = report.warnings
    assert "feature extractor" in warning and "tokenizer" in warning
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(WRITTEN)
    _, info = WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "out", local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize(
    ("present", "lacking"),
    [
        (("vocab.json", "merges.txt"), "feature extractor"),
        (("preprocessor_config.json",), "tokenizer"),
        (("processor_config.json", "tokenizer.json"), None),
    ],
)
def test_the_warning_names_what_is_lacking(
    nested: Triple, present: tuple[str, ...], lacking: str | None, tmp_path: Path
) -> None:
    fill(nested["base"], "base", present)
    warnings = merge(nested, tmp_path / "out").warnings
    if lacking is None:
        assert warnings == ()
    else:
        (warning,) = warnings
        assert f"no source has {lacking} files" in warning


# --- what is never copied ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numerics", ["exact", "reference"])
def test_training_state_and_strangers_are_never_copied(triple: Triple, numerics: str, tmp_path: Path) -> None:
    for place in (*triple.values(), triple["primary"].parent):
        for name in TRAINING_STATE:
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(b"state of a training run")
    merge(triple, tmp_path / "out", numerics=numerics)
    held = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert held <= {*WRITTEN, *PROCESSOR_FILES}
    assert held >= {*WRITTEN, "vocab.json", "preprocessor_config.json"}
    assert b"state of a training run" not in (tmp_path / "out" / "README.md").read_bytes()


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vocab.json", "generation_config.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("role", ["primary", "base"])
def test_a_link_that_leads_out_is_refused(triple: Triple, role: str, name: str, tmp_path: Path) -> None:
    if role == "base" and name in (
        "vocab.json",
        "generation_config.json",
    ):  # base's are only looked at where these lack
        (triple["primary"] / name).unlink()
    outside = tmp_path / "outside"
    shutil.move(triple[role] / name, outside)
    (triple[role] / name).symlink_to(outside)
    before = snapshot(tmp_path)
    with pytest.raises(hsa.SourceError, match=rf"{role}.*{name} is a link that leads out"):
        merge(triple, tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_a_link_out_of_the_directory_above_is_refused(nested: Triple, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("{}")
    (nested["primary"].parent / "vocab.json").symlink_to(tmp_path / "outside")
    with pytest.raises(hsa.SourceError, match=r"vocab\.json is a link that leads out"):
        merge(nested, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_within_the_directory_is_followed(triple: Triple, tmp_path: Path) -> None:
    path = triple["primary"]
    text = (path / "vocab.json").read_bytes()
    (path / "vocab.json").rename(path / "real.json")
    (path / "vocab.json").symlink_to("real.json")
    merge(triple, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.json").read_bytes() == text
    assert not (tmp_path / "out" / "vocab.json").is_symlink()


def test_a_hub_cache_snapshot_is_read_through_its_links(triple: Triple, tmp_path: Path) -> None:
    """The cache keeps files under blobs/ and links to them from snapshots/REVISION."""
    cache = tmp_path / "hub" / "models--org--whisper-x"
    snapshot_path = cache / "snapshots" / "0123abc"
    snapshot_path.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(triple["base"].iterdir())):
        shutil.move(file, cache / "blobs" / str(number))
        (snapshot_path / file.name).symlink_to(Path(os.pardir, os.pardir, "blobs", str(number)))
    strip(triple["primary"])
    merge({**triple, "base": snapshot_path}, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.json").read_bytes() == (snapshot_path / "vocab.json").read_bytes()
    source = json.loads((tmp_path / "out" / "hsa_merge.json").read_text())["sources"]["base"]
    assert (source["id"], source["revision"]) == ("org/whisper-x", "0123abc")


def test_written_files_have_the_ordinary_mode_and_are_no_links(triple: Triple, tmp_path: Path) -> None:
    for path in triple["primary"].iterdir():
        path.chmod(0o600)
    before = os.umask(0o027)
    try:
        merge(triple, tmp_path / "out")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {"0o640"}
    assert oct((tmp_path / "out").stat().st_mode & 0o777) == "0o750"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
