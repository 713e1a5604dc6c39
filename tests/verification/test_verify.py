"""`hsa verify`: what it finds in a damaged, changed or forged output, and that a sound one is sound."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from helpers import edit_json, merge_arguments, ordinary_user, poke, read_safetensors, run_hsa, safetensors_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

import hsa
from hsa.architectures import whisper
from hsa.errors import MachineError, RequestError, SourceChanged, SourceError
from hsa.outputs import provenance
from hsa.outputs.card import render as render_card
from hsa.sources.identity import Identity
from hsa.system.manifest import MAX_PROVENANCE, PROVENANCE
from hsa.testing.whisper_checkpoints import SHAPES, write_triple
from hsa.verification.problems import MAX_PROBLEMS

Triple = dict[str, Path]
WEIGHTS = "model.safetensors"
TARGET = "model.encoder.layers.1.self_attn.v_proj.weight"
COPIED = "model.decoder.layers.0.fc1.weight"


@pytest.fixture(scope="module")
def merged(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output in two files of weights, for reading alone."""
    output = tmp_path_factory.mktemp("merged") / "out"
    hsa.merge(**shared_triple, output=output, max_shard_size="300KB")
    return output


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(merged, tmp_path / "out"))


@pytest.fixture
def single(shared_triple: Triple, tmp_path: Path) -> Path:
    """An output in one file of weights."""
    hsa.merge(**shared_triple, output=tmp_path / "single", sync=False)
    return tmp_path / "single"


def flip(path: Path, position: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << bit
    path.write_bytes(raw)


def forge(output: Path, change: Callable[[dict[str, Any]], None] = lambda document: None) -> None:
    """Write the provenance again, so that it fits what the files hold now and what `change` made of it."""
    document = json.loads((output / PROVENANCE).read_text())
    change(document)
    for name, entry in document["files"].items():
        if entry and (output / name).is_file():
            entry["blake3"] = blake3((output / name).read_bytes()).hexdigest()
    document[provenance.DIGEST] = provenance.document_digest(document)
    (output / PROVENANCE).write_bytes(provenance.render(document))


def named(report: hsa.VerifyReport) -> set[str]:
    return {problem.file for problem in report.problems}


def told(report: hsa.VerifyReport) -> str:
    return "\n".join(f"{problem.file}: {problem.what}" for problem in report.problems)


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
    names = list(whisper.expected_targets({"encoder": 2, "decoder": 2}, "encoder-qkv"))
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
        heads = json.loads((single / PROVENANCE).read_text())["targets"][TARGET]["heads"]
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


# Whole files -----------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def remove(path: Path) -> None:
    path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_name(f"{path.stem}.other{path.suffix}"))


def link_out(path: Path) -> None:
    elsewhere = path.parents[1] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def link_inside(path: Path) -> None:
    path.rename(path.with_name(".hidden"))
    path.symlink_to(".hidden")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (truncate, empty, extend, remove, rename, link_out, link_inside, dangling, loop, pipe, folder)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file(merged: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    for name in sorted(os.listdir(merged)):
        out = Path(shutil.copytree(merged, tmp_path / name / "out"))
        damage(out / name)
        report = hsa.verify(out)
        assert name in named(report), told(report)
        assert all("\n" not in problem.what for problem in report.problems)
        if damage is rename and name not in (PROVENANCE, "README.md"):  # without the one no file is known
            assert len(named(report)) >= 2, "the file under its new name, too"


@pytest.mark.parametrize(
    "name",
    [
        "model-00009-of-00009.safetensors",
        "pytorch_model.bin",
        "tf_model.h5",
        "model.fp16.safetensors",
        "model.safetensors.index.fp16.index.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "Tokenizer.4.0.0.json",
        "vocabulary.txt",
        "processor_config.json",
        "config.4.0.0.json",
        "chat_template.jinja",
        "custom_generate",
        "code.py",
    ],
)
def test_a_stray_file_that_a_loader_would_read_is_a_problem(out: Path, name: str) -> None:
    (out / name).unlink(missing_ok=True)
    forge(out, lambda document: document["files"].pop(name, None))
    (out / name).write_bytes(b"x")
    report = hsa.verify(out)
    assert named(report) == {name} and "does not know it" in told(report)


@pytest.mark.parametrize(
    "name", ["wer.json", "extra.json", "trainer_state.json", "all_results.json", "notes.txt", "log", "runs", "x.yaml"]
)
def test_any_other_stray_is_a_note_and_no_problem(out: Path, name: str) -> None:
    if name == "runs":
        (out / name).mkdir()
    else:
        (out / name).write_bytes(b"x")
    report = hsa.verify(out)
    assert report.ok, told(report)
    assert report.notes == (f"1 files beside the output were not looked at, such as {name!r}",)


def test_a_file_that_may_not_be_read(merged: Path) -> None:
    top = Path(tempfile.mkdtemp())
    try:
        top.chmod(0o755)
        out = Path(shutil.copytree(merged, top / "out"))
        for name in ("config.json", "vocab.json"):
            (out / name).chmod(0)
        with ordinary_user():
            report = hsa.verify(out)
        assert named(report) == {"config.json", "vocab.json"} and "Permission denied" in told(report)
    finally:
        shutil.rmtree(top)


def test_a_disk_that_fails(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a damaged output, and not a sound one: an error of the machine."""
    preadv = os.preadv

    def failing(fd: int, views: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("vocab.json"):
            raise OSError(5, os.strerror(5))
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(MachineError, match=r"vocab\.json failed: Input/output error"):
        hsa.verify(out)


# Unsound, and the provenance fits --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800000, 0xFF800000, 0x7F800001])
def test_numbers_that_are_not_finite(single: Path, bits: int) -> None:
    document = json.loads((single / PROVENANCE).read_text())["targets"][TARGET]
    rows, columns = document["shape"]
    head = document["heads"] // 2
    element = head * (rows // document["heads"]) * columns + 3
    poke(single / WEIGHTS, TARGET, element, int.to_bytes(bits, 4, "little"))
    forge(single)
    report = hsa.verify(single)
    assert named(report) == {WEIGHTS}
    assert f"{TARGET}, head {head} holds NaN or Inf, first in element {element}" in told(report)


def test_numbers_that_are_not_finite_elsewhere_are_let_be(single: Path) -> None:
    poke(single / WEIGHTS, COPIED, 5, b"\x01\x00\x80\x7f")
    forge(single)
    assert hsa.verify(single).ok


def edit_header(path: Path, change: Callable[[dict[str, Any], bytes], bytes]) -> None:
    header, data = read_safetensors(path)
    data = change(header, data)
    path.write_bytes(safetensors_bytes(header, data))


def drop_last(header: dict[str, Any], data: bytes) -> bytes:
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
    return data[: header.pop(last)["data_offsets"][0]]


def add_one(header: dict[str, Any], data: bytes) -> bytes:
    header["model.extra"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(data), len(data) + 4]}
    return data + b"1234"


def transpose(header: dict[str, Any], data: bytes) -> bytes:
    header[COPIED]["shape"] = header[COPIED]["shape"][::-1]
    return data


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (drop_last, "is missing, and config.json promises it (WhisperForConditionalGeneration, encoder_layers 2)"),
        (add_one, "tensor model.extra has no place in the model that config.json describes"),
        (transpose, "has shape"),
    ],
)
def test_tensors_that_are_not_the_config_s(single: Path, change: Any, text: str) -> None:
    edit_header(single / WEIGHTS, change)
    forge(single)
    report = hsa.verify(single)
    assert "config.json" in named(report) and text in told(report)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"encoder_layers": 3}, "are missing"),
        ({"encoder_layers": 10**12}, "expected a positive whole number of at most"),
        ({"decoder_layers": 1}, "has no place"),
        ({"d_model": 10**30}, "has shape"),
        ({"vocab_size": True}, "vocab_size"),
        ({"tie_word_embeddings": False}, "proj_out.weight"),
        ({"model_type": "bert"}, "not a Whisper"),
        ({"encoder_attention_heads": 2}, "heads"),
        ({"encoder_ffn_dim": None}, "has shape"),
    ],
)
def test_a_config_that_is_another_model_s(out: Path, changes: dict[str, Any], text: str) -> None:
    edit_json(out / "config.json", **changes)
    forge(out)
    report = hsa.verify(out)
    assert not report.ok and text in told(report)


def test_an_index_that_disagrees(out: Path) -> None:
    index = out / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"].pop(TARGET)
    index.write_text(json.dumps(document))
    forge(out)
    assert named(hsa.verify(out)) == {index.name}


def test_weights_that_no_index_names(single: Path) -> None:
    shutil.copy(single / WEIGHTS, single / "model-2.safetensors")
    forge(single, lambda document: document["files"].update({"model-2.safetensors": {"blake3": "0" * 64}}))
    report = hsa.verify(single)
    assert named(report) == {"model-2.safetensors"} and "no index names" in told(report)


def one(document: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = document["targets"][TARGET]
    return entry


def other_heads(document: dict[str, Any]) -> None:
    entry = one(document)
    entry["selected"] = [h for h in range(entry["heads"]) if h not in entry["selected"]] or [0]


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "other heads": (other_heads, "with the largest scores"),
    "no heads": (lambda d: one(d).update(selected=[]), "with the largest scores"),
    "another keep": (lambda d: one(d).update(keep=one(d)["keep"] - 1), "the parameters give"),
    "another lambda": (lambda d: one(d).update(lambda_i=0.25), "the parameters give"),
    "another margin": (lambda d: one(d).update(margin=0.5), "margin"),
    "no margin": (lambda d: one(d).update(margin=None), "margin"),
    "another shape": (lambda d: one(d).update(shape=[1, 2]), "is listed with shape"),
    "another type": (lambda d: one(d).update(dtype="F16"), "is listed with shape"),
    "fewer heads": (lambda d: one(d).update(heads=1, scores=[1.0], selected=[0]), "expected"),
    "a target less": (lambda d: d["targets"].pop(TARGET), "are not listed"),
    "a target more": (
        lambda d: d["targets"].update({TARGET.replace("layers.1", "layers.9"): one(d)}),
        "are none of the weights' targets",
    ),
    "another k": (lambda d: d["parameters"].update(k=0.99), "the parameters give"),
    "a k that is none": (lambda d: d["parameters"].update(k=[1]), "k must be"),
    "a size that is none": (lambda d: d["parameters"].update(max_shard_size="huge"), "max_shard_size must be"),
    "a size beyond all": (lambda d: d["parameters"].update(max_shard_size="9" * 4400), "max_shard_size must be"),
    "scores beyond all": (lambda d: one(d).update(scores=[1e200] * one(d)["heads"]), "below 1e+150"),
    "no parameters": (lambda d: d.update(parameters={}), "is missing"),
    "another preset": (lambda d: d["parameters"].update(targets="attention-qkv"), "are not listed"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_provenance_that_does_not_fit_itself(out: Path, lie: str) -> None:
    change, text = LIES[lie]
    forge(out, change)  # type: ignore[arg-type]
    report = hsa.verify(out)
    assert PROVENANCE in named(report) and text in told(report)


CHANGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a score": (lambda d: one(d)["scores"].__setitem__(0, one(d)["scores"][0] * (1 + 1e-9)), "targets"),
    "a source's name": (lambda d: d["sources"]["base"].update(id="org/other"), "README.md"),
    "the card": (lambda d: d["parameters"].update(card={"title": "other"}), "README.md"),
    "the assets": (lambda d: d["parameters"].update(assets_from="nobody"), "cannot be merged with"),
    "the shards": (lambda d: d["parameters"].update(max_shard_size=5000), "are not what the sources give"),
    "a missing setting": (lambda d: d["parameters"].pop("card"), "'card' is missing"),
    "digests left out": (lambda d: d["files"]["config.json"].clear(), "files are not what the sources give"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_provenance_that_the_sources_do_not_give(out: Path, shared_triple: Triple, what: str) -> None:
    change, text = CHANGED[what]
    forge(out, change)  # type: ignore[arg-type]
    report = hsa.verify(out, **shared_triple)
    assert not report.ok and text in told(report), told(report)


@pytest.mark.parametrize("claim", [("program", "version"), ("libraries", "numpy"), ("libraries", "python")])
def test_a_claimed_other_version_does_not_switch_off_the_comparison_of_the_card(
    out: Path, shared_triple: Triple, claim: tuple[str, str]
) -> None:
    """The card is that of the record, whatever versions it names; one with other words is named, with the versions."""
    document = json.loads((out / PROVENANCE).read_text())
    card = (out / "README.md").read_bytes()
    (out / "README.md").write_bytes(card.replace(b"base_model", b"base_model_name") + b"Trust me.\n")
    forge(out, lambda document: document[claim[0]].update({claim[1]: "0.0.1"}))
    report = hsa.verify(out, **shared_triple)
    assert report.sources_compared and "README.md" in named(report)
    assert f"'{claim[1]}' '0.0.1' (here '{document[claim[0]][claim[1]]}')" in told(report)
    assert "verify with that version" in told(report)
    assert any("0.0.1" in note and "no digest proves that" in note for note in report.notes)


def test_an_output_of_another_version_whose_card_is_right_is_sound(out: Path, shared_triple: Triple) -> None:
    """numpy was updated since: its version in the record is a claim, and every byte is still compared."""
    forge(out, lambda document: document["libraries"].update(numpy="1.0"))
    report = hsa.verify(out, **shared_triple)
    assert told(report) == "" and report.sources_compared
    (path, *_) = sorted(out.glob("*.safetensors"))
    flip(path, path.stat().st_size - 1, 0)
    forge(out)
    assert named(hsa.verify(out, **shared_triple)) == {path.name, PROVENANCE}


def forge_names(output: Path, sources: Triple, **names: str) -> None:
    """Write other ids of the sources into the record and into the card, and every digest anew."""
    held = provenance.load(output).record
    forged = {
        role: dataclasses.replace(source, identity=Identity(names.get(role, source.identity.id)))
        for role, source in held.sources.items()
    }
    record = dataclasses.replace(held, sources=forged)
    model = whisper.model_class(json.loads((output / "config.json").read_text()))
    (output / "README.md").write_bytes(render_card(record, sorted(os.listdir(output)), model))

    def change(document: dict[str, Any]) -> None:
        for role, name in names.items():
            document["sources"][role]["id"] = name

    forge(output, change)


def test_forged_ids_of_sources_are_named(out: Path, shared_triple: Triple) -> None:
    """Bytes do not tell names: what could not be checked is said, and an id that is given is compared."""
    assert hsa.verify(out, **shared_triple).notes == ()
    forge_names(out, shared_triple, base="openai/whisper-large-v3")
    report = hsa.verify(out, **shared_triple)
    (note,) = [note for note in report.notes if "names" in note]
    assert "base is recorded as 'openai/whisper-large-v3', given is 'base'" in note and "with base_id" in note
    wrong = hsa.verify(out, **shared_triple, base_id="openai/whisper-tiny")
    assert "base" in named(wrong) and "is recorded as 'openai/whisper-large-v3'" in told(wrong)
    done = run_hsa("verify", out, "--sources", *merge_arguments(shared_triple, out)[1:4], "--base-id=openai/other")
    assert done.returncode == 2 and "problem: base: is recorded as 'openai/whisper-large-v3'" in done.stderr
    right = hsa.verify(out, **shared_triple, base_id="openai/whisper-large-v3")
    assert not named(right) & {"base", "primary", "secondary"} and not any("names" in note for note in right.notes)


def test_a_source_of_the_hubs_cache_has_a_name_that_is_compared(
    out: Path, shared_triple: Triple, tmp_path: Path
) -> None:
    place = tmp_path / "models--org--base" / "snapshots" / "abc"
    shutil.copytree(shared_triple["base"], place)
    sources = {**shared_triple, "base": place}
    report = hsa.verify(out, **sources)
    assert report.ok and any("base is recorded as 'base', given is 'org/base@abc'" in note for note in report.notes)
    forge_names(out, shared_triple, base="org/other")
    other = hsa.verify(out, **sources)
    assert "is recorded as 'org/other', the source given is 'org/base@abc'; give its id by base_id" in told(other)
    assert "base" not in named(hsa.verify(out, **sources, base_id="org/other"))
    forge_names(out, shared_triple, base="org/base")
    known = hsa.verify(out, **sources)
    assert "base" not in named(known) and any("'org/base', given is 'org/base@abc'" in note for note in known.notes)


def test_ids_alone_are_refused(out: Path) -> None:
    with pytest.raises(RequestError, match="give base, primary and secondary too"):
        hsa.verify(out, base_id="org/name")


def test_what_is_no_id_is_refused(out: Path, shared_triple: Triple) -> None:
    with pytest.raises(RequestError, match="base_id must be a hub id"):
        hsa.verify(out, **shared_triple, base_id="not an id")


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


# Replaced while it is read ---------------------------------------------------------------------------------


def test_an_output_that_is_replaced_while_it_is_read_is_verified_whole(shared_triple: Triple, tmp_path: Path) -> None:
    output = tmp_path / "out"
    hsa.merge(**shared_triple, output=output, sync=False)
    replaced: list[int] = []

    def replace_once(done: int, total: int) -> None:
        if not replaced:
            replaced.append(done)
            hsa.merge(**shared_triple, output=output, k=0.9, sync=False, overwrite=True)

    report = hsa.verify(output, progress=replace_once)
    assert replaced and report.ok, told(report)
    assert report.record is not None and report.record.parameters["k"] == 0.9
    assert report.notes == (f"{output} was replaced while it was read; this is of what replaced it",)


def test_an_output_that_is_replaced_again_and_again_is_called_that(shared_triple: Triple, tmp_path: Path) -> None:
    """And is not called damaged."""
    output = tmp_path / "out"
    hsa.merge(**shared_triple, output=output, sync=False)

    def replace_it(done: int, total: int) -> None:
        hsa.merge(**shared_triple, output=output, sync=False, overwrite=True)

    with pytest.raises(SourceChanged, match=r"was replaced 3 times while it was read; verify it once no run writes"):
        hsa.verify(output, progress=replace_it)


def test_an_output_that_is_removed_while_it_is_read_is_called_that(out: Path) -> None:
    with pytest.raises(SourceChanged, match="was removed while it was read"):
        hsa.verify(out, progress=lambda done, total: shutil.rmtree(out, ignore_errors=True))


def test_a_file_that_changes_while_it_is_read_is_not_called_withdrawn(out: Path, monkeypatch: Any) -> None:
    (path, *_) = sorted(out.glob("*.safetensors"))
    preadv, once = os.preadv, []

    def touched(fd: int, views: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == str(path) and len(views[0]) > 1 << 16 and not once:
            once.append(os.utime(path, ns=(1, 1)))
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", touched)
    report = hsa.verify(out, threads=1)
    assert path.name in named(report) and "changed while it was read; verify it again" in told(report)
    assert "withdrawn" not in told(report)


# Hostile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "x\0y", PROVENANCE, "line\nline"])
def test_names_that_lead_elsewhere(out: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (out.parent / "secret").write_bytes(b"secret")
    forge(out, lambda document: document["files"].update({name: {"blake3": "0" * 64}}))
    opened: list[str] = []
    real = os.open

    def watched(path: Any, *rest: Any, **more: Any) -> int:
        opened.append(os.path.realpath(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", watched)
    report = hsa.verify(out)
    assert not report.ok
    assert all("\n" not in problem.what + problem.file for problem in report.problems)
    assert opened and {os.path.dirname(path) for path in opened if path != str(out)} == {str(out)}


def test_a_provenance_of_any_size_is_refused_unread(out: Path) -> None:
    os.truncate(out / PROVENANCE, MAX_PROVENANCE + 1)
    report = hsa.verify(out)
    assert report.record is None and f"at most {MAX_PROVENANCE} are read" in told(report)
    (out / PROVENANCE).write_bytes(b"[" * MAX_PROVENANCE)
    assert PROVENANCE in named(hsa.verify(out))


def test_a_provenance_that_lists_very_much(out: Path) -> None:
    forge(out, lambda document: document["files"].update({f"f{n}": {} for n in range(MAX_PROBLEMS + 500)}))
    report = hsa.verify(out)
    assert len(report.problems) == MAX_PROBLEMS + 1 and report.problems[-1].what == "and 500 more problems"


def test_a_large_provenance_is_well_below_the_limit() -> None:
    """large-v3 with every attention tensor a target: 32 layers of encoder, 64 attentions of decoder, 20 heads."""
    targets = (32 + 64) * 7
    entry = {
        "shape": [1280, 1280], "dtype": "F32", "heads": 20, "keep": 20, "lambda_i": 1 / 3,
        "selected": list(range(20)), "scores": [1 / 3] * 20, "margin": 1 / 3,
    }  # fmt: skip
    size = len(
        provenance.render({f"model.decoder.layers.{n}.encoder_attn.out_proj.weight": entry for n in range(targets)})
    )
    assert size * 8 < MAX_PROVENANCE


# Sources ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_a_source_with_other_targets_is_named(out: Path, triple: Triple, role: str) -> None:
    poke(triple[role] / WEIGHTS, TARGET, 0, np.float32(0.25).tobytes())
    report = hsa.verify(out, **triple)
    assert not report.ok and report.sources_compared
    assert named(report) & {"base", "primary", "secondary"} == {role}
    assert f"{role}: is not the recorded source: its targets have BLAKE3" in told(report)


def test_a_primary_with_other_bytes_outside_the_targets(out: Path, triple: Triple) -> None:
    poke(triple["primary"] / WEIGHTS, COPIED, 0, np.float32(0.25).tobytes())
    report = hsa.verify(out, **triple)
    assert COPIED in told(report) and not named(report) & set(triple)


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_a_source_of_another_size_is_named_and_nothing_is_merged(out: Path, triple: Triple, role: str) -> None:
    path = triple[role] / WEIGHTS
    header, data = read_safetensors(path)
    header["__metadata__"] = {"format": "pt", "more": "more"}
    path.write_bytes(safetensors_bytes(header, data))
    report = hsa.verify(out, **triple)
    assert named(report) == {role} and not report.sources_compared
    assert any("nothing was recomputed" in note for note in report.notes)


def test_the_wrong_way_round(out: Path, shared_triple: Triple) -> None:
    other = {**shared_triple, "primary": shared_triple["secondary"], "secondary": shared_triple["primary"]}
    report = hsa.verify(out, **other)
    assert named(report) >= {"primary", "secondary"} and "base" not in named(report)


def test_a_source_that_holds_nan(out: Path, triple: Triple) -> None:
    poke(triple["secondary"] / WEIGHTS, TARGET, 0, b"\x00\x00\xc0\x7f")
    report = hsa.verify(out, **triple)
    assert named(report) == {"sources"} and "NaN" in told(report) and not report.sources_compared


def test_without_a_provenance_nothing_can_be_merged(out: Path, shared_triple: Triple) -> None:
    (out / PROVENANCE).unlink()
    report = hsa.verify(out, **shared_triple)
    assert PROVENANCE in named(report) and not report.sources_compared and report.record is None
    assert any("nothing was recomputed" in note for note in report.notes)


def test_missing_and_short_files_are_compared_as_far_as_they_go(out: Path, shared_triple: Triple) -> None:
    first, second = sorted(out.glob("*.safetensors"))[:2]
    first.unlink()
    truncate(second)
    report = hsa.verify(out, **shared_triple)
    assert {first.name, second.name} <= named(report) and "the sources give" in told(report)


def test_memory_stays_bounded(tmp_path: Path) -> None:
    triple = write_triple(tmp_path / "triple", SHAPES["demo"])
    hsa.merge(**triple, output=tmp_path / "out", sync=False)
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    done = run_hsa("verify", str(tmp_path / "out"), "--json", "--sources", *merge_arguments(triple, tmp_path)[1:4])
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["sources_compared"]
    assert found["bytes_read"] > 2 * size > 100e6
    assert found["peak_memory_bytes"] < 64e6


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
    theirs = {whisper.canonical(name): tuple(value.shape) for name, value in model.state_dict().items()}
    if changes.get("tie_word_embeddings", True) is not False:
        theirs.pop(whisper.UNTIED_OUTPUT)
    assert {found.name: found.shape for found in whisper.state_dict(config.to_dict(), "here")} == theirs
    for key, value in whisper.DIMENSIONS.items():
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
