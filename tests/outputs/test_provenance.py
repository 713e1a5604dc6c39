"""`hsa_merge.json`: what it says, that every digest in it is right, and that it says nothing of when or where."""

from __future__ import annotations

import getpass
import json
import math
import platform
import re
import shutil
import socket
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from helpers import raw_bytes, read_tensors, write_tensors

import hsa
from hsa.methods.hsa import HsaSettings
from hsa.outputs import card, provenance
from hsa.system import manifest

Triple = dict[str, Path]


def merge(triple: Triple, output: Path, **options: Any) -> tuple[hsa.MergeReport, dict[str, Any]]:
    report = hsa.merge(**triple, output=output, **{"sync": False, **options})
    return report, json.loads((output / "hsa_merge.json").read_text(encoding="ascii"))


def digest(data: bytes) -> str:
    return blake3(data).hexdigest()


def canonical(document: dict[str, Any]) -> bytes:
    """The canonical form, spelt out: sorted keys, no spaces, ASCII, without the digest itself."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    return json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threads": 1},
        {"sync": True},
        {"max_shard_size": 50_000, "dtype": "bfloat16"},
        {"non_attention_scale": 0.5, "targets": "attention-all"},
        {"numerics": "reference"},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_every_digest_is_that_of_the_written_file(
    shared_triple: Triple, options: dict[str, Any], tmp_path: Path
) -> None:
    _, document = merge(shared_triple, tmp_path / "out", **options)
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert document["files"].keys() == files.keys() - {"hsa_merge.json"}
    for name, entry in document["files"].items():
        assert entry == {"blake3": digest(files[name].read_bytes())}, name


def test_large_files_of_many_pieces_are_digested_in_order(tmp_path: Path) -> None:
    """The digest runs beside the copy, in pieces of megabytes, over several threads."""
    from hsa.testing.whisper_checkpoints import SHAPES, write_triple

    triple = write_triple(tmp_path / "sources", SHAPES["demo"], dtype="float16")
    for threads, sync in ((1, False), (4, True)):
        _, document = merge(triple, tmp_path / f"out{threads}", threads=threads, sync=sync)
        path = tmp_path / f"out{threads}" / "model.safetensors"
        assert path.stat().st_size > 10 << 20
        assert document["files"]["model.safetensors"]["blake3"] == digest(path.read_bytes())


def test_its_own_digest_is_last_and_covers_everything_else(shared_triple: Triple, tmp_path: Path) -> None:
    _, document = merge(shared_triple, tmp_path / "out")
    assert list(document)[-1] == "digest"
    assert document["digest"] == digest(canonical(document))
    assert document["digest"] == manifest.document_digest(document)

    def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if isinstance(value, dict):
            return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))] or [path]
        if isinstance(value, list):
            return [leaf for number, item in enumerate(value) for leaf in leaves(item, (*path, number))] or [path]
        return [path]

    for path in leaves({key: value for key, value in document.items() if key != "digest"}):
        changed = json.loads(json.dumps(document))
        place = changed
        for key in path[:-1]:
            place = place[key]
        value = place[path[-1]]
        place[path[-1]] = math.nextafter(value, 10) if isinstance(value, float) else f"{value}?"
        assert manifest.document_digest(changed) != document["digest"], path


def test_the_bytes_are_the_one_way_to_write_it(shared_triple: Triple, tmp_path: Path) -> None:
    _, document = merge(shared_triple, tmp_path / "out")
    written = (tmp_path / "out" / "hsa_merge.json").read_bytes()
    assert manifest.render(document) == written
    assert written.isascii()


def test_content(shared_triple: Triple, tmp_path: Path) -> None:
    report, document = merge(
        shared_triple,
        tmp_path / "out",
        k=0.3,
        lam=0.7,
        alpha=1.1,
        targets="attention-all",
        attention_scale=0.5,
        assets_from="secondary",
        base_id="openai/whisper-tiny@v1",
        max_shard_size="5MB",
        card={"title": "T"},
    )
    settings = {"assets_from": "secondary", "backend": "cpu", "card": {"title": "T"}, "max_shard_size": 5_000_000}
    assert document["program"] == {"name": "hsa-merge", "version": hsa.__version__}
    assert document["libraries"]["python"] == platform.python_version()
    for library in ("numpy", "blake3"):
        assert document["libraries"][library] == version(library)
    assert "torch" not in document["libraries"]
    assert document["parameters"] == {**report.parameters, **settings}
    assert (document["parameters"]["k"], document["parameters"]["lambda"]) == (0.3, 0.7)
    assert (document["sources"]["base"]["id"], document["sources"]["base"]["revision"]) == ("openai/whisper-tiny", "v1")
    assert (document["sources"]["primary"]["id"], document["sources"]["primary"]["revision"]) == ("primary", None)
    assert document["targets"].keys() == report.tensors.keys()
    for name, tensor in report.tensors.items():
        assert document["targets"][name] == {
            "shape": list(read_tensors(shared_triple["primary"])[name].shape),
            "dtype": "F32",
            "groups": 4,
            "axis": 1 if name.endswith("out_proj.weight") else 0,
            "decision": {
                "keep": 1,
                "lambda_i": tensor.coefficient,
                "selected": list(tensor.selected),
                "scores": list(tensor.scores),
                "margin": tensor.margin,
            },
        }


def test_reference_numerics_record_torch(shared_triple: Triple, tmp_path: Path) -> None:
    _, document = merge(shared_triple, tmp_path / "out", numerics="reference")
    assert document["libraries"]["torch"] == version("torch")
    assert document["parameters"]["load_dtype"] == "auto"


@pytest.mark.parametrize("shards", [1, 3])
def test_sources_are_recorded_by_size_header_and_targets(triple: Triple, shards: int, tmp_path: Path) -> None:
    for path in triple.values():
        write_tensors(path, read_tensors(path), shards=shards)
    report, document = merge(triple, tmp_path / "out")
    for role, path in triple.items():
        assert document["sources"][role]["files"] == {
            file.name: {"bytes": file.stat().st_size, "header_blake3": digest(header(file))}
            for file in path.glob("*.safetensors")
        }
        tensors = read_tensors(path)
        lines = [
            json.dumps(
                [name.removeprefix("model."), "F32", list(tensors[name].shape), digest(raw_bytes(tensors[name]))],
                separators=(",", ":"),
            )
            for name in report.tensors
        ]
        assert document["sources"][role]["targets_blake3"] == digest("\n".join(sorted(lines)).encode())


def test_the_target_digest_does_not_depend_on_layout_or_on_what_is_copied(triple: Triple, tmp_path: Path) -> None:
    _, before = merge(triple, tmp_path / "before")
    for path in triple.values():
        tensors = read_tensors(path)
        tensors["model.encoder.layer_norm.weight"] += 1
        write_tensors(path, {name.removeprefix("model."): tensor for name, tensor in tensors.items()}, shards=2)
    _, after = merge(triple, tmp_path / "after")
    for role in triple:
        assert after["sources"][role]["targets_blake3"] == before["sources"][role]["targets_blake3"]
        assert after["sources"][role]["files"] != before["sources"][role]["files"]
    tensors = read_tensors(triple["secondary"])
    tensors["encoder.layers.1.self_attn.v_proj.bias"][0] += 1
    write_tensors(triple["secondary"], tensors, shards=2)
    _, changed = merge(triple, tmp_path / "changed")
    different = [r for r in triple if changed["sources"][r]["targets_blake3"] != after["sources"][r]["targets_blake3"]]
    assert different == ["secondary"]


def test_nothing_says_when_or_where(shared_triple: Triple, tmp_path: Path) -> None:
    """No path, host, user, time or duration in any written text."""
    hidden = tmp_path / "secret-place"
    triple = {role: Path(shutil.copytree(path, hidden / role)) for role, path in shared_triple.items()}
    report, _ = merge(triple, hidden / "secret-output", threads=3)
    words = {str(tmp_path), "secret-place", "secret-output", "/tmp", socket.gethostname(), str(report.seconds)}
    words |= {str(tmp_path.home()), time.strftime("%Y-%m-%d"), time.strftime("%H:%M"), "seconds", "threads"}
    if len(getpass.getuser()) > 4:
        words.add(getpass.getuser())
    for path in (hidden / "secret-output").iterdir():
        text = path.read_bytes() if path.suffix != ".safetensors" else header(path)
        found = [word for word in words if word and word.encode() in text]
        assert not found, (path.name, found)
        assert not re.search(rb"\b1[6-9]\d{8}\b", text), f"{path.name} holds what looks like a timestamp"


def test_without_hashes_the_digests_of_whole_files_alone_are_left_out(shared_triple: Triple, tmp_path: Path) -> None:
    report, document = merge(shared_triple, tmp_path / "out", digest=False)
    _, hashed = merge(shared_triple, tmp_path / "hashed")
    assert document["files"] == {name: {} for name in hashed["files"]}
    assert document["digest"] == digest(canonical(document))
    for key in document.keys() - {"files", "digest"}:
        assert document[key] == hashed[key], key
    assert all("targets_blake3" in source for source in document["sources"].values())
    assert any("verif" in note for note in report.notes)
    for name in hashed["files"]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "hashed" / name).read_bytes()


@pytest.mark.parametrize("claimed", ["org/name", "org/name@main", "org/name@0123abc"])
def test_claimed_ids(shared_triple: Triple, claimed: str, tmp_path: Path) -> None:
    _, document = merge(shared_triple, tmp_path / "out", secondary_id=claimed)
    name, _, revision = claimed.partition("@")
    source = document["sources"]["secondary"]
    assert (source["id"], source["revision"]) == (name, revision or None)


def test_a_directory_gives_its_own_name_even_through_a_link(shared_triple: Triple, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(shared_triple["primary"])
    _, document = merge({**shared_triple, "primary": tmp_path / "link"}, tmp_path / "out")
    assert document["sources"]["primary"]["id"] == "primary"


# --- reading it again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"targets": "attention-all", "k": 0}, {"numerics": "reference"}, {"digest": False}, {"card": {"title": "é"}}],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_what_is_read_gives_the_same_files_again(
    shared_triple: Triple, options: dict[str, Any], tmp_path: Path
) -> None:
    report, _ = merge(shared_triple, tmp_path / "out", **options)
    read = provenance.load(tmp_path / "out")
    assert read.record.with_files(read.files) == (tmp_path / "out/hsa_merge.json").read_bytes()
    assert card.render(read.record, [*read.files, "hsa_merge.json"], {}) == (tmp_path / "out/README.md").read_bytes()
    assert HsaSettings.from_dict(read.record.parameters).as_dict() == report.parameters
    for target in read.record.targets:
        expected = report.tensors[target.name]
        assert (target.selected, target.scores, target.margin) == (expected.selected, expected.scores, expected.margin)


def test_any_flipped_bit_of_it_is_found(shared_triple: Triple, tmp_path: Path) -> None:
    merge(shared_triple, tmp_path / "out")
    path = tmp_path / "out/hsa_merge.json"
    written = path.read_bytes()
    for position in range(0, len(written), 97):
        for bit in (0, 3, 7):
            changed = bytearray(written)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(hsa.ProvenanceError, match="hsa_merge"):
                provenance.load(tmp_path / "out")
    path.write_bytes(written)
    provenance.load(tmp_path / "out")


WRONG: list[tuple[str, Any]] = [
    ("format", 3),
    ("files", []),
    ("files", {"a": {"blake3": "00"}}),
    ("sources", {}),
    ("parameters", 1),
    ("targets", {"nonsense": {}}),
    ("targets", {"model.encoder.layers.0.self_attn.q_proj.bias": {"heads": 2}}),
    ("program", {"name": 1}),
    ("libraries", None),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{n}-{key}" for n, (key, _) in enumerate(WRONG)])
def test_a_sound_digest_does_not_make_it_say_what_it_must(
    shared_triple: Triple, key: str, value: Any, tmp_path: Path
) -> None:
    _, document = merge(shared_triple, tmp_path / "out")
    document[key] = value
    document["digest"] = manifest.document_digest(document)
    (tmp_path / "out/hsa_merge.json").write_bytes(manifest.render(document))
    with pytest.raises(hsa.ProvenanceError, match=re.escape(str(tmp_path / "out/hsa_merge.json"))):
        provenance.load(tmp_path / "out")


def test_a_directory_without_it_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(hsa.ProvenanceError, match=re.escape("holds no hsa_merge.json")):
        provenance.load(tmp_path)
