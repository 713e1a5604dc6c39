"""What `hsa.merge` only copies: other tensors, whatever they are called and hold, byte for byte."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import edit_json, read_tensors, write_tensors
from merge_oracle import check, check_loading, merge

import hsa
from hsa.testing.whisper_checkpoints import SHAPES, write_checkpoint

Triple = dict[str, Path]


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
