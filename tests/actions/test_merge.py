"""`hsa.merge` end to end, every tensor against the oracle."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit_json, merge_arguments, raw_bytes, read_tensors, run_hsa, same_tensors, snapshot, write_tensors
from safetensors import safe_open

import hsa
from hsa import reference
from hsa.testing.whisper_checkpoints import SHAPES, WhisperShape, write_checkpoint, write_triple

Triple = dict[str, Path]
INDEX = "model.safetensors.index.json"
ATTENTION = re.compile(
    r"(encoder|decoder)\.layers\.(\d+)\.(self_attn|encoder_attn)\.(q_proj|k_proj|v_proj|out_proj)\.(weight|bias)"
)
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


def bare(name: str) -> str:
    return name.removeprefix("model.")


def canonical(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {bare(name): tensor for name, tensor in tensors.items()}


def is_target(name: str, preset: str) -> bool:
    """SPEC section 1, the table of presets."""
    match = ATTENTION.fullmatch(bare(name))
    if match is None:
        return False
    stack, _, _, projection, part = match.groups()
    if projection == "out_proj":
        return preset == "attention-all" and part == "weight"
    return stack == "encoder" or preset != "encoder-qkv"


def expected_merge(
    triple: Mapping[str, Path],
    *,
    k: Any = 0.6,
    lam: Any = 0.5,
    alpha: Any = 0.2,
    targets: str = "encoder-qkv",
    attention_scale: float = 1.0,
    non_attention_scale: float = 1.0,
    dtype: str = "auto",
    num_heads: int | None = None,
    num_layers: int | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, reference.MergedTensor]]:
    """Every output tensor under primary's names, and what the oracle says of each target."""
    base, secondary = (canonical(read_tensors(triple[role])) for role in ("base", "secondary"))
    config = json.loads((triple["primary"] / "config.json").read_text())
    out_dtype = None if dtype == "auto" else getattr(torch, dtype)
    tensors, merged = {}, {}

    def value(parameter: Any, name: str) -> float:
        return parameter[name] if isinstance(parameter, Mapping) else parameter

    for name, primary in read_tensors(triple["primary"]).items():
        if not is_target(name, targets):
            if non_attention_scale == 1.0:
                cast = out_dtype is not None and primary.is_floating_point()
                tensors[name] = primary.to(out_dtype) if cast else primary
            else:
                tensors[name] = reference.merge_other(
                    base[bare(name)], primary, scale=non_attention_scale, out_dtype=out_dtype
                )
            continue
        stack, layer = bare(name).split(".")[0], int(bare(name).split(".")[2])
        merged[name] = reference.merge_tensor(
            base[bare(name)],
            primary,
            secondary[bare(name)],
            k=value(k, name),
            lam=value(lam, name),
            alpha=value(alpha, name),
            layer=layer,
            layers=num_layers or config[f"{stack}_layers"],
            heads=num_heads or config[f"{stack}_attention_heads"],
            head_axis=1 if "out_proj" in name else 0,
            attention_scale=attention_scale,
            out_dtype=out_dtype,
        )
        tensors[name] = merged[name].value
    return tensors, merged


def merge(triple: Mapping[str, Path], output: Path, **options: Any) -> hsa.MergeReport:
    """Without waiting for the disk: durability is another module's subject."""
    return hsa.merge(**triple, output=output, **{"sync": False, **options})


def check(triple: Mapping[str, Path], output: Path, **parameters: Any) -> hsa.MergeReport:
    """Merge, and compare every tensor, selection, score and margin with the oracle's."""
    report = merge(triple, output, **parameters)
    known = {key: value for key, value in parameters.items() if key not in ("threads", "max_shard_size", "sync")}
    tensors, merged = expected_merge(triple, **known)
    same_tensors(output, tensors)
    assert report.tensors.keys() == merged.keys()
    assert len(merged) > 0
    k = known.get("k", 0.6)
    for name, oracle in merged.items():
        ours = report.tensors[name]
        assert ours.selected == oracle.selected, name
        assert ours.scores == pytest.approx(oracle.squared_scores.sqrt().tolist(), rel=1e-12, abs=0)
        margin = reference.margin(oracle.squared_scores, k[name] if isinstance(k, Mapping) else k)
        assert ours.margin == (None if margin is None else pytest.approx(margin, rel=1e-6)), name
    return report


def header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


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


# --- what is only copied ------------------------------------------------------------------------------------


def test_untied_output_projection_is_copied_with_a_note(triple: Triple, tmp_path: Path) -> None:
    tensors = read_tensors(triple["primary"])
    untied = torch.randn(tensors["model.decoder.embed_tokens.weight"].shape)
    write_tensors(triple["primary"], {**tensors, "proj_out.weight": untied})
    edit_json(triple["primary"] / "config.json", tie_word_embeddings=False)
    report = check(triple, tmp_path / "out")
    assert any("proj_out.weight" in note for note in report.notes)
    assert torch.equal(read_tensors(tmp_path / "out")["proj_out.weight"], untied)
    model = check_loading(tmp_path / "out")
    assert torch.equal(model.proj_out.weight, untied)
    assert not any(
        "stores proj_out.weight" in note for note in merge({**triple, "primary": triple["base"]}, tmp_path / "x").notes
    )


@pytest.mark.parametrize("role", ["primary", "base", "secondary"])
@pytest.mark.parametrize(
    ("change", "name"),
    [({"vocab_size": 280}, "decoder.embed_tokens.weight"), ({"num_mel_bins": 128}, "encoder.conv1.weight")],
)
def test_another_vocabulary_or_mel_count_is_reported_and_merged(
    shared_triple: Triple, role: str, change: dict[str, int], name: str, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "other", replace(SHAPES["test"], **change), role=role)  # type: ignore[arg-type]
    triple = {**shared_triple, role: other}
    report = check(triple, tmp_path / "out")
    affected = ("base", "secondary") if role == "primary" else (role,)
    for source in affected:
        shapes = [read_tensors(triple[r])[f"model.{name}"].shape for r in ("primary", source)]
        (note,) = [n for n in report.notes if name in n and n.endswith(source)]
        assert all(str(list(shape)) in note for shape in shapes)
    check_loading(tmp_path / "out")
    if role != "secondary":
        with pytest.raises(hsa.MismatchError, match=re.escape(name)):
            merge(triple, tmp_path / "scaled", non_attention_scale=0.5)
        assert not (tmp_path / "scaled").exists()
    else:
        check(triple, tmp_path / "scaled", non_attention_scale=0.5)


@pytest.mark.parametrize("role", ["base", "secondary"])
def test_a_missing_tensor_that_is_no_target_is_copied(triple: Triple, role: str, tmp_path: Path) -> None:
    tensors = read_tensors(triple[role])
    gone = ["model.encoder.layer_norm.weight", "model.decoder.layers.0.fc1.bias"]
    write_tensors(triple[role], {name: tensor for name, tensor in tensors.items() if name not in gone})
    report = check(triple, tmp_path / "out", attention_scale=0.5)
    assert any("2 tensors of primary are missing from " + role in note for note in report.notes)
    if role == "secondary":
        check(triple, tmp_path / "scaled", non_attention_scale=0.5)
        return
    with pytest.raises(hsa.MismatchError, match="missing from base"):
        merge(triple, tmp_path / "scaled", non_attention_scale=0.5)
    assert not (tmp_path / "scaled").exists()


def test_extra_tensors_of_base_and_secondary_do_not_matter(triple: Triple, tmp_path: Path) -> None:
    for role in ("base", "secondary"):
        write_tensors(triple[role], {**read_tensors(triple[role]), "model.extra": torch.ones(3)})
    check(triple, tmp_path / "out")
    assert "model.extra" not in read_tensors(tmp_path / "out")


def test_nan_payloads_of_what_is_copied_survive_bit_for_bit(triple: Triple, tmp_path: Path) -> None:
    tensors = read_tensors(triple["primary"])
    payloads = torch.tensor(
        [0x7F800001, 0x7FC12345, -0x3FFFFF, 0x7F800000, -0x800000, -0x80000000, 1], dtype=torch.int32
    )
    for name in ("model.encoder.layer_norm.weight", "model.encoder.layers.0.self_attn.out_proj.bias"):
        tensors[name] = tensors[name].clone()
        tensors[name][: len(payloads)] = payloads.view(torch.float32)
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    layers = [f"model.{stack}.layers.{layer}." for stack in ("encoder", "decoder") for layer in (0, 1)]
    wide = [f"{layer}{name}.weight" for layer in layers for name in ("fc1", "fc2")]
    for name, part in zip(wide, patterns.view(torch.float16).chunk(len(wide)), strict=True):
        tensors[name] = part.clone().reshape(tensors[name].shape)
    for name, first in (("model.decoder.embed_tokens.weight", 0x7000), ("model.encoder.conv2.weight", 0xD000)):
        part = patterns[first : first + tensors[name].numel()]
        assert len(part) == tensors[name].numel()
        tensors[name] = part.view(torch.bfloat16).clone().reshape(tensors[name].shape)
    tensors["model.decoder.layer_norm.bias"] = torch.full((64,), math.nan, dtype=torch.float64)
    write_tensors(triple["primary"], tensors)
    report = check(triple, tmp_path / "out", targets="attention-all")
    assert report.route == "patch"
    check(triple, tmp_path / "shards", max_shard_size=20_000)


def test_a_nan_that_would_have_to_be_cast_or_scaled_is_refused(triple: Triple, tmp_path: Path) -> None:
    tensors = read_tensors(triple["primary"])
    tensors["model.encoder.layer_norm.weight"][3] = math.nan
    write_tensors(triple["primary"], tensors)
    merge(triple, tmp_path / "copied")
    for options in ({"dtype": "float16"}, {"non_attention_scale": 0.5}):
        with pytest.raises(hsa.NonFiniteError, match=r"primary .*model\.encoder\.layer_norm\.weight"):
            merge(triple, tmp_path / "out", **options)
        assert {path.name for path in tmp_path.iterdir()} == {"sources", "copied"}


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


def check_loading(output: Path) -> Any:
    """The model, loaded offline without a missing, unexpected or mismatched key, with the file's own numbers."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model, info = WhisperForConditionalGeneration.from_pretrained(
        output, dtype="auto", local_files_only=True, output_loading_info=True
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    state = model.state_dict()
    for name, tensor in read_tensors(output).items():
        assert torch.equal(state[name], tensor), name
    processor = WhisperProcessor.from_pretrained(output, local_files_only=True)
    assert processor.tokenizer.decode(processor.tokenizer("hello").input_ids, skip_special_tokens=True) == "hello"
    return model


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


# --- the report ---------------------------------------------------------------------------------------------


def header_size(path: Path) -> int:
    return len(header(path))


@pytest.mark.parametrize("shards", [1, 3])
def test_bytes_are_counted_exactly(triple: Triple, shards: int, tmp_path: Path) -> None:
    for path in triple.values():
        write_tensors(path, read_tensors(path), shards=shards)
    report = merge(triple, tmp_path / "out", targets="attention-qkv")
    files = list((tmp_path / "out").iterdir())
    assert report.bytes_written == sum(path.stat().st_size for path in files)

    allowed = dict.fromkeys(triple, 0)
    for role, path in triple.items():
        tensors = read_tensors(path)
        names = tensors if role == "primary" else [name for name in tensors if is_target(name, "attention-qkv")]
        allowed[role] += sum(tensors[name].nbytes for name in names)
        allowed[role] += sum(header_size(file) for file in path.glob("*.safetensors"))
        allowed[role] += sum(file.stat().st_size for file in (path / "config.json", path / INDEX) if file.exists())
    own = ("config.json", "generation_config.json")
    copied = [
        p for p in files if (triple["primary"] / p.name).exists() and (p.suffix != ".safetensors") and p.name != INDEX
    ]
    assert {path.name for path in copied} >= {*own, "vocab.json"}
    allowed["primary"] += sum(path.stat().st_size for path in copied)
    assert report.bytes_read_by_source == allowed
    assert report.bytes_read == sum(allowed.values())
    assert report.bytes_read < sum(f.stat().st_size for p in triple.values() for f in p.glob("*.safetensors"))


def test_report_fields(shared_triple: Triple, tmp_path: Path) -> None:
    report = merge(shared_triple, tmp_path / "out", k=0.25, lam=0.3, alpha=0.7, targets="attention-all")
    assert report.output == tmp_path / "out"
    assert (report.backend, report.device, report.route) == ("cpu", "cpu", "patch")
    assert 0 < report.seconds < 60
    assert 1 << 20 < report.peak_memory_bytes < 16 << 30
    assert report.selected_heads == sum(len(tensor.selected) for tensor in report.tensors.values())
    assert report.total_heads == 4 * len(report.tensors)
    tensor = report.tensors["model.decoder.layers.1.encoder_attn.out_proj.weight"]
    assert (tensor.stack, tensor.layer, tensor.kind, tensor.part) == ("decoder", 1, "encoder_attn.out_proj", "weight")
    assert (tensor.heads, tensor.keep, len(tensor.scores)) == (4, 1, 4)
    assert tensor.coefficient == 0.3 ** (0.7 * (2 / 2))
    narrowest = min((t for t in report.tensors.values()), key=lambda t: t.margin or 0)
    as_dict = report.as_dict()
    assert (as_dict["min_margin"], as_dict["min_margin_tensor"]) == (narrowest.margin, narrowest.name)
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert report.warnings == ()


def strong_heads(triple: Triple, strengths: list[float]) -> str:
    """Give one target tensor heads of exactly these strengths; its name."""
    name = "model.encoder.layers.0.self_attn.q_proj.weight"
    delta = torch.tensor(strengths).repeat_interleave(16)[:, None].expand(64, 64)
    for role, sign in (("base", 0.0), ("primary", 1.0), ("secondary", -1.0)):
        tensors = read_tensors(triple[role])
        tensors[name] = sign * delta
        write_tensors(triple[role], tensors)
    return name


def test_a_margin_below_the_tie_risk_warns(triple: Triple, tmp_path: Path) -> None:
    name = strong_heads(triple, [3.0, 1.0, 1.0 + 2e-6, 0.5])
    report = check(triple, tmp_path / "out", k=0.5)
    assert report.tensors[name].selected == (0, 2)
    assert 0 < report.as_dict()["min_margin"] < 1e-5
    assert report.as_dict()["min_margin_tensor"] == name
    (warning,) = (warning for warning in report.warnings if "margin" in warning)
    assert name in warning and warning.startswith("1 ")
    strong_heads(triple, [3.0, 1.0, 1.0 + 1e-4, 0.5])
    assert not any("margin" in warning for warning in merge(triple, tmp_path / "clear", k=0.5).warnings)


def test_ties_at_the_cut_are_noted(triple: Triple, tmp_path: Path) -> None:
    name = strong_heads(triple, [3.0, 1.0, 1.0, 0.5])
    report = check(triple, tmp_path / "out", k=0.5)
    assert report.tensors[name].selected == (0, 1, 2)
    assert any("tie" in note and name in note for note in report.notes)
    strong_heads(triple, [3.0, 2.0, 1.0, 0.5])
    assert not any("tie" in note for note in merge(triple, tmp_path / "clear", k=0.5).notes)


def test_progress_counts_up_to_the_bytes_to_write(shared_triple: Triple, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    merge(shared_triple, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert seen
    assert {total for _, total in seen} == {size}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == size


# --- the command line ---------------------------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else(shared_triple: Triple, tmp_path: Path) -> None:
    done = run_hsa(*merge_arguments(shared_triple, tmp_path / "out", "--json", "--no-sync"))
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert printed.keys() >= {
        *("output", "seconds", "bytes_read", "bytes_written", "peak_memory_bytes", "backend", "device"),
        *("target_tensors", "selected_heads", "total_heads", "min_margin", "min_margin_tensor"),
    }
    report = merge(shared_triple, tmp_path / "again")
    ours = {**report.as_dict(), "output": str(tmp_path / "out")}
    for key in ("seconds", "peak_memory_bytes"):
        assert printed.pop(key) > 0
        del ours[key]
    assert "--alpha 1 " in printed.pop("hint") and "alpha=1 " in ours.pop("hint")
    assert printed == ours
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "again")


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ([], {}),
        (["--dtype=float16", "--max-shard-size=50KB"], {"dtype": "float16", "max_shard_size": "50KB"}),
        (
            ["--targets=attention-all", "--non-attention-scale=0.5"],
            {"targets": "attention-all", "non_attention_scale": 0.5},
        ),
    ],
    ids=["patch", "cast", "scaled"],
)
def test_dry_run_writes_nothing_and_tells_the_truth(
    triple: Triple, more: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    done = run_hsa(*merge_arguments(triple, tmp_path / "out", "--dry-run", "--json", *more))
    assert (done.returncode, done.stderr) == (0, "")
    assert snapshot(tmp_path) == before
    plan = json.loads(done.stdout)
    report = merge(triple, tmp_path / "out", **options)
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert plan["files"] == files
    made_at_the_end = sum((tmp_path / "out" / name).stat().st_size for name in ("README.md", "hsa_merge.json"))
    assert plan["bytes_to_write"] == report.bytes_written - made_at_the_end
    assert plan["bytes_to_read"] == report.bytes_read
    assert (plan["route"], plan["backend"], plan["device"]) == (report.route, report.backend, report.device)
    assert plan["targets"] == {name: {"heads": t.heads, "keep": t.keep} for name, t in report.tensors.items()}
    assert (plan["target_tensors"], plan["total_heads"]) == (len(report.tensors), report.total_heads)
    assert plan["parameters"] == report.as_dict()["parameters"]
    assert plan["free_bytes"] > 0


def test_dry_run_in_words(triple: Triple, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    done = run_hsa(*merge_arguments(triple, tmp_path / "new" / "out", "--dry-run"))
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("nothing was written", "targets", "read", "write", "free", "route", "model.safetensors", "v_proj"):
        assert word in done.stdout
    assert snapshot(tmp_path) == before


def test_quiet_prints_warnings_alone(triple: Triple, tmp_path: Path) -> None:
    done = run_hsa(*merge_arguments(triple, tmp_path / "out", "--quiet", "--no-hash", "--no-sync"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "hsa_merge.json").exists()
    same = {**triple, "secondary": triple["base"]}
    done = run_hsa(*merge_arguments(same, tmp_path / "warned", "--quiet", "--no-sync"))
    assert (done.returncode, done.stdout) == (0, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("hsa: warning: ") and "secondary" in line


def test_words_name_heads_route_and_notes(triple: Triple, tmp_path: Path) -> None:
    done = run_hsa(*merge_arguments(triple, tmp_path / "out", "--no-hash", "--no-sync"))
    assert done.returncode == 0
    assert str(tmp_path / "out") in done.stdout and "heads merged" in done.stdout and "margin" in done.stdout
    assert [line for line in done.stderr.splitlines() if line.startswith("hsa: note: ") and "digest" in line]
    assert "\x1b" not in done.stdout + done.stderr


def test_command_line_options_reach_the_merge(shared_triple: Triple, tmp_path: Path) -> None:
    arguments = [
        *("--k=50", "--lambda=0.25", "--alpha=1.5", "--targets=attention-qkv", "--attention-scale=1.5"),
        *("--non-attention-scale=0.75", "--num-heads=8", "--num-layers=3", "--dtype=bfloat16", "--threads=2"),
        *("--max-shard-size=60KB", "--base-id=a/b", "--primary-id=c/d@e", "--secondary-id=f/g", "--card=language=en"),
        *("--assets-from=secondary", "--backend=cpu", "--device=cpu", "--no-sync", "--quiet"),
    ]
    done = run_hsa(*merge_arguments(shared_triple, tmp_path / "out", *arguments))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    merge(
        shared_triple,
        tmp_path / "api",
        k=50,
        lam=0.25,
        alpha=1.5,
        targets="attention-qkv",
        attention_scale=1.5,
        non_attention_scale=0.75,
        num_heads=8,
        num_layers=3,
        dtype="bfloat16",
        max_shard_size="60KB",
        base_id="a/b",
        primary_id="c/d@e",
        secondary_id="f/g",
        card={"language": "en"},
        assets_from="secondary",
    )
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "api")
    tensors, _ = expected_merge(
        shared_triple,
        k=50,
        lam=0.25,
        alpha=1.5,
        targets="attention-qkv",
        attention_scale=1.5,
        non_attention_scale=0.75,
        num_heads=8,
        num_layers=3,
        dtype="bfloat16",
    )
    same_tensors(tmp_path / "out", tensors)
