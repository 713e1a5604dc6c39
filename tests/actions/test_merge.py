"""`hsa.merge` end to end, every tensor against the oracle."""

from __future__ import annotations

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import raw_bytes, read_tensors, same_tensors, snapshot, write_tensors
from merge_oracle import bare, canonical, check, check_loading, expected_merge, header, is_target, merge
from safetensors import safe_open

import hsa
from hsa.testing.whisper_checkpoints import SHAPES, WhisperShape, write_checkpoint, write_triple

Triple = dict[str, Path]
INDEX = "model.safetensors.index.json"
ODD = WhisperShape(
    d_model=30,
    encoder_layers=3,
    decoder_layers=2,
    encoder_heads=5,
    decoder_heads=3,
    ffn_dim=17,
    vocab_size=SHAPES["test"].vocab_size,
    max_source_positions=50,
    max_target_positions=12,
)


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors*"))}


@pytest.fixture(scope="module")
def odd_triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """Five and three heads of six and ten, float16; for reading alone."""
    return write_triple(tmp_path_factory.mktemp("odd"), ODD, dtype="float16", delta=0.004)


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "targets"), [("encoder-qkv", 15), ("attention-qkv", 35), ("attention-all", 42)])
@pytest.mark.parametrize("fixture", ["shared_triple", "odd_triple"])
def test_presets(fixture: str, preset: str, targets: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    report = check(request.getfixturevalue(fixture), tmp_path / "out", targets=preset)
    if fixture == "odd_triple":  # 3 encoder layers with 5 tensors; 2 decoder layers with 2 x 5; out_proj 3 + 2 x 2
        assert len(report.tensors) == targets
        assert report.total_heads == {"encoder-qkv": 75, "attention-qkv": 135, "attention-all": 162}[preset]
    assert 0 < report.selected_heads < report.total_heads


@pytest.mark.parametrize("preset", ["encoder-qkv", "attention-all"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize(("attention", "other"), [(1.0, 0.5), (-0.5, 1.0), (0.0, 0.0), (2.0, 1.25)])
def test_scales_and_casts(
    odd_triple: Triple, preset: str, dtype: str, attention: float, other: float, tmp_path: Path
) -> None:
    check(
        odd_triple,
        tmp_path / "out",
        targets=preset,
        dtype=dtype,
        attention_scale=attention,
        non_attention_scale=other,
    )


@pytest.mark.parametrize("parameters", [{"k": 0}, {"k": 1, "lam": 0.0, "alpha": 3.0}, {"k": 20}, {"alpha": 0.0}])
@pytest.mark.parametrize("fixture", ["shared_triple", "odd_triple"])
def test_parameters_at_their_ends(
    fixture: str, parameters: dict[str, float], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    triple = request.getfixturevalue(fixture)
    check(triple, tmp_path / "out", **parameters)
    if parameters == {"k": 0}:
        assert weights(tmp_path / "out") == weights(triple["primary"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_casts_are_named_in_config(shared_triple: Triple, dtype: str, tmp_path: Path) -> None:
    check(shared_triple, tmp_path / "out", dtype=dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((shared_triple["primary"] / "config.json").read_text())
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    assert keys
    assert {config[key] for key in keys} == {dtype}
    changed = {key for key in config if config[key] != before.get(key)}
    assert changed <= {"dtype", "torch_dtype"}


@pytest.mark.parametrize("dtypes", list(product(["float32", "float16", "bfloat16"], repeat=3))[1::4], ids="-".join)
def test_sources_of_different_element_types(dtypes: tuple[str, str, str], tmp_path: Path) -> None:
    triple = {
        role: write_checkpoint(tmp_path / role, SHAPES["test"], dtype=dtype, role=role, delta=0.01)
        for role, dtype in zip(("base", "primary", "secondary"), dtypes, strict=True)
    }
    check(triple, tmp_path / "out", targets="attention-all")
    check(triple, tmp_path / "scaled", non_attention_scale=0.5, attention_scale=2.0)


def test_element_types_may_differ_from_tensor_to_tensor(triple: Triple, tmp_path: Path) -> None:
    order = [torch.float32, torch.float16, torch.bfloat16]
    for shift, path in enumerate(triple.values()):
        tensors = read_tensors(path)
        write_tensors(path, {n: t.to(order[(i + shift) % 3]) for i, (n, t) in enumerate(sorted(tensors.items()))})
    check(triple, tmp_path / "out")
    check(triple, tmp_path / "all", targets="attention-all", attention_scale=0.5, dtype="bfloat16")


@pytest.mark.parametrize("prefixes", [("model.", "", "model."), ("", "model.", ""), ("", "", "model."), ("", "", "")])
def test_names_with_and_without_model(shared_triple: Triple, prefixes: tuple[str, str, str], tmp_path: Path) -> None:
    triple = {}
    for (role, path), prefix in zip(shared_triple.items(), prefixes, strict=True):
        triple[role] = Path(shutil.copytree(path, tmp_path / role))
        write_tensors(triple[role], {prefix + bare(name): t for name, t in read_tensors(path).items()})
    check(triple, tmp_path / "out", targets="attention-qkv", non_attention_scale=0.5)
    merge(shared_triple, tmp_path / "plain", targets="attention-qkv", non_attention_scale=0.5)
    expected = canonical(read_tensors(tmp_path / "plain"))
    assert {bare(n): raw_bytes(t) for n, t in read_tensors(tmp_path / "out").items()} == {
        name: raw_bytes(tensor) for name, tensor in expected.items()
    }


def test_head_and_layer_counts_can_be_overridden(shared_triple: Triple, tmp_path: Path) -> None:
    report = check(shared_triple, tmp_path / "out", num_heads=8, num_layers=5)
    assert {tensor.heads for tensor in report.tensors.values()} == {8}
    assert report.tensors["model.encoder.layers.1.self_attn.q_proj.weight"].coefficient == 0.5 ** (0.2 * (2 / 5))


def test_parameters_per_tensor(shared_triple: Triple, tmp_path: Path) -> None:
    names = [name for name in read_tensors(shared_triple["primary"]) if is_target(name, "attention-qkv")]
    k = {name: [0.0, 0.25, 0.6, 1.0][i % 4] for i, name in enumerate(names)}
    lam = {name: (i % 7) / 6 for i, name in enumerate(names)}
    alpha = {name: (i % 5) / 4 for i, name in enumerate(names)}
    report = check(shared_triple, tmp_path / "out", targets="attention-qkv", k=k, lam=lam, alpha=alpha)
    assert {len(tensor.selected) for tensor in report.tensors.values()} == {0, 1, 2, 4}
    stripped = {bare(name): value for name, value in k.items()}
    merge(shared_triple, tmp_path / "bare", targets="attention-qkv", k=stripped, lam=lam, alpha=alpha)
    assert weights(tmp_path / "bare") == weights(tmp_path / "out")
    partial = dict(list(k.items())[1:])
    with pytest.raises(hsa.RequestError, match=re.escape(bare(names[0]))):
        merge(shared_triple, tmp_path / "partial", targets="attention-qkv", k=partial)
    with pytest.raises(hsa.RequestError, match="decoder"):
        merge(shared_triple, tmp_path / "stranger", targets="encoder-qkv", k=k)
    assert not (tmp_path / "partial").exists() and not (tmp_path / "stranger").exists()


# --- identities of the method -------------------------------------------------------------------------------


def test_equal_fine_tunes_give_primary_up_to_rounding_and_base_gives_base(
    shared_triple: Triple, tmp_path: Path
) -> None:
    twice = {**shared_triple, "secondary": shared_triple["primary"]}
    check(twice, tmp_path / "out")
    primary = read_tensors(shared_triple["primary"])
    for name, tensor in read_tensors(tmp_path / "out").items():
        assert torch.allclose(tensor, primary[name], rtol=0, atol=2e-8), name
    nothing = {**shared_triple, "primary": shared_triple["base"], "secondary": shared_triple["base"]}
    report = check(nothing, tmp_path / "base")
    assert weights(tmp_path / "base") == weights(shared_triple["base"])
    assert sum("equal on all" in warning for warning in report.warnings) == 2


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_fine_tune_that_equals_base_is_reported(shared_triple: Triple, role: str, tmp_path: Path) -> None:
    report = merge({**shared_triple, role: shared_triple["base"]}, tmp_path / "out")
    assert [w for w in report.warnings if "base and" in w and f"is {role} really" in w]
    assert not any("equal on all" in warning for warning in merge(shared_triple, tmp_path / "usual").warnings)


# --- layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [(1, 1, 1), (1, 3, 2), (2, 1, 5), (4, 2, 1)])
def test_any_shard_layout_gives_the_same_tensors(
    shared_triple: Triple, shards: tuple[int, int, int], tmp_path: Path
) -> None:
    triple = {}
    for (role, path), count in zip(shared_triple.items(), shards, strict=True):
        triple[role] = Path(shutil.copytree(path, tmp_path / role))
        write_tensors(triple[role], read_tensors(path), shards=count)
    report = check(triple, tmp_path / "out", targets="attention-all")
    assert report.route == "patch"
    names = weights(triple["primary"]).keys()
    assert weights(tmp_path / "out").keys() == names
    for name in names:
        if name.endswith(".safetensors"):
            assert header(tmp_path / "out" / name) == header(triple["primary"] / name)
        else:
            assert (tmp_path / "out" / name).read_bytes() == (triple["primary"] / name).read_bytes()
    expected, _ = expected_merge(shared_triple, targets="attention-all")
    same_tensors(tmp_path / "out", expected)


@pytest.mark.parametrize("size", [1, 40_000, "0.1MB", "100KiB", "1GB"])
def test_max_shard_size(shared_triple: Triple, size: int | str, tmp_path: Path) -> None:
    limit = {"0.1MB": 100_000, "100KiB": 102_400, "1GB": 10**9}.get(str(size), size)
    check(shared_triple, tmp_path / "out", max_shard_size=size)
    files = sorted(path for path in (tmp_path / "out").glob("*.safetensors"))
    if size == "1GB":
        assert [path.name for path in files] == ["model.safetensors"]
        assert not (tmp_path / "out" / INDEX).exists()
    else:
        assert len(files) > 1
        assert [path.name for path in files] == [
            f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
        ]
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        placed, total = {}, 0
        for path in files:
            with safe_open(path, "pt") as opened:
                assert opened.metadata()["format"] == "pt"
                sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
                placed |= dict.fromkeys(opened.keys(), path.name)
            assert len(sizes) == 1 or sum(sizes) <= int(limit)
            total += sum(sizes)
        assert index["weight_map"] == placed
        assert index["metadata"]["total_size"] == total
    check_loading(tmp_path / "out")


def test_one_file_from_shards_and_a_cast_with_shards(shared_triple: Triple, tmp_path: Path) -> None:
    path = Path(shutil.copytree(shared_triple["primary"], tmp_path / "primary"))
    write_tensors(path, read_tensors(path), shards=3)
    triple = {**shared_triple, "primary": path}
    check(triple, tmp_path / "one", max_shard_size="1GB")
    assert weights(tmp_path / "one").keys() == {"model.safetensors"}
    check(triple, tmp_path / "cast", dtype="float16")
    index = json.loads((tmp_path / "cast" / INDEX).read_text())
    tensors = read_tensors(tmp_path / "cast")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == json.loads((path / INDEX).read_text())["weight_map"]
    check_loading(tmp_path / "cast")


@pytest.mark.parametrize("metadata", [None, {"maker": "x"}, {"format": "np", "maker": "ü"}])
def test_header_metadata_always_says_format_pt(triple: Triple, metadata: dict[str, str] | None, tmp_path: Path) -> None:
    write_tensors(triple["primary"], read_tensors(triple["primary"]), metadata=metadata)
    check(triple, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {**(metadata or {}), "format": "pt"}
    check_loading(tmp_path / "out")


# --- the same bytes, every time -----------------------------------------------------------------------------


def test_threads_change_no_byte(shared_triple: Triple, tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [{}, {"dtype": "float16", "max_shard_size": 50_000}]
    for number, option in enumerate(options):
        outputs = []
        for threads in (1, 2, 5):
            output = tmp_path / f"{number}-{threads}"
            merge(shared_triple, output, threads=threads, targets="attention-all", **option)
            outputs.append(snapshot(output))
        assert outputs[0] == outputs[1] == outputs[2]


def test_neither_place_nor_time_changes_a_byte(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = {"base_id": "org/base", "primary_id": "org/first@abc", "secondary_id": "org/second"}
    merge(shared_triple, tmp_path / "one", **ids, card={"language": "en"})
    elsewhere = {
        role: Path(shutil.copytree(path, tmp_path / f"other {role}" / f"checkpoint of {role}"))
        for role, path in shared_triple.items()
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    relative = {role: path.relative_to(tmp_path) for role, path in elsewhere.items()}
    merge(relative, Path("deep/another name"), **ids, card={"language": "en"}, threads=1)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "deep" / "another name")
    merge(shared_triple, tmp_path / "one", **ids, card={"language": "en"}, overwrite=True)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "deep" / "another name")


def test_sources_are_never_written(triple: Triple, tmp_path: Path) -> None:
    before = snapshot(tmp_path / "sources")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "sources").rglob("*")}
    merge(triple, tmp_path / "out", sync=True)
    assert snapshot(tmp_path / "sources") == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sources").rglob("*")} == stamps


# --- loading ------------------------------------------------------------------------------------------------


def test_output_loads_and_generates(shared_triple: Triple, tmp_path: Path) -> None:
    merge(shared_triple, tmp_path / "out", targets="attention-all")
    model = check_loading(tmp_path / "out")
    features = torch.zeros(1, SHAPES["test"].num_mel_bins, 2 * SHAPES["test"].max_source_positions)
    with torch.no_grad():
        logits = model(input_features=features, decoder_input_ids=torch.tensor([[1, 2]])).logits
    assert logits.shape == (1, 2, SHAPES["test"].vocab_size)
    assert torch.isfinite(logits).all()


def test_names_without_model_load_as_whisper_model(shared_triple: Triple, tmp_path: Path) -> None:
    from transformers import WhisperModel

    triple = {
        role: write_checkpoint(tmp_path / role, SHAPES["test"], role=role, prefix="")  # type: ignore[arg-type]
        for role in shared_triple
    }
    merge(triple, tmp_path / "out")
    _, info = WhisperModel.from_pretrained(tmp_path / "out", local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
