"""Weights of `torch.save`: merged like safetensors, byte for byte, and without reading what is not needed."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from helpers import edit_json, merged_bytes, raw_bytes, read_tensors, write_pickle, write_tensors
from transformers import WhisperForConditionalGeneration

import hsa
from hsa.errors import HeaderError, SourceError
from hsa.sources import torch_pickle
from hsa.sources.checkpoint import CONFIG, INDEX, WEIGHTS, open_checkpoint
from hsa.sources.safetensors import Header
from hsa.system.fsio import SourceFile, Tally
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

Triple = dict[str, Path]
EMBEDDING = "model.decoder.embed_tokens.weight"
OUTPUT = "proj_out.weight"


def weights(directory: Path) -> dict[str, bytes]:
    return {name: raw_bytes(tensor) for name, tensor in read_tensors(directory).items()}


def header_of(path: Path) -> Header:
    source = SourceFile(path, "primary", Tally())
    try:
        return torch_pickle.read_state_dict(source)
    finally:
        source.close()


# Merges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_merge_of_pickles_is_the_merge_of_the_same_safetensors(tmp_path: Path, dtype: Any, shards: int) -> None:
    triple = write_triple(tmp_path / "sources", SHAPES["test"], dtype=dtype)
    parameters = {"targets": "attention-all", "non_attention_scale": 0.5}
    expected = merged_bytes(triple, tmp_path / "expected", **parameters)
    for path in triple.values():
        write_pickle(path, read_tensors(path), shards=shards)
    assert merged_bytes(triple, tmp_path / "out", **parameters) == expected
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == [WEIGHTS]
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_one_source_may_be_a_pickle(triple: Triple, tmp_path: Path, role: str) -> None:
    expected = merged_bytes(triple, tmp_path / "expected")
    write_pickle(triple[role], read_tensors(triple[role]))
    assert merged_bytes(triple, tmp_path / "out") == expected


def test_reference_numerics_read_pickles_too(triple: Triple, tmp_path: Path) -> None:
    expected = merged_bytes(triple, tmp_path / "expected", numerics="reference")
    for path in triple.values():
        write_pickle(path, read_tensors(path))
    assert merged_bytes(triple, tmp_path / "out", numerics="reference") == expected


def test_safetensors_go_before_pickles(triple: Triple, tmp_path: Path) -> None:
    expected = merged_bytes(triple, tmp_path / "expected")
    for path in triple.values():
        (path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert merged_bytes(triple, tmp_path / "out") == expected


def test_a_pickled_primary_is_written_in_bases_shards(triple: Triple, tmp_path: Path) -> None:
    expected = merged_bytes(triple, tmp_path / "expected")
    write_pickle(triple["primary"], read_tensors(triple["primary"]))
    alone = "model.decoder.layers.0.fc1.bias"
    tensors = {name: tensor for name, tensor in read_tensors(triple["base"]).items() if name != alone}
    write_tensors(triple["base"], tensors, shards=3)
    report = hsa.merge(output=tmp_path / "out", sync=False, **triple)
    assert report.route == "rewrite"
    base = json.loads((triple["base"] / INDEX).read_text())["weight_map"]
    ours = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert ours == {**base, alone: max(base.values())}
    assert weights(tmp_path / "out") == expected
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert {ours[name] for name in names_in(path)} == {path.name}


def names_in(path: Path) -> set[str]:
    header = path.read_bytes()
    document = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert document.pop("__metadata__") == {"format": "pt"}
    return set(document)


def test_shards_of_the_asked_size_where_no_source_has_a_layout(triple: Triple, tmp_path: Path) -> None:
    for path in triple.values():
        write_pickle(path, read_tensors(path))
    hsa.merge(output=tmp_path / "out", sync=False, max_shard_size="100kB", **triple)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2


def test_the_output_loads_in_transformers(triple: Triple, tmp_path: Path) -> None:
    write_pickle(triple["primary"], read_tensors(triple["primary"]), shards=2)
    expected = merged_bytes(triple, tmp_path / "out")
    model, info = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = model.state_dict()
    assert all(raw_bytes(state[name]) == data for name, data in expected.items())


def test_a_tied_output_projection_is_left_out_and_noted(triple: Triple, tmp_path: Path) -> None:
    expected = merged_bytes(triple, tmp_path / "expected")
    tensors = read_tensors(triple["primary"])
    write_pickle(triple["primary"], {**tensors, OUTPUT: tensors[EMBEDDING]})
    report = hsa.merge(output=tmp_path / "out", sync=False, **triple)
    assert weights(tmp_path / "out") == expected
    assert [n for n in report.notes if OUTPUT in n] == [
        f"primary's {OUTPUT} is {EMBEDDING} under another name in its file, and left out"
    ]


def test_an_output_projection_of_its_own_is_written(triple: Triple, tmp_path: Path) -> None:
    tensors = read_tensors(triple["primary"])
    write_pickle(triple["primary"], {**tensors, OUTPUT: tensors[EMBEDDING] + 1})
    assert merged_bytes(triple, tmp_path / "out")[OUTPUT] == raw_bytes(tensors[EMBEDDING] + 1)


def test_an_untied_model_keeps_an_output_projection_that_shares_its_bytes(triple: Triple, tmp_path: Path) -> None:
    tensors = read_tensors(triple["primary"])
    write_pickle(triple["primary"], {**tensors, OUTPUT: tensors[EMBEDDING]})
    edit_json(triple["primary"] / CONFIG, tie_word_embeddings=False)
    assert merged_bytes(triple, tmp_path / "out")[OUTPUT] == raw_bytes(tensors[EMBEDDING])


def test_merger_reads_pickles(triple: Triple) -> None:
    expected = hsa.Merger(**triple).merge()
    for path in triple.values():
        write_pickle(path, read_tensors(path))
    found = hsa.Merger(**triple).merge()
    assert {name: raw_bytes(t) for name, t in found.items()} == {name: raw_bytes(t) for name, t in expected.items()}


def test_provenance_names_the_file_its_size_and_the_digest_of_its_description(triple: Triple, tmp_path: Path) -> None:
    write_pickle(triple["secondary"], read_tensors(triple["secondary"]))
    merged_bytes(triple, tmp_path / "out")
    source = json.loads((tmp_path / "out" / "hsa_merge.json").read_text())["sources"]["secondary"]
    file = triple["secondary"] / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        described = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    assert source["format"] == "pickle"
    assert source["files"] == {
        file.name: {"bytes": file.stat().st_size, "header_blake3": blake3(described).hexdigest()}
    }
    assert str(tmp_path) not in json.dumps(source)


def test_only_what_is_needed_is_read(triple: Triple, tmp_path: Path) -> None:
    """Of a pickled secondary the archive's directory and the targets, as of a safetensors one."""
    tensors = read_tensors(triple["secondary"])
    write_pickle(triple["secondary"], tensors)
    report = hsa.merge(output=tmp_path / "out", sync=False, **triple)
    targets = sum(tensors[name].nbytes for name in report.tensors)
    overhead = 400 * 1024
    assert targets < report.bytes_read_by_source["secondary"] < targets + overhead
    assert (triple["secondary"] / "pytorch_model.bin").stat().st_size > targets + overhead


# Files ---------------------------------------------------------------------------------------------------------


def test_every_tensor_is_found_where_it_lies(tmp_path: Path) -> None:
    whole = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    tensors = {
        "a view": whole[2:4],
        "a row": whole[5],
        "the whole": whole,
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "double": torch.randn(2, 2, 2, dtype=torch.float64),
        "long": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "a parameter": torch.nn.Parameter(torch.randn(4)),
    }
    torch.save(tensors, tmp_path / "w.bin")
    raw = (tmp_path / "w.bin").read_bytes()
    header = header_of(tmp_path / "w.bin")
    assert {entry.name: entry.shape for entry in header.entries} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert [entry.start for entry in header.entries] == sorted(entry.start for entry in header.entries)
    for entry in header.entries:
        assert raw[entry.start : entry.stop] == raw_bytes(tensors[entry.name].detach()), entry.name
    codes = {entry.name: entry.code for entry in header.entries}
    assert (codes["half"], codes["brain"], codes["double"], codes["long"]) == ("F16", "BF16", "F64", "I64")


REFUSED: dict[str, tuple[Callable[[], Any], type[SourceError], str]] = {
    "transposed": (lambda: {"w": torch.zeros(2, 3).t()}, SourceError, "tensor w is a transposed or strided view"),
    "strided": (lambda: {"w": torch.zeros(8)[::2]}, SourceError, "tensor w is a transposed or strided view"),
    "expanded": (lambda: {"w": torch.zeros(1).expand(9)}, SourceError, "tensor w is a transposed or strided view"),
    "sparse": (lambda: {"w": torch.eye(3).to_sparse()}, SourceError, "found a sparse tensor under 'w'"),
    "complex": (lambda: {"w": torch.zeros(2, dtype=torch.complex64)}, SourceError, "w has dtype torch.complex64"),
    "float8": (lambda: {"w": torch.zeros(2).to(torch.float8_e4m3fn)}, SourceError, "w has dtype torch.float8_e4m3fn"),
    "meta": (lambda: {"w": torch.zeros(2, device="meta")}, SourceError, "w has no data in the file"),
    "no tensor": (lambda: {"w": 3}, SourceError, "expected a state dict of plain tensors, found int under 'w'"),
    "nested": (lambda: {"state_dict": {"w": torch.zeros(1)}}, SourceError, "found dict under 'state_dict'"),
    "a number for a name": (lambda: {1: torch.zeros(1)}, SourceError, "found Tensor under 1"),
    "a list": (lambda: [torch.zeros(1)], SourceError, "expected a state dict, found list"),
    "a model": (lambda: torch.nn.Linear(2, 2), SourceError, "holds more than tensors .*it names torch.nn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_state_dict_of_plain_tensors(tmp_path: Path, name: str) -> None:
    make, kind, message = REFUSED[name]
    torch.save(make(), tmp_path / "w.bin")
    with pytest.raises(kind, match=message) as caught:
        header_of(tmp_path / "w.bin")
    assert str(caught.value).startswith(f"primary: {tmp_path / 'w.bin'}")
    assert "save_pretrained" in str(caught.value)


def archive(path: Path, records: list[tuple[str, bytes]], **options: Any) -> None:
    with zipfile.ZipFile(path, "w", **options) as out:
        for name, data in records:
            out.writestr(name, data)


def records_of(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as found:
        return [(name, found.read(name)) for name in found.namelist()]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save({"w": torch.randn(40, 50), "b": torch.randn(50)}, tmp_path / "w.bin")
    return tmp_path / "w.bin"


def refused(path: Path, message: str) -> None:
    with pytest.raises(HeaderError, match=message) as caught:
        header_of(path)
    assert str(caught.value).startswith(f"primary: {path}")


def test_an_archive_of_an_older_torch_is_read(saved: Path) -> None:
    """Without the record that lets torch work out where the others lie."""
    before = header_of(saved)
    assert any(name.endswith("/.format_version") for name, _ in records_of(saved))
    archive(saved, [(name, data) for name, data in records_of(saved) if "/." not in name])
    after, raw = header_of(saved), saved.read_bytes()
    tensors = torch.load(saved, weights_only=True)
    assert after.raw == before.raw
    assert {e.name: raw[e.start : e.stop] for e in after.entries} == {n: raw_bytes(t) for n, t in tensors.items()}


def test_an_archive_that_another_program_wrote_again_is_read(saved: Path) -> None:
    """Records lie elsewhere then: their places come from the archive's directory, not from how torch pads them."""
    tensors, before = torch.load(saved, weights_only=True), header_of(saved)
    archive(saved, records_of(saved))
    raw, after = saved.read_bytes(), header_of(saved)
    assert {e.name: e.start for e in after.entries} != {e.name: e.start for e in before.entries}
    assert {e.name: raw[e.start : e.stop] for e in after.entries} == {n: raw_bytes(t) for n, t in tensors.items()}


def test_compressed_records(saved: Path) -> None:
    archive(saved, records_of(saved), compression=zipfile.ZIP_DEFLATED)
    refused(saved, "record .* is compressed or encrypted")


@pytest.mark.parametrize("keep", [0, 3, 4, 100, 2000, -1, -30])
def test_truncated(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep] if keep else b"")
    refused(saved, "is no zip archive" if 0 <= keep < 4 else "is truncated or damaged")


def test_a_record_that_claims_more_than_the_file(saved: Path) -> None:
    raw = saved.read_bytes()
    with zipfile.ZipFile(saved) as found:
        info = next(i for i in found.infolist() if i.filename.endswith("/data/0"))
    entry = raw.rindex(b"PK\x01\x02", 0, raw.rindex(info.filename.encode()))
    grown = (len(raw)).to_bytes(4, "little") * 2
    saved.write_bytes(raw[: entry + 20] + grown + raw[entry + 28 :])
    refused(saved, "/data/0 ends at byte .* the file at .*truncated")


def test_records_that_overlap(saved: Path) -> None:
    raw = saved.read_bytes()
    with zipfile.ZipFile(saved) as found:
        infos = {i.filename.rpartition("/")[2]: i for i in found.infolist() if "/data/" in i.filename}
    entry = raw.rindex(b"PK\x01\x02", 0, raw.rindex(infos["1"].filename.encode()))
    saved.write_bytes(raw[: entry + 42] + infos["0"].header_offset.to_bytes(4, "little") + raw[entry + 46 :])
    refused(saved, "record .*/data/[01] overlaps record .*/data/[01]")


def test_a_tensor_that_claims_more_than_its_record(saved: Path) -> None:
    changed = [(n, d.replace(b"K(K2", b"K\xffK2") if n.endswith("data.pkl") else d) for n, d in records_of(saved)]
    assert changed != records_of(saved)
    archive(saved, changed)
    with pytest.raises(SourceError, match=r"which holds 8000|cannot be loaded as weights"):
        header_of(saved)


def test_no_description(saved: Path) -> None:
    archive(saved, [(name, data) for name, data in records_of(saved) if not name.endswith("data.pkl")])
    refused(saved, "expected one data.pkl in the archive, found 0")


def test_a_name_twice(saved: Path) -> None:
    records = records_of(saved)
    with pytest.warns(UserWarning, match=r"Duplicate name"):
        archive(saved, [*records, records[0]])
    refused(saved, "stands twice in the archive")


def test_big_endian(saved: Path) -> None:
    archive(saved, [(n, b"big" if n.endswith("byteorder") else d) for n, d in records_of(saved)])
    with pytest.raises(SourceError, match=r"expected the byte order 'little'"):
        header_of(saved)


def test_a_description_that_is_too_large(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [(n, d + b"." * 5000 if n.endswith("data.pkl") else d) for n, d in records_of(saved)]
    archive(saved, records)
    monkeypatch.setattr(torch_pickle, "MAX_PICKLE", 5000)
    monkeypatch.setattr(torch_pickle, "read", lambda *_: pytest.fail("the pickle was parsed"))
    refused(saved, "data.pkl has .* bytes, at most 5000 are allowed")


def test_a_directory_of_records_that_is_too_large(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle, "MAX_PICKLE", 100)
    refused(saved, "a part of .* bytes of the archive is to be read at once, at most 100")


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_are_read_or_refused_and_nothing_else(saved: Path, seed: int) -> None:
    """Damage anywhere but in the tensors' bytes ends in a plain error or in entries within the file."""
    raw = bytearray(saved.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    starts = [raw.find(b"data.pkl"), raw.rfind(b"PK\x01\x02") - 400]
    start = starts[seed % 2]
    for _ in range(1 + seed % 5):
        at = start + int(torch.randint(0, 400, (1,), generator=generator))
        raw[at % len(raw)] = int(torch.randint(0, 256, (1,), generator=generator))
    saved.write_bytes(bytes(raw))
    try:
        header = header_of(saved)
    except SourceError as error:
        assert str(error).startswith("primary: ")
        return
    assert all(0 <= entry.start <= entry.stop <= len(raw) for entry in header.entries)


def test_a_legacy_file_is_refused_unread(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    refused(tmp_path / "w.bin", "is no zip archive, which torch.save writes: a bare pickle")


def test_opening_a_checkpoint_reads_no_tensor_data(triple: Triple) -> None:
    big = torch.zeros(4_000_000)
    write_pickle(triple["base"], {**read_tensors(triple["base"]), "model.big": big})
    tally = Tally()
    with open_checkpoint("base", triple["base"], tally) as source:
        assert source.kind == "pickle"
        assert source.tensors["big"].nbytes == 16_000_000
    assert tally.read < 2_000_000
