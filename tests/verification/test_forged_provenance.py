"""`hsa verify` where the provenance was made to fit: unsound weights, lies of the record, hostile names."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forged_outputs import COPIED, TARGET, WEIGHTS, Triple, flip, forge, named, told
from helpers import edit_json, merge_arguments, poke, read_safetensors, run_hsa, safetensors_bytes

import hsa
from hsa.errors import RequestError
from hsa.outputs import provenance
from hsa.outputs.card import render as render_card
from hsa.sources.identity import Identity
from hsa.system.manifest import MAX_PROVENANCE, PROVENANCE
from hsa.verification.problems import MAX_PROBLEMS

# Unsound, and the provenance fits --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800000, 0xFF800000, 0x7F800001])
def test_numbers_that_are_not_finite(single: Path, bits: int) -> None:
    document = json.loads((single / PROVENANCE).read_text())["targets"][TARGET]
    rows, columns = document["shape"]
    head = document["groups"] // 2
    element = head * (rows // document["groups"]) * columns + 3
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
        ({"model_type": "bert"}, "by its config.json the weights are a checkpoint of model_type 'bert'"),
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


def decided(document: dict[str, Any]) -> dict[str, Any]:
    decision: dict[str, Any] = one(document)["decision"]
    return decision


def other_heads(document: dict[str, Any]) -> None:
    decision = decided(document)
    decision["selected"] = [h for h in range(one(document)["groups"]) if h not in decision["selected"]] or [0]


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "other heads": (other_heads, "with the largest scores"),
    "no heads": (lambda d: decided(d).update(selected=[]), "with the largest scores"),
    "another keep": (lambda d: decided(d).update(keep=decided(d)["keep"] - 1), "the parameters give"),
    "another lambda": (lambda d: decided(d).update(lambda_i=0.25), "the parameters give"),
    "another margin": (lambda d: decided(d).update(margin=0.5), "margin"),
    "no margin": (lambda d: decided(d).update(margin=None), "margin"),
    "another shape": (lambda d: one(d).update(shape=[4, 2]), "is listed with shape"),
    "a shape without heads": (lambda d: one(d).update(shape=[1, 2]), "shape [1, 2] has no 4 groups along axis 0"),
    "another type": (lambda d: one(d).update(dtype="F16"), "is listed with shape"),
    "fewer heads": (lambda d: (one(d).update(groups=1), decided(d).update(scores=[1.0], selected=[0])), "expected"),
    "a target less": (lambda d: d["targets"].pop(TARGET), "are not listed"),
    "a target more": (
        lambda d: d["targets"].update({TARGET.replace("layers.1", "layers.9"): one(d)}),
        "are none of the weights' targets",
    ),
    "another k": (lambda d: d["parameters"].update(k=0.99), "the parameters give"),
    "a k that is none": (lambda d: d["parameters"].update(k=[1]), "k must be"),
    "a size that is none": (lambda d: d["parameters"].update(max_shard_size="huge"), "max_shard_size must be"),
    "a size beyond all": (lambda d: d["parameters"].update(max_shard_size="9" * 4400), "max_shard_size must be"),
    "scores beyond all": (lambda d: decided(d).update(scores=[1e200] * one(d)["groups"]), "from 0 to 1e+150"),
    "no parameters": (lambda d: d.update(parameters={}), "is missing"),
    "another preset": (lambda d: d["parameters"].update(targets="attention-qkv"), "are not listed"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_provenance_that_does_not_fit_itself(out: Path, lie: str) -> None:
    change, text = LIES[lie]
    forge(out, change)  # type: ignore[arg-type]
    report = hsa.verify(out)
    assert PROVENANCE in named(report) and text in told(report)


def another_score(scores: list[float]) -> None:
    scores[0] *= 1 + 1e-9


CHANGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a score": (
        lambda d: decided(d)["scores"].__setitem__(0, decided(d)["scores"][0] * (1 + 1e-9)),
        "does not follow from the",
    ),
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
    config = json.loads((output / "config.json").read_text())
    (output / "README.md").write_bytes(render_card(record, sorted(os.listdir(output)), config))

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
    with pytest.raises(RequestError, match="give the sources too"):
        hsa.verify(out, base_id="org/name")


def test_what_is_no_id_is_refused(out: Path, shared_triple: Triple) -> None:
    with pytest.raises(RequestError, match="base_id must be a hub id"):
        hsa.verify(out, **shared_triple, base_id="not an id")


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
