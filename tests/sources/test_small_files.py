"""The small files of an output: where each comes from, and what is never copied."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from helpers import edit_json, merge_arguments, read_tensors, run_hsa, snapshot, write_adapter

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
"""Files of a Whisper's processor."""

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
SOUND = {
    "preprocessor_config.json": b'{"feature_size": 80, "chunk_length": 1, "note": "TEXT"}',
    "processor_config.json": b'{"processor_class": "WhisperProcessor", "note": "TEXT"}',
    "tokenizer.json": b'{"added_tokens": [{"id": 2, "content": "TEXT"}], "model": {"vocab": {"a": 0, "b": 1}}}',
    "tokenizer_config.json": b'{"note": "TEXT"}',
    "vocab.json": b'{"a": 0, "b": 1, "TEXT": 2}',
    "merges.txt": b"#version: 0.2 TEXT\na b\n",
    "normalizer.json": b'{"TEXT": "b"}',
    "special_tokens_map.json": b'{"note": "TEXT"}',
    "added_tokens.json": b'{"TEXT": 3}',
}
"""Small files that can be loaded; TEXT says whose they are."""

NESTED = b'{"feature_extractor": {"feature_size": 80, "chunk_length": 1, "dither": 0.25}}'
"""A processor_config.json as transformers 5 saves it."""

WRITTEN = ("config.json", "generation_config.json", "model.safetensors", "README.md", "hsa_merge.json")


def merge(triple: Triple, output: Path, **options: Any) -> hsa.MergeReport:
    return hsa.merge(**triple, output=output, sync=False, **options)


def strip(directory: Path) -> None:
    for name in PROCESSOR_FILES:
        (directory / name).unlink(missing_ok=True)


def give(directory: Path, text: str, names: Iterable[str]) -> None:
    """Sound small files in a directory, which differ from those of every other `text`."""
    for name in names:
        (directory / name).write_bytes(SOUND[name].replace(b"TEXT", text.encode()))


def wrote(output: Path, names: Iterable[str]) -> dict[str, str]:
    """From which source an output's files are, by their `TEXT`."""
    found = {}
    for name in names:
        if (output / name).exists():
            data = (output / name).read_bytes()
            found[name] = next(t for t in ("primary", "secondary", "base", "above") if t.encode() in data)
    return found


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


GROUPS = {
    "tokenizer files": ("vocab.json", "merges.txt"),
    "tokenizer file": ("tokenizer.json",),
    "feature extractor file": ("preprocessor_config.json",),
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("role", ["primary", "secondary", "base"])
def test_each_group_is_taken_whole_from_the_first_place_that_has_it(
    nested: Triple, role: str, group: str, tmp_path: Path
) -> None:
    names = GROUPS[group]
    chosen = nested[role]
    places = {role: chosen, f"the directory above {role}": chosen.parent, "base": nested["base"]}
    for label, place in places.items():
        give(place, label.split()[-1], names)
    for other in {"primary", "secondary"} - {role}:  # never looked at
        give(nested[other], "wrong", names)
        give(nested[other].parent, "wrong", names)
    for number, (label, place) in enumerate(places.items()):
        if role == "base" and label == "base" and number:
            continue
        report = merge(nested, tmp_path / str(number), assets_from=role)
        for name in names:
            assert (tmp_path / str(number) / name).read_bytes() == (place / name).read_bytes()
        notes = [note for note in report.notes if " from " in note]
        verb = "come" if len(names) > 1 else "comes"
        told = f"{group} ({', '.join(names)}) {verb} from {label}, for {role} has none"
        assert notes == ([] if number == 0 else [told])
        for name in names:
            (place / name).unlink()
    merge(nested, tmp_path / "none", assets_from=role)
    assert not any((tmp_path / "none" / name).exists() for name in names)


def test_a_tokenizer_with_added_tokens_is_not_mixed_with_bases_tokenizer_json(triple: Triple, tmp_path: Path) -> None:
    """Primary has a vocabulary and merges, base a tokenizer.json: faster-whisper would read base's alone."""
    give(triple["base"], "base", ["tokenizer.json"])
    report = merge(triple, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert not any("tokenizer" in note for note in report.notes)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"):
        assert (tmp_path / "out" / name).read_bytes() == (triple["primary"] / name).read_bytes()


def test_a_tokenizer_json_is_not_mixed_with_bases_vocabulary(triple: Triple, tmp_path: Path) -> None:
    """The reverse: transformers 4 would read base's vocab.json."""
    strip(triple["primary"])
    give(triple["primary"], "primary", ["tokenizer.json", "preprocessor_config.json"])
    merge(triple, tmp_path / "out")
    assert wrote(tmp_path / "out", PROCESSOR_FILES) == {
        "tokenizer.json": "primary",
        "preprocessor_config.json": "primary",
    }


@pytest.mark.parametrize(
    ("left", "loud"),
    [(["vocab.json"], True), (["added_tokens.json"], True), (["merges.txt", "tokenizer_config.json"], False)],
)
def test_files_of_an_incomplete_tokenizer_are_left_out_and_named(
    nested: Triple, left: list[str], loud: bool, tmp_path: Path
) -> None:
    give(nested["primary"], "primary", left)
    give(nested["base"], "base", ["vocab.json", "merges.txt", "normalizer.json"])
    done = run_hsa(*merge_arguments(nested, tmp_path / "out", "--no-sync"))
    assert done.returncode == 0
    assert set(wrote(tmp_path / "out", PROCESSOR_FILES).values()) == {"base"}
    names = sorted(left, key=PROCESSOR_FILES.index)
    (line,) = [line for line in done.stderr.splitlines() if "left out" in line]
    assert line.startswith(f"hsa: {'warning' if loud else 'note'}: {', '.join(names)} of primary")
    assert "note: tokenizer files (vocab.json, merges.txt, normalizer.json) come from base" in done.stderr


def test_one_line_says_where_nine_files_come_from(triple: Triple, tmp_path: Path) -> None:
    strip(triple["primary"])
    give(triple["base"], "base", set(SOUND) - {"processor_config.json"})
    done = run_hsa(*merge_arguments(triple, tmp_path / "out", "--no-sync"))
    assert len([line for line in done.stderr.splitlines() if " from base" in line]) == 2, done.stderr


def test_a_processor_comes_with_its_own_feature_extractor(triple: Triple, tmp_path: Path) -> None:
    """As transformers 5 saves it; base is an older download, with another feature extractor."""
    strip(triple["primary"])
    give(triple["primary"], "primary", ["tokenizer.json"])
    (triple["primary"] / "processor_config.json").write_bytes(NESTED)
    report = merge(triple, tmp_path / "out")
    assert (tmp_path / "out" / "processor_config.json").read_bytes() == NESTED
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
    (note,) = [note for note in report.notes if "left out" in note]
    assert note.startswith("preprocessor_config.json of base is left out")


def test_bases_processor_does_not_win_over_primarys_feature_extractor(triple: Triple, tmp_path: Path) -> None:
    """transformers 5 reads the feature extractor within processor_config.json first."""
    (triple["base"] / "processor_config.json").write_bytes(NESTED)
    report = merge(triple, tmp_path / "out")
    assert not (tmp_path / "out" / "processor_config.json").exists()
    (note,) = [note for note in report.notes if "left out" in note]
    assert note.startswith("processor_config.json of base is left out")


def test_a_processor_without_a_feature_extractor_gives_way_to_one_with_it(triple: Triple, tmp_path: Path) -> None:
    (triple["primary"] / "preprocessor_config.json").unlink()
    (triple["base"] / "preprocessor_config.json").unlink()
    give(triple["primary"], "primary", ["processor_config.json"])
    (triple["base"] / "processor_config.json").write_bytes(NESTED)
    report = merge(triple, tmp_path / "out")
    assert (tmp_path / "out" / "processor_config.json").read_bytes() == NESTED
    assert any(note.startswith("processor_config.json of primary is left out") for note in report.notes)


@pytest.mark.parametrize("role", ["primary", "base"])
def test_a_processor_and_a_feature_extractor_may_come_from_two_sources(
    triple: Triple, role: str, tmp_path: Path
) -> None:
    other = "base" if role == "primary" else "primary"
    (triple[role] / "preprocessor_config.json").unlink()
    give(triple[role], role, ["processor_config.json"])
    merge(triple, tmp_path / "out")
    for name, giver in (("processor_config.json", role), ("preprocessor_config.json", other)):
        assert (tmp_path / "out" / name).read_bytes() == (triple[giver] / name).read_bytes()


def test_a_processor_for_no_feature_extractor_is_left_out(nested: Triple, tmp_path: Path) -> None:
    give(nested["primary"], "primary", ["processor_config.json"])
    report = merge(nested, tmp_path / "out")
    assert not (tmp_path / "out" / "processor_config.json").exists()
    assert any("processor_config.json of primary is left out" in note for note in report.notes)
    assert "feature extractor" in report.warnings[0]


def test_bytes_are_copied_as_they_are(triple: Triple, tmp_path: Path) -> None:
    odd = b"#version: 0.2\r\na b\r\n\xc4\xa0 \xc4\xa0"
    (triple["primary"] / "merges.txt").write_bytes(odd)
    (triple["primary"] / "vocab.json").write_bytes(b'\r\n {"b":1,\t"b":1, "a":0}')
    merge(triple, tmp_path / "out")
    for name in ("merges.txt", "vocab.json", "config.json", "generation_config.json", "tokenizer_config.json"):
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


@pytest.mark.parametrize(
    ("key", "value"),
    [("suppress_tokens", []), ("begin_suppress_tokens", [11]), ("max_length", 30), ("num_beams", 5)],
)
def test_bases_generation_config_does_not_win_over_settings_in_primarys_config(
    triple: Triple, key: str, value: object, tmp_path: Path
) -> None:
    """As transformers before 4.26 saved them; the output decodes as primary does."""
    from transformers import WhisperForConditionalGeneration

    (triple["primary"] / "generation_config.json").unlink()
    edit_json(triple["primary"] / "config.json", **{key: value})
    report = merge(triple, tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").exists()
    (note,) = [note for note in report.notes if "generation_config" in note]
    assert note.startswith("generation_config.json of base is left out") and f"sets {key} in another way" in note
    settings = [
        getattr(WhisperForConditionalGeneration.from_pretrained(place).generation_config, key)
        for place in (triple["primary"], tmp_path / "out")
    ]
    assert settings[0] == settings[1]


def test_an_adapters_generation_config_is_bases(triple: Triple, tmp_path: Path) -> None:
    """An adapter's config.json is base's, so base's settings are its own, whatever that config.json says."""
    tensors = read_tensors(triple["primary"])
    shutil.rmtree(triple["primary"])
    write_adapter(triple["primary"], {n: t for n, t in tensors.items() if n.endswith("layers.0.fc1.weight")})
    edit_json(triple["base"] / "config.json", max_length=30)
    merge(triple, tmp_path / "out")
    own = (triple["base"] / "generation_config.json").read_bytes()
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == own


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
        (("processor_config.json", "tokenizer.json"), "feature extractor"),
        (("preprocessor_config.json", "tokenizer.json"), None),
        (("preprocessor_config.json", "vocab.json", "tokenizer_config.json"), "tokenizer"),
    ],
)
def test_the_warning_names_what_is_lacking(
    nested: Triple, present: tuple[str, ...], lacking: str | None, tmp_path: Path
) -> None:
    give(nested["base"], "base", present)
    warnings = [w for w in merge(nested, tmp_path / "out").warnings if "left out" not in w]
    if lacking is None:
        assert warnings == []
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
