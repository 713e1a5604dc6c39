"""`numerics="reference"` against the full-load baseline: the bytes that transformers and plain torch give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import full_load
import pytest
import torch
from helpers import edit_json, raw_bytes, read_tensors, write_tensors

import hsa
from hsa.reference import head_scores
from hsa.testing.whisper_checkpoints import SHAPES, WhisperShape, write_checkpoint, write_triple

Triple = dict[str, Path]
DTYPES = ("float32", "float16", "bfloat16")
ODD = WhisperShape(
    d_model=60,
    encoder_layers=3,
    decoder_layers=2,
    encoder_heads=5,
    decoder_heads=3,
    ffn_dim=34,
    vocab_size=SHAPES["test"].vocab_size,
    max_source_positions=50,
    max_target_positions=12,
)


def resave(triple: Mapping[str, Path], folder: Path, **options: Any) -> Triple:
    """The triple as transformers itself saves it."""
    for role, path in triple.items():
        full_load.load(path, "auto").save_pretrained(folder / role, **options)
    return {role: folder / role for role in triple}


@pytest.fixture(scope="module", params=DTYPES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """A triple of one element type saved by transformers; for reading alone.

    Task vectors as large as the weights themselves, so that neither `M1 - B` nor `B + tv1` is often exact.
    """
    folder = tmp_path_factory.mktemp(f"saved-{request.param}")
    made = write_triple(folder / "made", ODD, dtype=request.param)
    generator = torch.Generator().manual_seed(0)
    for role in ("primary", "secondary"):
        tensors = read_tensors(made[role])
        moved = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
        write_tensors(made[role], {name: tensor.to(tensors[name].dtype) for name, tensor in moved.items()})
    return resave(made, folder / "saved")


@pytest.fixture
def small(tmp_path: Path) -> Triple:
    """A float16 triple saved by transformers that a test may change."""
    made = write_triple(tmp_path / "made", SHAPES["test"], dtype="float16", delta=0.01)
    return resave(made, tmp_path / "saved")


def check(triple: Mapping[str, Path], folder: Path, *, load_dtype: str = "auto", **parameters: float) -> Path:
    """Merge both ways; every tensor, its name and its element type must agree. Returns our output."""
    theirs, ours = folder / "theirs", folder / "ours"
    full_load.full_load_merge(**triple, output=theirs, load_dtype=load_dtype, **parameters)
    report = hsa.merge(
        **triple,
        output=ours,
        numerics="reference",
        load_dtype=load_dtype,  # type: ignore[arg-type]
        sync=False,
        **parameters,  # type: ignore[arg-type]
    )
    assert report.parameters["load_dtype"] == load_dtype
    expected, found = read_tensors(theirs), read_tensors(ours)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(found[name]) == raw_bytes(tensor), name
    config = json_of(ours, "config.json")
    assert config.get("dtype", config.get("torch_dtype")) == json_of(theirs, "config.json")["dtype"]
    return ours


def json_of(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / name).read_text(encoding="utf-8"))


# --- bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load_dtype", ["auto", "float32"])
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"k": 0.3, "lam": 0.1, "alpha": 1.7},
        {"k": 0.0},
        {"k": 1.0, "lam": 0.0, "alpha": 0.5},
        {"k": 0.05, "lam": 1.0},
        {"lam": 0.3, "alpha": 0.0, "attention_scale": 0.7, "non_attention_scale": 1.3},
        {"k": 0.5, "attention_scale": -0.5, "non_attention_scale": 0.0},
        {"targets": "attention-qkv", "k": 0.3},
        {"targets": "attention-all", "k": 0.5, "lam": 0.1, "alpha": 0.9, "attention_scale": 0.7},
        {"num_heads": 2, "num_layers": 9, "lam": 0.2},
    ],
    ids=lambda parameters: "-".join(f"{name}={value}" for name, value in parameters.items()) or "defaults",
)
def test_bytes_are_the_scripts(saved: Triple, load_dtype: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    check(saved, tmp_path, load_dtype=load_dtype, **parameters)


def test_it_differs_from_exact_numerics_where_it_should(saved: Triple, tmp_path: Path) -> None:
    """Every tensor goes through `B + (M1 - B)`, which rounds: without this the comparisons above show little."""
    ours = check(saved, tmp_path)
    hsa.merge(**saved, output=tmp_path / "exact", sync=False)
    exact = read_tensors(tmp_path / "exact")
    different = [name for name, tensor in read_tensors(ours).items() if raw_bytes(tensor) != raw_bytes(exact[name])]
    assert any(full_load.TARGETS["encoder-qkv"].fullmatch(name) for name in different), different
    assert any(full_load.TARGETS["encoder-qkv"].fullmatch(name) is None for name in different), different


def test_reported_scores_are_those_of_the_loaders_type(saved: Triple, tmp_path: Path) -> None:
    """The script rounds a score some three times: each channel's norm, the sum of their squares, its root."""
    report = hsa.merge(**saved, output=tmp_path / "out", numerics="reference", sync=False)
    base, primary, secondary = (read_tensors(path) for path in saved.values())
    for name, tensor in report.tensors.items():
        exact = head_scores(base[name], primary[name], secondary[name], heads=5, dtype=torch.float64).sqrt().tolist()
        assert tensor.scores == pytest.approx(exact, rel=4 * torch.finfo(base[name].dtype).eps), name


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_no_byte(small: Triple, threads: int, tmp_path: Path) -> None:
    ours = check(small, tmp_path)
    hsa.merge(**small, output=tmp_path / "again", numerics="reference", threads=threads, sync=False)
    names = {path.name for path in ours.iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    assert all((ours / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_per_tensor_percentages_and_presets_beyond_the_script(small: Triple, tmp_path: Path) -> None:
    """What the script cannot do stays within rounding of the exact numerics."""
    options: dict[str, Any] = {"k": 60, "targets": "attention-all", "load_dtype": "float32"}
    hsa.merge(**small, output=tmp_path / "script", numerics="reference", sync=False, **options)
    del options["load_dtype"]
    hsa.merge(**small, output=tmp_path / "exact", dtype="float32", sync=False, **options)
    exact = read_tensors(tmp_path / "exact")
    changed = 0
    for name, tensor in read_tensors(tmp_path / "script").items():
        assert torch.allclose(tensor, exact[name], rtol=0, atol=2.0**-22), name
        changed += not torch.equal(tensor, read_tensors(small["primary"])[name].float())
    assert changed == 36  # every target, and nothing else: float32 holds the differences of float16 numbers


# --- how the loader reads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [("float16", "float32", "bfloat16"), ("float32", "float16", "float16")])
@pytest.mark.parametrize("load_dtype", ["float32"])
def test_sources_of_different_element_types(dtypes: tuple[str, ...], load_dtype: str, tmp_path: Path) -> None:
    triple = {
        role: write_checkpoint(tmp_path / role, SHAPES["test"], dtype=dtype, role=role, delta=0.01)  # type: ignore[arg-type]
        for role, dtype in zip(("base", "primary", "secondary"), dtypes, strict=True)
    }
    check(triple, tmp_path, load_dtype=load_dtype)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("claimed", DTYPES)
def test_auto_follows_the_config(small: Triple, key: str, claimed: str, tmp_path: Path) -> None:
    for path in small.values():
        edit_json(path / "config.json", dtype=None, torch_dtype=None)
        edit_json(path / "config.json", **{key: claimed})
    ours = check(small, tmp_path)
    assert {str(t.dtype) for t in read_tensors(ours).values()} == {f"torch.{claimed}"}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("first", DTYPES)
def test_auto_without_a_config_entry_follows_the_file(small: Triple, first: str, shards: int, tmp_path: Path) -> None:
    """transformers takes the first floating tensor of the first file: all three get that type here."""
    others = {"float32": torch.float16, "float16": torch.bfloat16, "bfloat16": torch.float32}[first]
    for path in small.values():
        edit_json(path / "config.json", dtype=None, torch_dtype=None)
        tensors = read_tensors(path)
        cast = {
            n: t.to(getattr(torch, first) if i % shards == 0 else others) for i, (n, t) in enumerate(tensors.items())
        }
        if shards == 1:  # one more type, in a tensor that is neither first by name nor first in the file
            cast["model.encoder.layer_norm.weight"] = cast["model.encoder.layer_norm.weight"].to(others)
        write_tensors(path, cast, shards=shards)
    ours = check(small, tmp_path)
    assert {str(t.dtype) for t in read_tensors(ours).values()} == {f"torch.{first}"}


def test_auto_without_a_config_entry_where_name_order_and_file_order_differ(small: Triple, tmp_path: Path) -> None:
    for path in small.values():
        edit_json(path / "config.json", dtype=None, torch_dtype=None)
        tensors = read_tensors(path)
        first = min(tensors)
        assert first == "model.decoder.embed_positions.weight"
        # The safetensors library stores wider types first, so float32 tensors stand before this one.
        write_tensors(path, {n: t.to(torch.bfloat16 if n == first else torch.float32) for n, t in tensors.items()})
    check(small, tmp_path)


# --- what comes from base ------------------------------------------------------------------------------------


def test_config_generation_config_and_head_counts_are_bases(small: Triple, tmp_path: Path) -> None:
    for path in (small["base"], small["primary"]):
        edit_json(path / "generation_config.json", max_length=7 if path == small["base"] else 9)
    edit_json(small["base"] / "config.json", encoder_attention_heads=8, note_of_base=1)
    for role in ("primary", "secondary"):
        edit_json(small[role] / "config.json", encoder_attention_heads=8, note_of_primary=1)
    ours = check(small, tmp_path)
    assert json_of(ours, "config.json") == json_of(small["base"], "config.json")
    assert (ours / "generation_config.json").read_bytes() == (small["base"] / "generation_config.json").read_bytes()
    report = hsa.merge(**small, output=tmp_path / "counted", numerics="reference", sync=False)
    assert {tensor.heads for tensor in report.tensors.values()} == {8}


def test_processor_files_are_primarys(tmp_path: Path) -> None:
    triple = write_triple(tmp_path / "made", SHAPES["test"])
    edit_json(triple["base"] / "preprocessor_config.json", note="base")
    edit_json(triple["primary"] / "preprocessor_config.json", note="primary")
    hsa.merge(**triple, output=tmp_path / "out", numerics="reference", sync=False)
    assert json_of(tmp_path / "out", "preprocessor_config.json")["note"] == "primary"


def test_float32_loading_is_named_in_the_config(small: Triple, tmp_path: Path) -> None:
    ours = check(small, tmp_path, load_dtype="float32")
    assert json_of(ours, "config.json")["dtype"] == "float32"
    assert json_of(small["base"], "config.json")["dtype"] == "float16"


def test_names_without_model_are_saved_as_transformers_saves_them(tmp_path: Path) -> None:
    triple = write_triple(tmp_path / "made", SHAPES["test"], prefix="", delta=0.01)
    ours = check(triple, tmp_path)
    assert all(name.startswith("model.") for name in read_tensors(ours))


@pytest.mark.parametrize("size", ["60KB", "200KB"])
def test_sharded_sources(small: Triple, size: str, tmp_path: Path) -> None:
    triple = resave(small, tmp_path / "sharded", max_shard_size=size)
    assert len(list(triple["base"].glob("*.safetensors"))) > 1
    mixed = {**triple, "secondary": small["secondary"]}
    ours = check(mixed, tmp_path)
    assert {p.name for p in ours.glob("*.safetensors*")} == {p.name for p in triple["base"].glob("*.safetensors*")}


def untie(path: Path, *, equal: bool, say_so: bool) -> None:
    """Store an output projection of its own, or a copy of the embedding."""
    tensors = read_tensors(path)
    embedding = tensors["model.decoder.embed_tokens.weight"]
    own = embedding.clone() if equal else (embedding + embedding.roll(1, 0)).contiguous()
    write_tensors(path, {**tensors, "proj_out.weight": own})
    edit_json(path / "config.json", tie_word_embeddings=not say_so)


@pytest.mark.parametrize("equal", [False, True], ids=["different", "equal"])
@pytest.mark.parametrize("say_so", [True, False], ids=["untied", "tied"])
def test_output_projection_stored_in_all_three(small: Triple, equal: bool, say_so: bool, tmp_path: Path) -> None:
    """Untied in name, in fact, in both or in neither: transformers decides which names are saved."""
    for path in small.values():
        untie(path, equal=equal, say_so=say_so)
    ours = check(small, tmp_path)
    assert ("proj_out.weight" in read_tensors(ours)) == (say_so or not equal)


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_tied_but_stored_in_one(small: Triple, role: str, tmp_path: Path) -> None:
    untie(small[role], equal=True, say_so=False)
    assert "proj_out.weight" not in read_tensors(check(small, tmp_path))


def test_untied_in_primary_alone_is_left_out_as_base_has_none(small: Triple, tmp_path: Path) -> None:
    untie(small["primary"], equal=False, say_so=True)
    assert "proj_out.weight" not in read_tensors(check(small, tmp_path))


# --- refusals ---------------------------------------------------------------------------------------------------


def test_a_tensor_missing_from_primary_is_an_error(small: Triple, tmp_path: Path) -> None:
    tensors = read_tensors(small["primary"])
    write_tensors(small["primary"], {n: t for n, t in tensors.items() if n != "model.encoder.layer_norm.weight"})
    with pytest.raises(hsa.MismatchError, match=r"encoder\.layer_norm\.weight"):
        hsa.merge(**small, output=tmp_path / "out", numerics="reference")
    assert not (tmp_path / "out").exists()


def test_another_vocabulary_is_an_error(tmp_path: Path) -> None:
    triple = write_triple(tmp_path / "made", SHAPES["test"])
    shutil.rmtree(triple["primary"])
    larger = replace(SHAPES["test"], vocab_size=300)
    write_checkpoint(triple["primary"], larger, role="primary")
    with pytest.raises(hsa.MismatchError, match=r"embed_tokens.*\[268, 64\].*\[300, 64\]"):
        hsa.merge(**triple, output=tmp_path / "out", numerics="reference")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_not_finite_targets_are_refused(small: Triple, role: str, tmp_path: Path) -> None:
    tensors = read_tensors(small[role])
    tensors["model.encoder.layers.1.self_attn.k_proj.weight"][40, 3] = float("nan")
    write_tensors(small[role], tensors)
    with pytest.raises(hsa.NonFiniteError, match=rf"{role} .*layers\.1\.self_attn\.k_proj\.weight, head 2"):
        hsa.merge(**small, output=tmp_path / "out", numerics="reference")
    assert not (tmp_path / "out").exists()


def test_a_result_that_overflows_the_loaders_type_is_refused(small: Triple, tmp_path: Path) -> None:
    with pytest.raises(hsa.NonFiniteError, match="overflows F16"):
        hsa.merge(**small, output=tmp_path / "out", numerics="reference", attention_scale=1e8)
    assert not (tmp_path / "out").exists()


def test_the_script_backend_is_the_cpus(small: Triple, tmp_path: Path) -> None:
    with pytest.raises(hsa.RequestError, match="reference"):
        hsa.merge(**small, output=tmp_path / "out", numerics="reference", backend="triton")
    with pytest.raises(hsa.RequestError, match="load_dtype"):
        hsa.merge(**small, output=tmp_path / "out", load_dtype="float32")
    with pytest.raises(hsa.RequestError, match="dtype"):
        hsa.merge(**small, output=tmp_path / "out", numerics="reference", dtype="float16")
    assert not (tmp_path / "out").exists()
