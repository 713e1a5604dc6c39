"""OpenAI's own files as base or secondary: the merge is that of the same checkpoint in Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import merged_bytes, openai_tensors, raw_bytes, read_tensors, run_hsa, write_openai, write_pickle
from transformers import WhisperForConditionalGeneration

import hsa
from hsa.architectures import openai_whisper
from hsa.architectures.whisper import WHISPER
from hsa.errors import RequestError, SourceError
from hsa.sources.checkpoint import WEIGHTS
from hsa.sources.lora import is_adapter
from hsa.sources.openai_file import is_openai_file, open_openai_file
from hsa.system.fsio import Tally
from hsa.testing.whisper_checkpoints import SHAPES, tensor_shapes, write_triple

Triple = dict[str, Path]


@pytest.mark.parametrize("shape", ["test", "large-v3"])
def test_every_tensor_has_its_name(shape: str) -> None:
    ours = tensor_shapes(SHAPES[shape])
    theirs = openai_tensors({name: torch.empty(0) for name in ours})
    assert [openai_whisper.from_openai(name) for name in theirs] == [WHISPER.canonical(name) for name in ours]
    assert len(set(theirs)) == len(ours)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("encoder.blocks.0.attn.query.weight", "encoder.layers.0.self_attn.q_proj.weight"),
        ("encoder.blocks.11.attn.key.weight", "encoder.layers.11.self_attn.k_proj.weight"),
        ("decoder.blocks.3.cross_attn.value.bias", "decoder.layers.3.encoder_attn.v_proj.bias"),
        ("decoder.blocks.3.cross_attn.out.weight", "decoder.layers.3.encoder_attn.out_proj.weight"),
        ("decoder.blocks.3.attn_ln.weight", "decoder.layers.3.self_attn_layer_norm.weight"),
        ("decoder.blocks.3.cross_attn_ln.bias", "decoder.layers.3.encoder_attn_layer_norm.bias"),
        ("decoder.blocks.3.mlp.0.weight", "decoder.layers.3.fc1.weight"),
        ("decoder.blocks.3.mlp.2.bias", "decoder.layers.3.fc2.bias"),
        ("decoder.blocks.3.mlp_ln.weight", "decoder.layers.3.final_layer_norm.weight"),
        ("encoder.conv1.weight", "encoder.conv1.weight"),
        ("encoder.positional_embedding", "encoder.embed_positions.weight"),
        ("decoder.positional_embedding", "decoder.embed_positions.weight"),
        ("decoder.token_embedding.weight", "decoder.embed_tokens.weight"),
        ("encoder.ln_post.bias", "encoder.layer_norm.bias"),
        ("decoder.ln.weight", "decoder.layer_norm.weight"),
        ("alignment_heads", None),
        ("encoder.blocks.0.attn.query", None),
        ("encoder.blocks.0.attn.query.scale", None),
        ("encoder.blocks.01.attn.query.weight", None),
        ("encoder.blocks.0.mlp.1.weight", None),
        ("encoder.layers.0.self_attn.q_proj.weight", None),
    ],
)
def test_names(theirs: str, ours: str | None) -> None:
    assert openai_whisper.from_openai(theirs) == ours


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("roles", [("base",), ("secondary",), ("base", "secondary")], ids="+".join)
@pytest.mark.parametrize(
    "parameters", [{}, {"targets": "attention-all", "non_attention_scale": 0.5}], ids=["targets", "everything"]
)
def test_the_merge_is_that_of_the_directories(
    tmp_path: Path, dtype: Any, roles: tuple[str, ...], parameters: dict[str, Any]
) -> None:
    triple = write_triple(tmp_path / "sources", SHAPES["test"], dtype=dtype)
    expected = merged_bytes(triple, tmp_path / "expected", **parameters)
    given = {**triple, **{role: write_openai(tmp_path / f"{role}.pt", triple[role]) for role in roles}}
    assert merged_bytes(given, tmp_path / "out", **parameters) == expected


def test_the_output_loads_in_transformers(triple: Triple, tmp_path: Path) -> None:
    triple["base"] = write_openai(tmp_path / "base.pt", triple["base"])
    expected = merged_bytes(triple, tmp_path / "out")
    model, info = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = model.state_dict()
    assert all(raw_bytes(state[name]) == data for name, data in expected.items())


def test_merger_reads_it(triple: Triple, tmp_path: Path) -> None:
    expected = {name: raw_bytes(t) for name, t in hsa.Merger(**triple).merge().items()}
    triple["base"] = write_openai(tmp_path / "base.pt", triple["base"])
    assert {name: raw_bytes(t) for name, t in hsa.Merger(**triple).merge().items()} == expected


def test_a_pickled_primary_on_an_openai_base_is_one_file(triple: Triple, tmp_path: Path) -> None:
    expected = merged_bytes(triple, tmp_path / "expected")
    write_pickle(triple["primary"], read_tensors(triple["primary"]), shards=2)
    triple["base"] = write_openai(tmp_path / "base.pt", triple["base"])
    assert merged_bytes(triple, tmp_path / "out") == expected
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == [WEIGHTS]


def test_other_buffers_are_ignored_and_noted(triple: Triple, tmp_path: Path) -> None:
    expected = merged_bytes(triple, tmp_path / "expected")
    triple["base"] = write_openai(tmp_path / "base.pt", triple["base"], {"alignment_heads": torch.zeros(2, 4).bool()})
    report = hsa.merge(output=tmp_path / "out", sync=False, **triple)
    assert {name: raw_bytes(tensor) for name, tensor in read_tensors(tmp_path / "out").items()} == expected
    assert "1 tensors of base have no place in Whisper, such as alignment_heads" in report.notes


def test_provenance_names_the_file_and_no_path(triple: Triple, tmp_path: Path) -> None:
    triple["base"] = write_openai(tmp_path / "folder" / "tiny.pt", triple["base"])
    merged_bytes(triple, tmp_path / "out")
    text = (tmp_path / "out" / "hsa_merge.json").read_text()
    source = json.loads(text)["sources"]["base"]
    assert (source["id"], source["format"], list(source["files"])) == ("tiny.pt", "openai", ["tiny.pt"])
    assert source["files"]["tiny.pt"]["bytes"] == triple["base"].stat().st_size
    assert str(tmp_path) not in text


def test_the_output_may_lie_beside_the_file(triple: Triple, tmp_path: Path) -> None:
    triple["base"] = write_openai(tmp_path / "base.pt", triple["base"])
    done = run_hsa("merge", *(f"--{role}={path}" for role, path in triple.items()), f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr


def test_a_directory_whose_name_ends_in_pt_is_a_directory(triple: Triple, tmp_path: Path) -> None:
    expected = merged_bytes(triple, tmp_path / "expected")
    triple["primary"] = triple["primary"].rename(tmp_path / "run.pt")
    assert merged_bytes(triple, tmp_path / "out") == expected


def test_shapes_of_a_source_given(tmp_path: Path) -> None:
    assert is_openai_file("small.pt")
    assert is_openai_file(tmp_path / "gone.pt")
    assert not is_openai_file(tmp_path / "model.safetensors")
    assert not is_openai_file("openai/whisper-small")
    assert not is_adapter("~nobody-of-that-name/x")
    assert not is_adapter("x" * 300)


def test_primary_is_refused_with_the_reason(triple: Triple, tmp_path: Path) -> None:
    path = write_openai(tmp_path / "primary.pt", triple["primary"])
    with pytest.raises(RequestError, match=r"can be base or a further model: the output takes its config.json"):
        open_openai_file("primary", path, Tally())


def test_reference_numerics_are_refused(triple: Triple, tmp_path: Path) -> None:
    triple["base"] = write_openai(tmp_path / "base.pt", triple["base"])
    with pytest.raises(RequestError, match=r"base .*base.pt: numerics 'reference' repeats a script"):
        hsa.merge(output=tmp_path / "out", numerics="reference", **triple)


@pytest.mark.parametrize("value", [None, 0, -1, True, 2.0, "4"])
def test_bad_dimensions(triple: Triple, tmp_path: Path, value: object) -> None:
    path = write_openai(tmp_path / "base.pt", triple["base"], n_audio_head=value)
    with pytest.raises(SourceError, match=r"dims has n_audio_head = .*, expected a positive whole number"):
        open_openai_file("base", path, Tally())
