"""Tensor names of Whisper: which are projections, which a preset merges, and what config.json says."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from hsa.architectures.base import PRESETS, ModelCounts, Preset, TensorPlace
from hsa.architectures.whisper import WHISPER
from hsa.errors import SourceError
from hsa.testing.whisper_checkpoints import SHAPES, WhisperShape, tensor_shapes

UNEVEN = WhisperShape(
    d_model=30, encoder_layers=3, decoder_layers=2, encoder_heads=5, decoder_heads=3, ffn_dim=7, vocab_size=20
)


def targets(shape: WhisperShape, preset: Preset) -> dict[str, TensorPlace]:
    return {name: place for name in tensor_shapes(shape) if (place := WHISPER.target(name, preset)) is not None}


def attention(stack: str, layers: int, blocks: tuple[str, ...], *, out: bool) -> set[str]:
    """The target names of a stack, spelled out: k_proj has no bias, the bias of out_proj is no target."""
    parts = ["q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias"]
    parts += ["out_proj.weight"] if out else []
    return {f"model.{stack}.layers.{i}.{block}.{part}" for i in range(layers) for block in blocks for part in parts}


@pytest.mark.parametrize("shape", [UNEVEN, SHAPES["test"], SHAPES["tiny"], SHAPES["large-v3-turbo"]])
def test_presets_merge_exactly_these_tensors(shape: WhisperShape) -> None:
    both = ("self_attn", "encoder_attn")
    encoder = attention("encoder", shape.encoder_layers, ("self_attn",), out=False)
    decoder = attention("decoder", shape.decoder_layers, both, out=False)
    everything = attention("encoder", shape.encoder_layers, ("self_attn",), out=True)
    everything |= attention("decoder", shape.decoder_layers, both, out=True)
    assert set(targets(shape, "encoder-qkv")) == encoder
    assert set(targets(shape, "attention-qkv")) == encoder | decoder
    assert set(targets(shape, "attention-all")) == everything


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        ("tiny", (20, 60, 72)),
        ("base", (30, 90, 108)),
        ("large-v3", (160, 480, 576)),
        ("large-v3-turbo", (160, 200, 240)),
    ],
)
def test_presets_by_number(size: str, counts: tuple[int, ...]) -> None:
    """Five tensors per attention block (six with out_proj), one block per encoder layer, two per decoder layer."""
    shape = SHAPES[size]
    assert tuple(len(targets(shape, preset)) for preset in PRESETS) == counts
    blocks = shape.encoder_layers + 2 * shape.decoder_layers
    assert counts == (5 * shape.encoder_layers, 5 * blocks, 6 * blocks)


def test_each_kind_stands_once_in_each_block() -> None:
    found = Counter((p.stack, p.layer, p.block, p.kind, p.part) for p in targets(UNEVEN, "attention-all").values())
    assert set(found.values()) == {1}
    assert ("encoder", 0, "self_attn", "k", "bias") not in found
    assert not [key for key in found if key[3:] == ("out", "bias")]


@pytest.mark.parametrize("preset", PRESETS)
def test_both_name_forms_mean_the_same(preset: Preset) -> None:
    for name, projection in targets(UNEVEN, preset).items():
        bare = name.removeprefix("model.")
        assert WHISPER.canonical(name) == WHISPER.canonical(bare) == bare
        assert WHISPER.place(bare) == projection
        assert projection.name == bare


def test_a_projection_says_what_its_name_says() -> None:
    found = WHISPER.place("model.decoder.layers.11.encoder_attn.v_proj.bias")
    assert found == TensorPlace(
        *("decoder.layers.11.encoder_attn.v_proj.bias", "decoder", 11, "encoder_attn", "v", "bias"),
        presets=frozenset({"attention-qkv", "attention-all"}),
    )
    assert found.module == "v_proj"


@pytest.mark.parametrize(("kind", "axis"), [("q", 0), ("k", 0), ("v", 0), ("out", 1)])
def test_heads_are_rows_but_columns_in_the_output_projection(kind: str, axis: int) -> None:
    projection = WHISPER.place(f"encoder.layers.0.self_attn.{kind}_proj.weight")
    assert projection is not None
    assert projection.head_axis == axis


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_bias_of_the_output_projection_is_a_projection_but_no_target(stack: str, preset: Preset) -> None:
    projection = WHISPER.place(f"model.{stack}.layers.0.self_attn.out_proj.bias")
    assert projection is not None
    assert preset not in projection.presets
    assert WHISPER.target(projection.name, preset) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model.",
        "model.encoder.layers.0.encoder_attn.q_proj.weight",
        "model.model.encoder.layers.0.self_attn.q_proj.weight",
        "whisper.encoder.layers.0.self_attn.q_proj.weight",
        "model.encoder.layers.0.self_attn.q_proj.weight_scale",
        "model.encoder.layers.0.self_attn.q_proj.weight\n",
        "model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "model.encoder.layers.0.self_attn.q_proj.base_layer.weight",
        "model.encoder.layers.0.self_attn.qkv_proj.weight",
        "model.encoder.layers.-1.self_attn.q_proj.weight",
        "model.encoder.layers.01.self_attn.q_proj.weight",
        "model.encoder.layers.1_0.self_attn.q_proj.weight",
        "model.encoder.layers.\u0661.self_attn.q_proj.weight",
        "model.encoder.layers.9999999.self_attn.q_proj.weight",
        "model.encoder.layers..self_attn.q_proj.weight",
        "model.encoder.layers.0.self_attn_layer_norm.weight",
        "model.encoder.layers.0.self_attn.Q_proj.weight",
        "model.encoderXlayers.0.self_attn.q_proj.weight",
        "model.encoder.conv1.weight",
        "model.decoder.embed_tokens.weight",
        "proj_out.weight",
    ],
)
def test_names_that_are_no_projection(name: str) -> None:
    assert WHISPER.place(name) is None


def test_every_other_tensor_of_a_checkpoint_is_no_projection() -> None:
    names = [name for name in tensor_shapes(UNEVEN) if "_attn." not in name]
    assert len(names) > 20
    assert [name for name in names if WHISPER.place(name) is not None] == []


# config.json -----------------------------------------------------------------------------------------------


def config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "whisper",
        "encoder_attention_heads": 5,
        "decoder_attention_heads": 3,
        "encoder_layers": 4,
        "decoder_layers": 2,
        **changes,
    }


def test_heads_and_layers_of_each_stack() -> None:
    found = WHISPER.counts(config(), "primary /x")
    assert found == ModelCounts({"encoder": 5, "decoder": 3}, {"encoder": 4, "decoder": 2})


@pytest.mark.parametrize("model_type", ["bert", "Whisper", None, 1, ["whisper"]])
def test_another_model_type_is_refused(model_type: Any) -> None:
    with pytest.raises(SourceError, match=rf"^primary /x is .*model_type {re.escape(repr(model_type))}.*'whisper'"):
        WHISPER.counts(config(model_type=model_type), "primary /x")


@pytest.mark.parametrize("key", [key for key in config() if key != "model_type"])
@pytest.mark.parametrize("value", [0, -1, 4.0, True, "4", None, [4]])
def test_a_count_that_is_no_positive_whole_number_is_refused(key: str, value: Any) -> None:
    with pytest.raises(SourceError, match=rf"^primary /x: config.json has {key} = {re.escape(repr(value))}, expected"):
        WHISPER.counts(config(**{key: value}), "primary /x")


def test_a_missing_count_is_refused() -> None:
    incomplete = config()
    del incomplete["decoder_layers"]
    with pytest.raises(SourceError, match="decoder_layers = None"):
        WHISPER.counts(incomplete, "primary /x")
