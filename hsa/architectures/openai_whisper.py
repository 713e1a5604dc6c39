"""Translate OpenAI's names of Whisper's tensors and sizes to Hugging Face's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hsa.architectures.whisper import EMBEDDING, MODEL_TYPE
from hsa.errors import SourceError, shown

_LAYER = re.compile(r"(?P<stack>encoder|decoder)\.blocks\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<rest>.+)")


_BLOCK = re.compile(r"(?P<block>attn|cross_attn)\.(?P<kind>query|key|value|out)\.(?P<part>weight|bias)")


_BLOCKS = {"attn": "self_attn", "cross_attn": "encoder_attn"}


_KINDS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


_MODULES = {
    "attn_ln": "self_attn_layer_norm",
    "cross_attn_ln": "encoder_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}


_OUTSIDE_LAYERS = {
    "encoder.positional_embedding": "encoder.embed_positions.weight",
    "decoder.positional_embedding": "decoder.embed_positions.weight",
    "decoder.token_embedding.weight": EMBEDDING,
    **{
        f"{openai}.{part}": f"{canonical}.{part}"
        for openai, canonical in (
            ("encoder.conv1", "encoder.conv1"),
            ("encoder.conv2", "encoder.conv2"),
            ("encoder.ln_post", "encoder.layer_norm"),
            ("decoder.ln", "decoder.layer_norm"),
        )
        for part in ("weight", "bias")
    },
}


_DIMS = {
    "d_model": "n_audio_state",
    "encoder_layers": "n_audio_layer",
    "encoder_attention_heads": "n_audio_head",
    "decoder_layers": "n_text_layer",
    "decoder_attention_heads": "n_text_head",
    "num_mel_bins": "n_mels",
    "max_source_positions": "n_audio_ctx",
    "max_target_positions": "n_text_ctx",
    "vocab_size": "n_vocab",
}


def from_openai(name: str) -> str | None:
    """The canonical name of a tensor of OpenAI's own checkpoints; None if Hugging Face's model has no such tensor.

    Source: the module names of OpenAI's whisper/model.py and of transformers' modeling_whisper.py.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return _OUTSIDE_LAYERS.get(name)
    rest = match["rest"]
    projection = _BLOCK.fullmatch(rest)
    module, _, part = rest.rpartition(".")
    if projection is not None:
        rest = f"{_BLOCKS[projection['block']]}.{_KINDS[projection['kind']]}.{projection['part']}"
    elif module in _MODULES and part in ("weight", "bias"):
        rest = f"{_MODULES[module]}.{part}"
    else:
        return None
    return f"{match['stack']}.layers.{match['layer']}.{rest}"


def openai_config(dims: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The Hugging Face `config.json` that corresponds to OpenAI's `dims`.

    Raises SourceError when one of them is missing or not a positive integer.
    """
    config: dict[str, Any] = {"model_type": MODEL_TYPE}
    for key, openai_key in _DIMS.items():
        value = dims.get(openai_key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SourceError(f"{where}: dims has {openai_key} = {shown(value, 40)}, expected a positive whole number")
        config[key] = value
    config["encoder_ffn_dim"] = config["decoder_ffn_dim"] = 4 * config["d_model"]  # as in its ResidualAttentionBlock
    return config
