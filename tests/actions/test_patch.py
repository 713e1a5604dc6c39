"""Patches: `hsa.apply` writes what `hsa.merge` writes, byte for byte, and nothing else can be applied."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, merge_arguments, poke, read_tensors, run_hsa, snapshot, write_tensors
from safetensors import safe_open
from safetensors.torch import load_file

import hsa
from hsa.outputs import patch_format
from hsa.sources.small_file_checks import TOKENIZER_FILES
from hsa.system import manifest, staging
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

Triple = dict[str, Path]
NAME = "p.safetensors"


def both(triple: Triple, place: Path, **options: Any) -> tuple[Path, Path]:
    """A merge, and the output of its patch."""
    hsa.merge(**triple, output=place / "merged", sync=False, **options)
    hsa.merge_patch(**triple, output=place / NAME, sync=False, **options)
    hsa.apply(triple["primary"], place / NAME, output=place / "applied", sync=False)
    return place / "merged", place / "applied"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": "attention-qkv", "k": 0.3, "lam": 0.0},
        {"targets": "attention-all", "lam": 1.0, "alpha": 3},
        {"k": 0},
        {"k": 1, "alpha": 0},
        {"k": 60, "card": {"title": "A | *title*", "language": "en,de"}, "primary_id": "org/first@main"},
        {"max_shard_size": 50_000, "assets_from": "secondary"},
        {"threads": 1, "lam": 0.123456789},
        {"num_heads": 2, "num_layers": 9},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_the_output_is_that_of_the_merge(shared_triple: Triple, options: dict[str, Any], tmp_path: Path) -> None:
    merged, applied = both(shared_triple, tmp_path, **options)
    assert snapshot(merged) == snapshot(applied)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_types_and_sharded_sources(dtype: str, tmp_path: Path) -> None:
    triple = write_triple(tmp_path / "sources", SHAPES["test"], dtype=dtype, max_shard_bytes=40_000)
    assert len(list(triple["primary"].glob("*.safetensors"))) > 2
    merged, applied = both(triple, tmp_path, targets="attention-all")
    assert snapshot(merged) == snapshot(applied)


def test_mixed_element_types(triple: Triple, tmp_path: Path) -> None:
    """Each tensor of primary its own: wide ones first in the file, so that every one is aligned."""
    kinds = (torch.float16, torch.float32, torch.bfloat16)
    tensors = read_tensors(triple["primary"])
    write_tensors(triple["primary"], {n: t.to(kinds[i % 3]) for i, (n, t) in enumerate(tensors.items())})
    merged, applied = both(triple, tmp_path, targets="attention-all")
    assert snapshot(merged) == snapshot(applied)
    header, _ = _read(tmp_path / NAME)
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())


def test_ties_at_the_cut_are_all_in_the_patch(triple: Triple, tmp_path: Path) -> None:
    """More heads than were to be kept, which nobody knows before the scores."""
    for role in ("primary", "secondary"):
        tensors = read_tensors(triple["base"])  # task vectors of zeros: all scores are equal
        write_tensors(triple[role], {n: t if "_proj" in n else t + 1 for n, t in tensors.items()})
    report = hsa.merge_patch(**triple, output=tmp_path / "tied.safetensors", k=0.01, sync=False)
    assert report.selected_heads == report.total_heads > sum(t.keep for t in report.tensors.values())
    merged, applied = both(triple, tmp_path, k=0.01)
    assert snapshot(merged) == snapshot(applied)


def test_what_a_patch_holds(shared_triple: Triple, tmp_path: Path) -> None:
    """Merged rows by tensor, in order of heads, readable by the safetensors library; the document has the decisions."""
    report = hsa.merge_patch(**shared_triple, output=tmp_path / NAME, targets="attention-all", sync=False)
    hsa.merge(**shared_triple, output=tmp_path / "merged", targets="attention-all", sync=False)
    merged = read_tensors(tmp_path / "merged")
    patch = load_file(tmp_path / NAME)
    assert patch.keys() == report.tensors.keys()
    for name, tensor in report.tensors.items():
        whole, heads = merged[name], list(tensor.selected)
        if "out_proj" in name:
            expected = whole.view(whole.shape[0], tensor.heads, -1)[:, heads]
        else:
            expected = whole.view(tensor.heads, -1, *whole.shape[1:])[heads]
        assert torch.equal(patch[name], expected), name
    _, document = _read(tmp_path / NAME)
    recorded = json.loads((tmp_path / "merged" / "hsa_merge.json").read_text())
    assert document["targets"] == recorded["targets"] and list(document["targets"]) == list(recorded["targets"])
    for name, tensor in report.tensors.items():
        decision = document["targets"][name]["decision"]
        assert decision["selected"] == list(tensor.selected), name
        assert decision["scores"] == list(tensor.scores), name
        assert (decision["keep"], decision["margin"]) == (tensor.keep, tensor.margin), name


@pytest.mark.parametrize(
    ("k", "dtype", "most"), [(0.6, "float32", 1.02), (0.6, "float16", 1.02), (0.2, "float16", 1.03)]
)
def test_the_overhead_is_a_few_percent_for_the_smallest_whisper(
    k: float, dtype: str, most: float, tmp_path: Path
) -> None:
    triple = write_triple(tmp_path / "sources", SHAPES["tiny"], dtype=dtype)
    hsa.merge_patch(**triple, output=tmp_path / NAME, k=k, sync=False)
    with safe_open(tmp_path / NAME, "pt") as held:
        rows = sum(held.get_tensor(n).nbytes for n in held.keys())  # noqa: SIM118
    assert rows < (tmp_path / NAME).stat().st_size <= most * rows


def test_a_patch_reads_targets_alone(shared_triple: Triple, tmp_path: Path) -> None:
    report = hsa.merge_patch(**shared_triple, output=tmp_path / NAME, sync=False)
    targets = sum(t.nbytes for name, t in read_tensors(shared_triple["primary"]).items() if name in report.tensors)
    for role in ("base", "primary", "secondary"):
        small = sum(p.stat().st_size for p in shared_triple[role].iterdir() if p.suffix != ".safetensors")
        header = 8 + int.from_bytes((shared_triple[role] / "model.safetensors").read_bytes()[:8], "little")
        assert report.bytes_read_by_source[role] <= targets + header + 2 * small
    assert report.bytes_written == (tmp_path / NAME).stat().st_size


def test_the_same_merge_gives_the_same_patch(shared_triple: Triple, tmp_path: Path) -> None:
    for threads in (1, 3, 8):
        hsa.merge_patch(**shared_triple, output=tmp_path / f"{threads}.safetensors", threads=threads, sync=threads == 1)
    assert len({(tmp_path / f"{threads}.safetensors").read_bytes() for threads in (1, 3, 8)}) == 1
    assert sorted(os.listdir(tmp_path)) == ["1.safetensors", "3.safetensors", "8.safetensors"]


# --- another primary, damage ------------------------------------------------------------------------------------


def refused(triple: Triple, place: Path, message: str, patch: Path | None = None, **options: Any) -> None:
    before = snapshot(place)
    with pytest.raises(hsa.PatchError, match=message):
        hsa.apply(triple["primary"], patch or place / NAME, output=place / "applied", sync=False, **options)
    assert snapshot(place) == before
    assert not (place / "applied").exists()


@pytest.fixture
def patched(triple: Triple, tmp_path: Path) -> Path:
    place = tmp_path / "place"
    hsa.merge_patch(**triple, output=place / NAME, sync=False)
    return place


def test_another_primary_is_refused_by_its_targets(triple: Triple, patched: Path) -> None:
    """One bit of one target differs; header, sizes and names are the same."""
    poke(triple["primary"] / "model.safetensors", "model.encoder.layers.1.self_attn.v_proj.weight", 7, b"\0\0\0\0")
    refused(triple, patched, "was made for a primary named 'primary', and .* is not it: its target tensors hold other")


def test_another_primary_is_refused_by_its_files(triple: Triple, patched: Path) -> None:
    write_tensors(triple["primary"], read_tensors(triple["primary"]), shards=2)
    refused(triple, patched, "the size or the header of model-00001-of-00002.safetensors")


def test_another_size_of_model_is_refused(patched: Path, tmp_path: Path) -> None:
    other = write_triple(tmp_path / "other", SHAPES["demo"])
    refused(other, patched, r"tensor model.encoder.layers.0.self_attn.k_proj.weight F32 .* is model.encoder")


def test_base_and_secondary_are_refused_as_primary(triple: Triple, patched: Path) -> None:
    for role in ("base", "secondary"):
        refused({"primary": triple[role]}, patched, "is not it")


def test_any_flipped_bit_of_a_patch_is_found(triple: Triple, patched: Path) -> None:
    """In the header, its padding, the decisions and the rows; nothing is written."""
    path = patched / NAME
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    places = [*range(0, length, 61), *range(length, len(raw), 509), len(raw) - 1, len(raw) - 20]
    found = []
    for place in places:
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 7
        path.write_bytes(changed)
        try:
            hsa.apply(triple["primary"], path, output=patched / "applied", sync=False)
        except hsa.SourceError:
            assert not (patched / "applied").exists()
        else:
            shutil.rmtree(patched / "applied")
            found.append(place)
    assert found == []


@pytest.mark.parametrize("cut", [0, 7, 100, 5000, -1])
def test_a_truncated_patch_is_refused(triple: Triple, patched: Path, cut: int) -> None:
    path = patched / NAME
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(hsa.HeaderError, match=r"p\.safetensors"):
        hsa.apply(triple["primary"], path, output=patched / "applied")
    assert not (patched / "applied").exists()


def test_what_is_no_patch_is_refused(triple: Triple, patched: Path) -> None:
    weights = triple["primary"] / "model.safetensors"
    refused(triple, patched, "is no patch: its header has no hsa_patch", patch=weights)
    for missing in (patched / "nothing.safetensors", patched):
        with pytest.raises(hsa.SourceError, match="patch"):
            hsa.apply(triple["primary"], missing, output=patched / "applied")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header, json.loads(header.pop("__metadata__")[patch_format.KEY])


FORGED: list[tuple[str, Any]] = [
    ("format", 3),
    ("parameters", {}),
    ("targets", {}),
    ("targets", {"model.encoder.layers.0.self_attn.q_proj.weight": [4, 2, 0.5]}),
    ("targets", {"model.encoder.layers.0.self_attn.q_proj.weight": {"decision": {}}}),
    ("method", {}),
    ("method", {"name": "hsa", "version": 1, "by": "x"}),
    ("architecture", "bert"),
    ("anchor", "base"),
    ("anchor", "secondary"),
    ("base", None),
    ("base", "primary"),
    ("files", {"../evil": "0" * 64}),
    ("files", {"config.json": "0" * 64}),
    ("sources", {}),
    ("distances", {"all": [1, 2]}),
    ("distances", {"all": {"primary": 0.1, "secondary": 0.1}}),
    ("tensors_blake3", "0" * 64),
]


@pytest.mark.parametrize(("key", "value"), FORGED, ids=[f"{n}-{key}" for n, (key, _) in enumerate(FORGED)])
def test_a_sound_digest_does_not_make_a_document_true(triple: Triple, patched: Path, key: str, value: Any) -> None:
    """Somebody rewrote the document and its digest."""
    path = patched / NAME
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    header, document = _read(path)
    document[key] = value
    document["digest"] = manifest.document_digest(document)
    header["__metadata__"] = {"format": "pt", patch_format.KEY: json.dumps(document, separators=(",", ":"))}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[length:])
    with pytest.raises(hsa.SourceError, match=r"p\.safetensors|config\.json"):
        hsa.apply(triple["primary"], path, output=patched / "applied")
    assert not (patched / "applied").exists()


# --- small files ------------------------------------------------------------------------------------------------


def test_files_that_primary_lacks_are_asked_for(
    triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge took the tokenizer from base; `apply` has no base, and takes no other file in its place."""
    for name in TOKENIZER_FILES:
        (triple["primary"] / name).unlink(missing_ok=True)
    hsa.merge(**triple, output=tmp_path / "merged", sync=False)
    hsa.merge_patch(**triple, output=tmp_path / NAME, sync=False)
    with pytest.raises(hsa.SourceError, match=r"tokenizer.*json as the merge of base, primary, secondary wrote it"):
        hsa.apply(triple["primary"], tmp_path / NAME, output=tmp_path / "applied")
    hsa.apply(triple["primary"], tmp_path / NAME, output=tmp_path / "applied", assets=[triple["base"]], sync=False)
    assert snapshot(tmp_path / "merged") == snapshot(tmp_path / "applied")
    (tmp_path / "link").symlink_to(triple["base"])
    monkeypatch.chdir(tmp_path)
    for number, place in enumerate(("sources/base", "link", tmp_path / "link")):
        hsa.apply(triple["primary"], NAME, output=f"again{number}", assets=[place], sync=False)
        assert snapshot(tmp_path / "merged") == snapshot(tmp_path / f"again{number}")
    shutil.copytree(tmp_path / "merged", tmp_path / "giver")
    with pytest.raises(hsa.DestinationError, match="is the source"):
        hsa.apply(triple["primary"], NAME, output="giver", assets=["giver"], overwrite=True)
    assert snapshot(tmp_path / "giver") == snapshot(tmp_path / "merged")
    for wrong, message in (("nothing", "cannot be found"), (NAME, "is not a directory")):
        with pytest.raises(hsa.SourceError, match=message):
            hsa.apply(triple["primary"], NAME, output="never", assets=[wrong])
    edit_json(triple["base"] / "tokenizer_config.json", base=2)
    with pytest.raises(hsa.SourceError, match="with assets,"):
        hsa.apply(triple["primary"], tmp_path / NAME, output=tmp_path / "again", assets=[triple["base"]])


# --- what has no patch, and where one may be written ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attention-scale", "0.5"], "--attention-scale moves the heads that are not merged"),
        (["--non-attention-scale", "0.5"], "--non-attention-scale moves every other tensor"),
        (["--dtype", "float16"], "dtype casts every tensor"),
        (["--numerics", "reference"], "numerics 'reference' computes every tensor"),
        (["--backend", "triton"], "patches are made on the CPU"),
        (["--dry-run"], "--dry-run plans whole checkpoints"),
        (["--no-hash"], "--no-hash leaves out digests of whole files"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_has_no_patch_is_refused(shared_triple: Triple, flags: list[str], message: str, tmp_path: Path) -> None:
    done = run_hsa(*merge_arguments(shared_triple, tmp_path / NAME), "--patch", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert os.listdir(tmp_path) == []


def test_where_a_patch_may_be_written(triple: Triple, tmp_path: Path) -> None:
    def attempt(output: Path, message: str, **options: Any) -> None:
        with pytest.raises(hsa.DestinationError, match=message):
            hsa.merge_patch(**triple, output=output, sync=False, **options)

    attempt(tmp_path / "patch", r"expected one that ends in \.safetensors")
    attempt(triple["base"] / "p.safetensors", "lies in the source")
    attempt(triple["secondary"] / "deep" / "p.safetensors", "lies in the source")
    occupied = tmp_path / "a.safetensors"
    occupied.write_bytes(b"mine")
    attempt(occupied, "exists; choose another, or give overwrite=True")
    attempt(occupied, "is no patch of hsa", overwrite=True)
    folder = tmp_path / "b.safetensors"
    folder.mkdir()
    attempt(folder, "is a directory; a patch is one file", overwrite=True)
    assert occupied.read_bytes() == b"mine"
    hsa.merge_patch(**triple, output=tmp_path / NAME, sync=False)
    old = (tmp_path / NAME).read_bytes()
    hsa.merge_patch(**triple, output=tmp_path / NAME, sync=False, overwrite=True, lam=0.25)
    assert (tmp_path / NAME).read_bytes() != old
    with pytest.raises(hsa.DestinationError, match="contains the source"):
        hsa.apply(triple["primary"], tmp_path / NAME, output=tmp_path)
    with pytest.raises(hsa.DestinationError, match="source"):
        hsa.apply(triple["primary"], tmp_path / NAME, output=triple["primary"] / "out")


@pytest.mark.parametrize("threads", [0, 257, True, 1.5, "2"])
def test_bad_threads(triple: Triple, patched: Path, threads: Any) -> None:
    with pytest.raises(hsa.RequestError, match="threads must be a whole number from 1 to 256"):
        hsa.apply(triple["primary"], patched / NAME, output=patched / "applied", threads=threads)
    assert os.listdir(patched) == [NAME]


def test_two_runs_to_one_patch(shared_triple: Triple, tmp_path: Path) -> None:
    place = tmp_path / NAME
    with (
        staging.StagingDirectory(staging.hidden_sibling(place, staging.STAGING), place, sync=False),
        pytest.raises(hsa.DestinationError, match="another run is writing to"),
    ):
        hsa.merge_patch(**shared_triple, output=place, sync=False)
    hsa.merge_patch(**shared_triple, output=place, sync=False)
    assert os.listdir(tmp_path) == [NAME]


def test_what_a_killed_run_left_is_cleared(shared_triple: Triple, tmp_path: Path) -> None:
    left = tmp_path / f".{NAME}.hsa-staging"
    left.mkdir()
    (left / NAME).write_bytes(b"half")
    hsa.merge_patch(**shared_triple, output=tmp_path / NAME, sync=False)
    assert os.listdir(tmp_path) == [NAME]


def test_damage_in_a_source_leaves_nothing(triple: Triple, tmp_path: Path) -> None:
    nan = b"\x00\x00\xc0\x7f"
    poke(triple["secondary"] / "model.safetensors", "model.encoder.layers.0.self_attn.q_proj.weight", 3, nan)
    place = tmp_path / "place"
    with pytest.raises(hsa.NonFiniteError, match=r"q_proj.weight, head 0 holds NaN"):
        hsa.merge_patch(**triple, output=place / NAME)
    assert not place.exists()


def test_the_command_line(shared_triple: Triple, tmp_path: Path) -> None:
    done = run_hsa(*merge_arguments(shared_triple, tmp_path / NAME), "--patch", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["route"] == "patch file"
    arguments = ["apply", str(shared_triple["primary"]), str(tmp_path / NAME), "--output", str(tmp_path / "out")]
    done = run_hsa(*arguments, "--json", "--no-sync")
    report = json.loads(done.stdout)
    assert (done.returncode, report["route"], report["backend"]) == (0, "apply", "cpu")
    merged = json.loads(run_hsa(*merge_arguments(shared_triple, tmp_path / "merged"), "--json").stdout)
    same = ("selected_heads", "total_heads", "min_margin", "min_margin_tensor", "parameters", "target_tensors")
    assert {key: report[key] for key in same} == {key: merged[key] for key in same}
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "merged")
    done = run_hsa(*arguments)
    assert done.returncode == 2
    assert "is not empty" in done.stderr


def test_on_real_weights(real: Triple, tmp_path: Path) -> None:
    merged, applied = both(real, tmp_path)
    assert snapshot(merged) == snapshot(applied)
