"""Format 2 of the provenance and of patches: what the documents hold, key by key, and that they are read as written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from forger import Forger, forge

import hsa
from hsa.architectures.base import Partition
from hsa.architectures.registry import named
from hsa.methods.registry import method_named
from hsa.methods.selection import Selection
from hsa.methods.tensors import TensorRecord
from hsa.outputs import patch_format, provenance
from hsa.outputs.record import Record
from hsa.outputs.source_record import SourceFileRecord, SourceRecord
from hsa.sources.identity import Identity
from hsa.system.manifest import BLANK_DIGEST, LONGEST_NUMBER, MAX_PROVENANCE, MAX_PROVENANCE_MARKS, PROVENANCE
from hsa.system.strict_json import count_marks

Triple = dict[str, Path]
NAME = "p.safetensors"
RECORD = [
    "format", "program", "libraries", "method", "architecture", "parameters", "sources", "anchor", "base", "targets",
]  # fmt: skip
"""The keys that an output and a patch have in common."""

GIVEN: dict[str, Any] = {"k": 0.3, "lam": 0.7, "alpha": 1.1, "targets": "attention-all"}
DECLARED = {
    "k": 0.3,
    "lambda": 0.7,
    "alpha": 1.1,
    "targets": "attention-all",
    "attention_scale": 1.0,
    "non_attention_scale": 1.0,
    "num_heads": None,
    "num_layers": None,
    "numerics": "exact",
    "load_dtype": None,
    "dtype": "auto",
}
"""Every setting of HSA, in the order of its declaration."""

LAYOUT = {"assets_from": "primary", "backend": "cpu", "card": {}, "max_shard_size": None}


def merge(triple: Triple, output: Path, **options: Any) -> tuple[hsa.MergeReport, dict[str, Any]]:
    report = hsa.merge(**triple, output=output, sync=False, **options)
    return report, json.loads((output / PROVENANCE).read_text(encoding="ascii"))


def merge_patch(triple: Triple, output: Path, **options: Any) -> dict[str, Any]:
    hsa.merge_patch(**triple, output=output, sync=False, **options)
    return Forger.of(output).document


def check_record(document: dict[str, Any], triple: Triple) -> None:
    """What is the same in the document of an output and of a patch; the settings are GIVEN."""
    assert document["format"] == 2
    assert document["program"] == {"name": "hsa-merge", "version": hsa.__version__}
    assert list(document["libraries"]) == ["python", "blake3", "huggingface_hub", "numpy"]
    assert document["method"] == {"name": "hsa", "version": method_named("hsa").version}
    assert document["architecture"] == "whisper"
    assert list(document["parameters"].items()) == [*DECLARED.items(), *LAYOUT.items()]
    assert list(document["sources"]) == ["base", "primary", "secondary"]
    for role, source in document["sources"].items():
        assert list(source) == ["id", "revision", "files", "targets_blake3"]
        raw = (triple[role] / "model.safetensors").read_bytes()
        header = blake3(raw[: 8 + int.from_bytes(raw[:8], "little")]).hexdigest()
        assert (source["id"], source["revision"]) == (role, None)
        assert source["files"] == {"model.safetensors": {"bytes": len(raw), "header_blake3": header}}
    assert (document["anchor"], document["base"]) == ("primary", "base")


def check_target(entry: dict[str, Any], name: str) -> None:
    assert list(entry) == ["shape", "dtype", "groups", "axis", "decision"]
    assert entry["shape"] == ([64] if name.endswith("bias") else [64, 64])
    assert (entry["dtype"], entry["groups"]) == ("F32", 4)
    assert entry["axis"] == (1 if "out_proj" in name else 0)
    assert list(entry["decision"]) == ["keep", "lambda_i", "selected", "scores", "margin"]
    assert entry["decision"]["keep"] == len(entry["decision"]["selected"]) == 1
    assert len(entry["decision"]["scores"]) == 4


def test_the_document_of_an_output(shared_triple: Triple, tmp_path: Path) -> None:
    report, document = merge(shared_triple, tmp_path / "out", **GIVEN)
    assert list(document) == [*RECORD, "files", "digest"]
    check_record(document, shared_triple)
    assert list(document["targets"]) == list(report.tensors)
    for name, entry in document["targets"].items():
        check_target(entry, name)
        tensor = report.tensors[name]
        assert entry["decision"]["selected"] == list(tensor.selected)
        assert entry["decision"]["scores"] == list(tensor.scores)
        assert (entry["decision"]["lambda_i"], entry["decision"]["margin"]) == (tensor.coefficient, tensor.margin)
    assert all(list(entry) == ["blake3"] for entry in document["files"].values())


def test_the_document_of_a_patch(shared_triple: Triple, tmp_path: Path) -> None:
    document = merge_patch(shared_triple, tmp_path / NAME, **GIVEN)
    assert list(document) == [*RECORD, "files", "distances", "tensors_blake3", "digest"]
    check_record(document, shared_triple)
    for name, entry in document["targets"].items():
        check_target(entry, name)
    assert "config.json" in document["files"]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in document["files"].values())
    assert set(document["distances"]) == {"encoder", "decoder", "all"}
    assert all(list(by_role) == ["primary", "secondary"] for by_role in document["distances"].values())


def test_a_patch_holds_its_decisions_in_its_document_alone(shared_triple: Triple, tmp_path: Path) -> None:
    """Format 1 held scores and selections as tensors."""
    document = merge_patch(shared_triple, tmp_path / NAME)
    assert Forger.of(tmp_path / NAME).tensors.keys() == document["targets"].keys()


def test_an_output_and_a_patch_of_one_merge_have_one_record(shared_triple: Triple, tmp_path: Path) -> None:
    _, output = merge(shared_triple, tmp_path / "out", **GIVEN)
    patch = merge_patch(shared_triple, tmp_path / NAME, **GIVEN)
    for key in RECORD:
        if key == "targets":
            assert patch[key] == output[key]
        else:
            assert json.dumps(patch[key]) == json.dumps(output[key]), key


def test_reference_numerics_are_a_method_of_their_own(shared_triple: Triple, tmp_path: Path) -> None:
    _, document = merge(shared_triple, tmp_path / "out", numerics="reference")
    assert document["method"] == {"name": "hsa_script", "version": method_named("hsa_script").version}
    assert (document["parameters"]["numerics"], document["parameters"]["load_dtype"]) == ("reference", "auto")


def test_the_same_merge_gives_the_same_document(shared_triple: Triple, tmp_path: Path) -> None:
    for name, threads in (("one", 1), ("two", 3)):
        merge(shared_triple, tmp_path / name, threads=threads, **GIVEN)
        merge_patch(shared_triple, tmp_path / f"{name}.safetensors", threads=threads, **GIVEN)
    assert (tmp_path / "one" / PROVENANCE).read_bytes() == (tmp_path / "two" / PROVENANCE).read_bytes()
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


# --- reading it again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"k": 0}, {"k": 1}, GIVEN, {"numerics": "reference"}, {"max_shard_size": 300_000, "card": {"title": "é"}}],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_what_is_read_is_written_as_it_was(shared_triple: Triple, options: dict[str, Any], tmp_path: Path) -> None:
    _, document = merge(shared_triple, tmp_path / "out", **options)
    written = (tmp_path / "out" / PROVENANCE).read_bytes()
    read = provenance.loads(written, "here")
    record = read.record
    assert record.with_files(read.files) == written
    assert json.dumps(record.as_dict()) == json.dumps({key: document[key] for key in RECORD})
    assert (record.format, record.method.name, record.version) == (2, document["method"]["name"], 1)
    assert (record.anchor, record.base, record.architecture.name) == ("primary", "base", "whisper")
    for target in record.targets:
        entry = document["targets"][target.name]
        assert json.dumps(record.method.as_dict(target.decision)) == json.dumps(entry["decision"])
        again = record.method.from_dict(entry["decision"], entry["groups"], record.settings)
        assert again == target.decision


def refused(output: Path) -> str:
    """The one line that refuses the provenance, where `load` and `verify` say the same."""
    with pytest.raises(hsa.ProvenanceError) as error:
        provenance.load(output)
    (problem,) = [each for each in hsa.verify(output).problems if each.file == PROVENANCE]
    assert problem.what == str(error.value) and "\n" not in problem.what
    return problem.what


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown method": ({"method__name": "frankenstein"}, "its method is 'frankenstein', which is none of "),
    "a later version": ({"method__version": 2}, "it was made by version 2 of method hsa, and this hsa has version 1"),
    "another method's settings": ({"method__name": "hsa_script"}, "numerics must be one of reference, got 'exact'"),
    "an unknown architecture": (
        {"architecture": "bert"},
        "its architecture is 'bert', which is none of generic, whisper",
    ),
    "format 3": ({"format": 3}, "format is 3, this version reads 1 and 2"),
    "no base": ({"base": None}, "sources are"),
    "no settings": ({"parameters": {}}, "is missing"),
    "no targets": ({"targets": 1}, "expected"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_document_that_says_something_else(shared_triple: Triple, what: str, tmp_path: Path) -> None:
    changes, text = REFUSED[what]
    merge(shared_triple, tmp_path / "out")
    forge(tmp_path / "out", **changes)
    assert text in refused(tmp_path / "out")


def test_a_method_of_hostile_name_is_refused_in_one_line(shared_triple: Triple, tmp_path: Path) -> None:
    merge(shared_triple, tmp_path / "out")
    forge(tmp_path / "out", method__name="x\n\x1b[31m" + "y" * 10_000)
    line = refused(tmp_path / "out")
    assert "\x1b" not in line and len(line) < 1000


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"method": {"name": "frankenstein", "version": 1}}, "its method is 'frankenstein', which is none of "),
        ({"method": {"name": "hsa", "version": 2}}, "it was made by version 2 of method hsa"),
        ({"architecture": "bert"}, "its architecture is 'bert'"),
        ({"format": 3}, "format is 3, this version reads 1 and 2"),
    ],
)
def test_a_patch_that_says_something_else(
    shared_triple: Triple, change: dict[str, Any], text: str, tmp_path: Path
) -> None:
    merge_patch(shared_triple, tmp_path / NAME)
    forged = Forger.of(tmp_path / NAME)
    forged.document.update(change)
    forged.write()
    with pytest.raises(hsa.PatchError, match=re.escape(text)) as error:
        hsa.apply(shared_triple["primary"], tmp_path / NAME, output=tmp_path / "out", sync=False)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


TARGETS: list[tuple[dict[str, Any], str]] = [
    ({"groups": 3}, "has no 3 groups along axis 0"),
    ({"groups": 0}, "has no 0 groups"),
    ({"axis": 2}, "along axis 2"),
    ({"groups": 8}, "do not fit"),
    ({"decision": {}}, "is missing"),
]


@pytest.mark.parametrize(("change", "text"), TARGETS, ids=[text for _, text in TARGETS])
def test_a_target_that_does_not_fit_together(
    shared_triple: Triple, change: dict[str, Any], text: str, tmp_path: Path
) -> None:
    _, document = merge(shared_triple, tmp_path / "out")
    name = next(iter(document["targets"]))
    forge(tmp_path / "out", targets={**document["targets"], name: {**document["targets"][name], **change}})
    assert text in refused(tmp_path / "out")


# --- size ---------------------------------------------------------------------------------------------------------


def large_record(preset: str) -> Record:
    """The record of large-v3, 32 layers a stack of 20 heads each, with numbers as long as there are."""
    method, family = method_named("hsa"), named("whisper")
    settings = method.Settings(targets=preset)  # type: ignore[call-arg]
    weights = list(family.expected_targets({"encoder": 32, "decoder": 32}, settings.targets))  # type: ignore[attr-defined]
    biases = [name.replace("weight", "bias") for name in weights if "k_proj" not in name]
    names = [*weights, *biases]
    file = SourceFileRecord(1 << 40, BLANK_DIGEST)
    source = SourceRecord(
        Identity("openai/whisper-large-v3", "0" * 40),
        "safetensors",
        {f"model-{number:05d}-of-00020.safetensors": file for number in range(20)},
        BLANK_DIGEST,
    )
    scores = (LONGEST_NUMBER,) * 20
    selection = Selection(scores, tuple(range(20)), LONGEST_NUMBER, scores)
    decision = method.from_dict(
        {"keep": 20, "lambda_i": LONGEST_NUMBER, "selected": list(selection.selected), "scores": list(scores),
         "margin": LONGEST_NUMBER}, 20, settings,
    )  # fmt: skip
    targets = []
    for name in names:
        place = family.place(name)
        if place is None or preset not in place.presets:
            continue
        shape = (1280,) if name.endswith("bias") else (1280, 1280)
        targets.append(
            TensorRecord(f"model.{name}", name, place, shape, "BF16", Partition(place.head_axis, 20), decision)
        )
    sources = dict.fromkeys(("base", "primary", "secondary"), source)
    parameters = {**settings.as_dict(), **LAYOUT}
    return Record({}, {}, method, 1, family, parameters, sources, "primary", "base", tuple(targets))


@pytest.mark.parametrize(
    ("preset", "count", "share"), [("encoder-qkv", 160, 16), ("attention-qkv", 480, 8), ("attention-all", 576, 4)]
)
def test_a_large_provenance_is_well_below_the_limit(preset: str, count: int, share: int) -> None:
    record = large_record(preset)
    assert len(record.targets) == count
    files = {f"model-{number:05d}-of-00020.safetensors": BLANK_DIGEST for number in range(20)}
    written = record.with_files(files)
    assert len(written) * share < MAX_PROVENANCE and count_marks(written) * share < MAX_PROVENANCE_MARKS
    record.check_fits(files, count * 20)
    assert provenance.loads(written, "here").record.with_files(files) == written


def test_a_large_patch_has_a_header_that_is_read_again() -> None:
    record = large_record("attention-all")
    patch_format.header_size(patch_format.PatchContents(record, {"config.json": BLANK_DIGEST}))
