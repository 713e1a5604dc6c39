"""`hsa verify`: a sound output is sound, one flipped bit anywhere is found, and requests that cannot be met."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forged_outputs import COPIED, TARGET, WEIGHTS, Triple, flip, forge, named, told
from helpers import merge_arguments, read_safetensors, run_hsa
from hypothesis import given, settings
from hypothesis import strategies as st

import hsa
from hsa.architectures.whisper import WHISPER
from hsa.errors import RequestError, SourceError
from hsa.system.manifest import PROVENANCE
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

# Sound -----------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "shards": {"max_shard_size": "200KB"},
    "no digests": {"digest": False},
    "float16": {"dtype": "float16"},
    "reference": {"numerics": "reference"},
    "reference read as float32": {"numerics": "reference", "load_dtype": "float32"},
    "every projection": {"targets": "attention-all", "k": 40},
    "nothing kept": {"k": 0},
    "everything kept": {"k": 1, "lam": 0, "alpha": 3.5},
    "scales": {"attention_scale": 0.7, "non_attention_scale": 1.25},
    "other heads": {"num_heads": 2, "num_layers": 7},
    "other assets, card, threads": {"assets_from": "base", "card": {"license": "mit"}, "threads": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_sound_output(shared_triple: Triple, tmp_path: Path, way: str) -> None:
    output = tmp_path / "out"
    merged = hsa.merge(**shared_triple, output=output, sync=False, **WAYS[way])
    seen: list[tuple[int, int]] = []
    plain = hsa.verify(output, progress=lambda done, total: seen.append((done, total)))
    assert plain.problems == () and plain.ok and not plain.sources_compared
    assert plain.output == output and plain.files == len(os.listdir(output))
    assert seen[-1][0] == seen[-1][1] > 0
    assert any("whole-file digests" in note for note in plain.notes) == (way == "no digests")
    full = hsa.verify(output, **shared_triple)
    assert told(full) == "" and full.ok and full.sources_compared
    assert full.bytes_read >= plain.bytes_read + merged.bytes_read
    document = full.as_dict()
    assert document["ok"] is True and document["problems"] == [] and document["parameters"]["k"] is not None
    assert document["selected_heads"] == merged.selected_heads and document["total_heads"] == merged.total_heads
    json.dumps(document)


def test_parameters_for_each_tensor(shared_triple: Triple, tmp_path: Path) -> None:
    names = list(WHISPER.expected_targets({"encoder": 2, "decoder": 2}, "encoder-qkv"))
    names += [name.replace("weight", "bias") for name in names if ".k_proj" not in name]
    k = {name: number / len(names) for number, name in enumerate(sorted(names))}
    hsa.merge(**shared_triple, output=tmp_path / "out", k=k)
    assert told(hsa.verify(tmp_path / "out", **shared_triple)) == ""


def test_names_without_the_prefix(tmp_path: Path) -> None:
    triple = write_triple(tmp_path / "triple", SHAPES["test"], prefix="")
    hsa.merge(**triple, output=tmp_path / "out")
    assert told(hsa.verify(tmp_path / "out", **triple)) == ""


def test_what_people_lay_beside_a_model_is_a_note(out: Path) -> None:
    (out / ".git").mkdir()
    for name in (".gitattributes", "LICENSE", "wer.csv", "wer.json", "Notes.MD"):
        (out / name).write_text("x")
    report = hsa.verify(out)
    assert report.ok
    assert [note for note in report.notes if "were not looked at" in note] == [
        "6 files beside the output were not looked at, such as '.git'"
    ]


def test_the_cache_of_the_hub(merged: Path, tmp_path: Path) -> None:
    """Its snapshots are links into the repository's blobs; no other link is followed."""
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copytree(merged, repo / "blobs")
    for name in os.listdir(merged):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert told(hsa.verify(snapshot)) == ""
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(merged / "config.json")
    report = hsa.verify(snapshot)
    assert named(report) == {"config.json"} and "leads out" in told(report)


# One bit ---------------------------------------------------------------------------------------------------


def test_one_flipped_bit_anywhere(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = Path(shutil.copytree(merged, tmp_path_factory.mktemp("flip") / "out"))
    files = sorted(os.listdir(copy))
    assert len(files) >= 8
    tried = 0

    @settings(max_examples=250, deadline=None, derandomize=False)
    @given(st.sampled_from(files), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
    def check(name: str, share: float, bit: int) -> None:
        nonlocal tried
        path = copy / name
        position = int(share * path.stat().st_size)
        flip(path, position, bit)
        try:
            report = hsa.verify(copy, threads=2)
            assert not report.ok and name in named(report), (name, position, bit)
            tried += 1
        finally:
            flip(path, position, bit)

    check()
    assert tried >= 250
    assert hsa.verify(copy).ok


def test_one_flipped_bit_in_places_all_over_every_file(out: Path) -> None:
    for name in sorted(os.listdir(out)):
        size = (out / name).stat().st_size
        for number, position in enumerate([*range(0, size, max(1, size // 24)), size - 1]):
            flip(out / name, position, number % 8)
            report = hsa.verify(out, threads=1)
            assert name in named(report), (name, position, number % 8)
            flip(out / name, position, number % 8)
    assert hsa.verify(out).ok


@pytest.mark.parametrize("tensor", [TARGET, COPIED])
def test_one_flipped_bit_that_the_provenance_was_made_to_fit(single: Path, shared_triple: Triple, tensor: str) -> None:
    """Lowest bit of the last element: only the sources tell."""
    header, data = read_safetensors(single / WEIGHTS)
    stop = header[tensor]["data_offsets"][1]
    where = (single / WEIGHTS).stat().st_size - len(data) + stop - 4
    flip(single / WEIGHTS, where, 0)
    assert not hsa.verify(single).ok
    forge(single)
    assert hsa.verify(single).ok
    report = hsa.verify(single, **shared_triple)
    assert report.sources_compared
    (found,) = [problem.what for problem in report.problems if problem.file == WEIGHTS]
    assert tensor in found and "1 byte is not what the sources give" in found and f"byte {where}:" in found
    if tensor == TARGET:
        heads = json.loads((single / PROVENANCE).read_text())["targets"][TARGET]["groups"]
        assert f"head {heads - 1}:" in found


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), data=st.data())
def test_any_flipped_bit_of_a_target_is_found_with_the_sources(
    merged: Path, shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory, share: float, bit: int, data: Any
) -> None:
    out = Path(shutil.copytree(merged, tmp_path_factory.mktemp("flip") / "out"))
    targets = sorted(json.loads((out / PROVENANCE).read_text())["targets"])
    tensor = data.draw(st.sampled_from(targets))
    (path,) = [p for p in out.glob("*.safetensors") if tensor in read_safetensors(p)[0]]
    header, payload = read_safetensors(path)
    start, stop = header[tensor]["data_offsets"]
    flip(path, path.stat().st_size - len(payload) + start + int(share * (stop - start)), bit)
    forge(out)
    report = hsa.verify(out, **shared_triple)
    assert path.name in named(report) and tensor in told(report)
    shutil.rmtree(out)


def test_small_files_that_the_provenance_was_made_to_fit(out: Path, shared_triple: Triple) -> None:
    names = [name for name in os.listdir(out) if not name.endswith(".safetensors") and name != PROVENANCE]
    for name in names:
        before, kept = (out / name).read_bytes(), (out / PROVENANCE).read_bytes()
        (out / name).write_bytes(before + b"\n")
        forge(out)
        assert hsa.verify(out).ok, name
        report = hsa.verify(out, **shared_triple)
        assert named(report) >= {name, PROVENANCE} - ({name} if name == PROVENANCE else set()), name
        (out / name).write_bytes(before)
        (out / PROVENANCE).write_bytes(kept)
    assert len(names) >= 5
    assert hsa.verify(out, **shared_triple).ok


# Another checkpoint ----------------------------------------------------------------------------------------


def test_a_checkpoint_that_hsa_did_not_write_is_called_that(shared_triple: Triple) -> None:
    report = hsa.verify(shared_triple["primary"])
    assert named(report) == {PROVENANCE} and "hsa did not write this checkpoint" in told(report)
    assert "give an output of hsa" in told(report)
    done = run_hsa("verify", shared_triple["primary"])
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "hsa did not write" in done.stderr


def test_a_directory_without_anything_of_hsa_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        RequestError, match="hsa did not write it; give an output, a patch, or the directory of a sweep"
    ):
        hsa.verify(tmp_path)


# Requests --------------------------------------------------------------------------------------------------


def test_bad_requests(out: Path, shared_triple: Triple, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "nothing", tmp_path / "file", "", "a\0b"):
        with pytest.raises(RequestError):
            hsa.verify(wrong)
    with pytest.raises(RequestError, match="secondary is not given"):
        hsa.verify(out, base=shared_triple["base"], primary=shared_triple["primary"])
    with pytest.raises(RequestError, match="threads"):
        hsa.verify(out, threads=0)
    with pytest.raises(SourceError, match="base"):
        hsa.verify(out, **{**shared_triple, "base": tmp_path / "nothing"})


def test_the_command_line(out: Path, shared_triple: Triple) -> None:
    sources = merge_arguments(shared_triple, out)[1:4]
    done = run_hsa("verify", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"{out}: sound" and "not compared with the sources" in done.stdout
    done = run_hsa("verify", str(out), "--sources", *sources)
    assert done.returncode == 0 and "every weight recomputed" in done.stdout
    (out / "config.json").write_text("{")
    (out / "stray.py").touch()
    done = run_hsa("verify", str(out))
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and all(line.startswith("hsa: problem: ") for line in lines)
    assert any("config.json: its BLAKE3" in line for line in lines) and any("stray.py" in line for line in lines)
    done = run_hsa("verify", str(out), "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr, found["ok"]) == (2, "", False)
    assert len(found["problems"]) == len(lines)
    assert {"file", "what"} == set(found["problems"][0])
    assert run_hsa("verify", str(out), "--quiet").stdout == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "Missing argument"),
        (("nowhere",), "cannot be found"),
        (("nowhere", "--sources"), "add --base, --primary, --secondary"),
        (("nowhere", "--base=b"), "add --sources"),
        (("nowhere", "--threads=900"), "threads"),
    ],
)
def test_usage_errors_are_one_line(arguments: tuple[str, ...], text: str) -> None:
    done = run_hsa("verify", *arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and text in done.stderr, done.stderr


# The key set -----------------------------------------------------------------------------------------------

CONFIGS = [
    pytest.param({}, id="the defaults of transformers"),
    pytest.param({"tie_word_embeddings": False}, id="untied"),
    pytest.param(
        {
            "d_model": 24,
            "encoder_layers": 1,
            "decoder_layers": 3,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 3,
            "encoder_ffn_dim": 10,
            "decoder_ffn_dim": 14,
            "num_mel_bins": 128,
            "max_source_positions": 11,
            "max_target_positions": 13,
            "vocab_size": 40,
            "pad_token_id": 3,
        },
        id="every size its own",
    ),
]


@pytest.mark.parametrize("changes", CONFIGS)
def test_the_key_set_is_that_of_transformers(changes: dict[str, Any]) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(**changes)
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    theirs = {WHISPER.canonical(name): tuple(value.shape) for name, value in model.state_dict().items()}
    if changes.get("tie_word_embeddings", True) is not False:
        theirs.pop(WHISPER.tie.output)
    assert {found.name: found.shape for found in WHISPER.expected(config.to_dict(), "here")} == theirs
    for key, value in WHISPER.defaults.items():
        assert getattr(WhisperConfig(), key) == value


# Real weights ----------------------------------------------------------------------------------------------


def test_real_weights(real: Triple, tmp_path: Path) -> None:
    output = tmp_path / "out"
    hsa.merge(**real, output=output, sync=False)
    assert told(hsa.verify(output, **real)) == ""
    flip(output / WEIGHTS, (output / WEIGHTS).stat().st_size // 2, 3)
    assert named(hsa.verify(output)) == {WEIGHTS}
    forge(output)
    assert WEIGHTS in named(hsa.verify(output, **real))
