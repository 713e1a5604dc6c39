"""Models that are of no family with heads: what their names, layers and configs say, and how they are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_tensors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hsa.architectures.generic import GENERIC
from hsa.architectures.registry import architecture_of, architecture_of_names, not_with_heads
from hsa.architectures.whisper import WHISPER
from hsa.sources.any_small_files import describe, is_licence, is_vocabulary, wanted
from hsa.sources.quantized import quantized
from hsa.testing.llama_checkpoints import LlamaShape, tensor_shapes, write_llama


def names_of(model: torch.nn.Module) -> list[str]:
    return list(model.state_dict())


def small_models() -> dict[str, torch.nn.Module]:
    """Models of other families, as transformers names their tensors."""
    vit = ViTConfig(hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=7, image_size=32)
    gpt2 = GPT2Config(n_embd=12, n_layer=2, n_head=2, vocab_size=31, n_positions=9)
    t5 = T5Config(d_model=12, d_kv=6, num_heads=2, num_layers=2, num_decoder_layers=3, d_ff=7, vocab_size=31)
    return {
        "vit": ViTForImageClassification(vit),
        "gpt2": GPT2LMHeadModel(gpt2),
        "t5": T5ForConditionalGeneration(t5),
    }


def test_the_made_up_llama_has_the_tensors_of_transformers(tmp_path: Path) -> None:
    for tied in (False, True):
        path = write_llama(tmp_path / str(tied), LlamaShape(tied=tied))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, local_files_only=True))
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if tied:
            del expected["lm_head.weight"]
        assert {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()} == expected
        assert tensor_shapes(LlamaShape(tied=tied)) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("vit", {"vit.layers": 3}), ("gpt2", {"transformer": 2}), ("t5", {"encoder": 2, "decoder": 3})],
)
def test_layers_are_read_from_the_names_of_transformers(kind: str, expected: dict[str, int]) -> None:
    places = [GENERIC.layer_of(GENERIC.canonical(name)) for name in names_of(small_models()[kind])]
    found: dict[str, int] = {}
    for stack, layer in filter(None, places):
        found[stack] = max(found.get(stack, 0), layer + 1)
    assert sorted(found.values()) == sorted(expected.values())
    if kind != "vit":  # whose stack has moved between versions of transformers
        assert found == expected


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("layers.11.mlp.up_proj.weight", ("model", 11)),
        ("h.0.attn.c_attn.weight", ("model", 0)),
        ("bert.encoder.layer.3.output.dense.bias", ("bert.encoder", 3)),
        ("transformer.blocks.7.norm_1.weight", ("transformer", 7)),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", ("encoder", 1)),
        ("swin.encoder.layers.2.blocks.5.output.dense.weight", ("swin.encoder", 2)),
        ("embed_tokens.weight", None),
        ("feature_extractor.conv_layers.0.conv.weight", None),
        ("layers.01.weight", None),
        ("layers.9999999.weight", None),
        ("", None),
    ],
)
def test_a_name_tells_stack_and_layer(name: str, place: tuple[str, int] | None) -> None:
    assert GENERIC.layer_of(name) == place


def test_layers_of_whisper_are_found_in_tensors_that_are_no_projections_too() -> None:
    assert WHISPER.layer_of("decoder.layers.3.final_layer_norm.bias") == ("decoder", 3)
    assert WHISPER.layer_of("decoder.embed_tokens.weight") is None


def test_no_tensor_of_a_llama_is_a_projection_and_every_name_is_known() -> None:
    for name in tensor_shapes(LlamaShape()):
        assert GENERIC.place(name) is None
        assert GENERIC.knows(GENERIC.canonical(name))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ("model", "attention")),
        ("model.layers.3.mlp.up_proj.weight", ("model", "feed-forward")),
        ("model.layers.3.input_layernorm.weight", ("model", "norm")),
        ("transformer.h.0.ln_1.weight", ("transformer", "norm")),
        ("model.embed_tokens.weight", ("model", "embedding")),
        ("lm_head.weight", ("model", "output projection")),
        ("vit.embeddings.patch_embeddings.projection.bias", ("model", "embedding")),
        ("strange", ("model", "other")),
    ],
)
def test_every_tensor_has_a_kind(name: str, group: tuple[str, str]) -> None:
    assert GENERIC.group_of(name) == group


def test_what_wrappers_add_to_names_is_removed_but_not_the_models_own_parts() -> None:
    assert GENERIC.plain_names(["_orig_mod.model.norm.weight"]) == {"_orig_mod.model.norm.weight": "model.norm.weight"}
    own = ["model.module.weight", "lm_head.weight"]
    assert GENERIC.plain_names(own) == dict(zip(own, own, strict=True))
    assert GENERIC.plain_names(["module.a.weight", "module.b.weight"])["module.b.weight"] == "b.weight"
    assert GENERIC.plain_names([]) == {}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, ("LlamaForCausalLM", "text-generation", "AutoTokenizer")),
        ({"architectures": ["ViTForImageClassification"]}, (None, "image-classification", "AutoImageProcessor")),
        ({"architectures": ["Wav2Vec2ForCTC"]}, (None, "automatic-speech-recognition", "AutoProcessor")),
        ({"architectures": ["T5ForConditionalGeneration"]}, ("T5ForConditionalGeneration", "", "")),
        ({"architectures": []}, ("AutoModel", "", "")),
        ({"architectures": "LlamaForCausalLM"}, ("AutoModel", "", "")),
        ({"architectures": ["x\n`rm`"]}, ("AutoModel", "", "")),
        ({}, ("AutoModel", "", "")),
    ],
)
def test_the_class_of_a_config(config: dict[str, Any], expected: tuple[str | None, str, str]) -> None:
    name, task, processor = expected
    found = GENERIC.model_class(config)
    assert (found.task, found.processor) == (task, processor)
    assert found.name == (name or config["architectures"][0])
    assert not found.custom_code
    assert found.reads_tokens == (processor in ("AutoTokenizer", "AutoProcessor"))


def test_a_class_of_the_models_own_code_is_loaded_by_the_auto_class_that_leads_to_it() -> None:
    auto_map = {
        "AutoConfig": "configuration_mine.MineConfig",
        "AutoModel": "modeling_mine.MineModel",
        "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
    }
    found = GENERIC.model_class({"architectures": ["MineForCausalLM"], "auto_map": auto_map})
    assert (found.name, found.custom_code) == ("AutoModelForCausalLM", True)
    assert not GENERIC.model_class({"auto_map": {"AutoConfig": "a.B"}}).custom_code


@pytest.mark.parametrize("model_type", ["llama", "bert", None, 7, "Whisper"])
def test_any_other_model_type_is_generic(model_type: Any) -> None:
    assert architecture_of({"model_type": model_type}) is GENERIC
    assert repr(model_type) in GENERIC.kind({"model_type": model_type})


def test_a_whisper_is_a_whisper_by_its_config_or_its_names() -> None:
    assert architecture_of({"model_type": "whisper"}) is WHISPER
    assert architecture_of_names(["model.encoder.conv1.weight", "extra"]) is WHISPER
    assert architecture_of_names(tensor_shapes(LlamaShape())) is GENERIC
    assert architecture_of_names([]) is GENERIC


def test_the_error_for_models_without_heads_names_the_families_that_have_some() -> None:
    text = str(not_with_heads({"model_type": "llama"}, "base here"))
    assert (
        text == "base here is not a Whisper checkpoint: its config.json has model_type 'llama', supported is 'whisper'"
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tie_word_embeddings": True}, ("lm_head.weight", "embed_tokens.weight")),
        ({"tie_word_embeddings": False}, None),
        ({}, None),
        ({"tie_word_embeddings": "yes"}, None),
    ],
)
def test_an_output_may_be_tied_only_where_the_config_says_so(config: Any, expected: Any) -> None:
    names = ["embed_tokens.weight", "layers.0.mlp.up_proj.weight", "lm_head.weight"]
    assert GENERIC.tied_output(names, config) == expected
    assert GENERIC.tied_output(names[:2], config) is None


# --- small files ------------------------------------------------------------------------------------------------


def test_small_files_of_a_repository_are_told_by_their_names() -> None:
    files = {
        *("config.json", "model.safetensors", "README.md", "optimizer.pt", "trainer_state.json", "notes.txt"),
        *("tokenizer.model", "qwen.tiktoken", "vocab.txt", "chat_template.jinja", "LICENSE.txt", "modeling_mine.py"),
        *("preprocessor_config.json", "sub/tokenizer.json", "original/tokenizer.model"),
    }
    taken = {"tokenizer.model", "qwen.tiktoken", "vocab.txt", "chat_template.jinja", "LICENSE.txt"}
    taken |= {"preprocessor_config.json"}
    assert set(wanted(files, {})) == taken
    assert set(wanted(files, {"auto_map": {}})) == {*taken, "modeling_mine.py"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LICENSE", "terms of use"),
        ("USE_POLICY.md", "terms of use"),
        ("spiece.model", "tokenizer"),
        ("chat_template.json", "chat template"),
        ("video_preprocessor_config.json", "processor"),
        ("tokenization_mine.py", "code of the model"),
    ],
)
def test_the_card_says_what_a_small_file_is(name: str, text: str) -> None:
    assert describe(name) == text
    assert is_licence(name) == (text == "terms of use")
    assert is_vocabulary(name) == (name == "spiece.model")


# --- quantised weights ------------------------------------------------------------------------------------------


class _Holder:
    """As much of a checkpoint as is looked at."""

    def __init__(self, config: dict[str, Any], **tensors: tuple[str, tuple[int, ...]]) -> None:
        from hsa.architectures.base import TensorInfo

        self.config = config
        self.tensors = {name: TensorInfo(name, *about) for name, about in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"a.weight": ("I8", (4, 4)), "a.SCB": ("F32", (4,))}, {"a.weight": "I8, with a.SCB"}),
        ({"a.weight": ("U8", (8, 1)), "a.weight.absmax": ("F32", (1,))}, {"a.weight": "U8, with a.weight.absmax"}),
        (
            {"a.qweight": ("I32", (4, 4)), "a.qzeros": ("I32", (1, 4)), "a.scales": ("F16", (1, 4))},
            {"a.qweight": "I32, with a.scales"},
        ),
        (
            {"a.weight": ("F8_E4M3", (4, 4)), "a.weight_scale_inv": ("F32", (1, 1))},
            {"a.weight": "F8_E4M3, with a.weight_scale_inv"},
        ),
        ({"a_blocks": ("U8", (4, 4)), "a_scales": ("U8", (4,))}, {"a_blocks": "U8, with a_scales"}),
        ({"a.weight_packed": ("I32", (4, 4))}, {"a.weight_packed": "I32"}),
        ({"a.weight": ("F8_E5M2", (4, 4))}, {"a.weight": "F8_E5M2"}),
        ({"position_ids": ("I64", (1, 4)), "a.scale": ("F32", (4,)), "a.weight": ("F32", (4, 4))}, {}),
        ({"counter": ("I32", ()), "mask": ("BOOL", (4, 4)), "table": ("U8", (4, 4))}, {}),
    ],
)
def test_quantised_weights_are_known_by_what_lies_beside_them(tensors: Any, found: dict[str, str]) -> None:
    assert quantized(_Holder({}, **tensors)) == found  # type: ignore[arg-type]


def test_a_config_that_says_so_makes_packed_matrices_quantised() -> None:
    holder = _Holder({"quantization_config": {"quant_method": "mine"}}, **{"a.w": ("U8", (4, 4)), "n": ("I32", ())})
    assert quantized(holder) == {"a.w": "U8, with quantization_config in config.json"}  # type: ignore[arg-type]
