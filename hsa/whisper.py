"""What a Whisper tensor's name says: its stack, layer and projection, and how its heads lie.

Tensor names of Whisper stand in this module alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hsa.config import MAX_COUNT, Preset
from hsa.errors import SourceError, shown

Stack = Literal["encoder", "decoder"]
Block = Literal["self_attn", "encoder_attn"]
Kind = Literal["q", "k", "v", "out"]
Part = Literal["weight", "bias"]

MODEL_TYPE = "whisper"
EMBEDDING = "decoder.embed_tokens.weight"
UNTIED_OUTPUT = "proj_out.weight"
DIMENSIONS = {
    "d_model": 384,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "vocab_size": 51865,
}
"""Sizes in a `config.json`, and what transformers takes where one is not given (its WhisperConfig)."""

_BLOCKS: dict[Stack, tuple[Block, ...]] = {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}

_NAME = re.compile(
    r"(?P<stack>encoder|decoder)\.layers\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<block>self_attn|encoder_attn)"
    r"\.(?P<kind>q|k|v|out)_proj\.(?P<part>weight|bias)"
)


_KINDS = (
    ("feed-forward", re.compile(r"layers\.[0-9]+\.fc[12]\.(weight|bias)")),
    ("norm", re.compile(r"(layers\.[0-9]+\.)?([a-z_]+_)?layer_norm\.(weight|bias)")),
    ("embedding", re.compile(r"embed_(tokens|positions)\.weight")),
    ("convolution", re.compile(r"conv[12]\.(weight|bias)")),
)

_OPENAI_LAYER = re.compile(r"(?P<stack>encoder|decoder)\.blocks\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<rest>.+)")
_OPENAI_BLOCK = re.compile(r"(?P<block>attn|cross_attn)\.(?P<kind>query|key|value|out)\.(?P<part>weight|bias)")
_OPENAI_BLOCKS = {"attn": "self_attn", "cross_attn": "encoder_attn"}
_OPENAI_KINDS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
_OPENAI_MODULES = {
    "attn_ln": "self_attn_layer_norm",
    "cross_attn_ln": "encoder_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}
_OPENAI_OUTSIDE = {
    "encoder.positional_embedding": "encoder.embed_positions.weight",
    "decoder.positional_embedding": "decoder.embed_positions.weight",
    "decoder.token_embedding.weight": EMBEDDING,
    **{
        f"{theirs}.{part}": f"{ours}.{part}"
        for theirs, ours in (
            ("encoder.conv1", "encoder.conv1"),
            ("encoder.conv2", "encoder.conv2"),
            ("encoder.ln_post", "encoder.layer_norm"),
            ("decoder.ln", "decoder.layer_norm"),
        )
        for part in ("weight", "bias")
    },
}
_OPENAI_DIMS = {
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
    """The canonical name of a tensor of OpenAI's own checkpoints; None for one that has no place in Hugging Face's.

    Source: the module names of OpenAI's whisper/model.py and of transformers' modeling_whisper.py.
    """
    match = _OPENAI_LAYER.fullmatch(name)
    if match is None:
        return _OPENAI_OUTSIDE.get(name)
    rest = match["rest"]
    projection = _OPENAI_BLOCK.fullmatch(rest)
    module, _, part = rest.rpartition(".")
    if projection is not None:
        rest = f"{_OPENAI_BLOCKS[projection['block']]}.{_OPENAI_KINDS[projection['kind']]}.{projection['part']}"
    elif module in _OPENAI_MODULES and part in ("weight", "bias"):
        rest = f"{_OPENAI_MODULES[module]}.{part}"
    else:
        return None
    return f"{match['stack']}.layers.{match['layer']}.{rest}"


def openai_config(dims: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a Hugging Face `config.json` would say of a model with OpenAI's `dims`.

    Raises SourceError when one of them is missing or not a positive integer.
    """
    config: dict[str, Any] = {"model_type": MODEL_TYPE}
    for key, theirs in _OPENAI_DIMS.items():
        value = dims.get(theirs)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SourceError(f"{where}: dims has {theirs} = {shown(value, 40)}, expected a positive whole number")
        config[key] = value
    return config


@dataclass(frozen=True)
class Projection:
    """One attention projection tensor.

    `head_axis` is 0 where a head owns consecutive output rows (q, k, v: weight [d_model, d_model] and bias
    [d_model]), 1 where it owns consecutive columns (the weight of `out_proj`).
    """

    name: str
    stack: Stack
    layer: int
    block: Block
    kind: Kind
    part: Part

    @property
    def head_axis(self) -> Literal[0, 1]:
        return 1 if self.kind == "out" else 0


def canonical(name: str) -> str:
    """The tensor's name without the leading `model.` that WhisperForConditionalGeneration puts there."""
    return name.removeprefix("model.")


def parse(name: str) -> Projection | None:
    """The projection that a tensor name means, with or without `model.`; None for any other tensor."""
    bare = canonical(name)
    match = _NAME.fullmatch(bare)
    if match is None:
        return None
    stack, block = match["stack"], match["block"]
    if stack == "encoder" and block == "encoder_attn":
        return None
    return Projection(bare, stack, int(match["layer"]), block, match["kind"], match["part"])  # type: ignore[arg-type]


def is_target(projection: Projection, preset: Preset) -> bool:
    """Whether a preset merges this tensor; the bias of `out_proj` belongs to no head."""
    if projection.kind == "out":
        return preset == "attention-all" and projection.part == "weight"
    return projection.stack == "encoder" or preset != "encoder-qkv"


def group_of(name: str) -> tuple[str, str]:
    """The stack of any tensor of a checkpoint and its kind in a reader's words, for sums over tensors.

    Stacks: encoder, decoder, and output for what lies in neither. A name that is not Whisper's is of kind `other`.
    """
    bare = canonical(name)
    stack, _, rest = bare.partition(".")
    if stack not in ("encoder", "decoder"):
        return "output", "output projection" if bare == UNTIED_OUTPUT else "other"
    projection = parse(bare)
    if projection is not None:
        block = "self-attention" if projection.block == "self_attn" else "cross-attention"
        return stack, f"{block} {'out' if projection.kind == 'out' else 'q, k, v'}"
    for kind, pattern in _KINDS:
        if pattern.fullmatch(rest):
            return stack, kind
    return stack, "other"


def expected_targets(layers: Mapping[Stack, int], preset: Preset) -> Iterator[str]:
    """Canonical names of the weights that a preset merges in a model with so many layers; biases may be missing."""
    for stack, count in layers.items():
        for layer in range(count):
            for block in _BLOCKS[stack]:
                for kind in ("q", "k", "v", "out"):
                    projection = parse(f"{stack}.layers.{layer}.{block}.{kind}_proj.weight")
                    if projection is not None and is_target(projection, preset):
                        yield projection.name


def state_dict(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical name and shape of every tensor that a WhisperForConditionalGeneration with this config saves.

    An output projection of its own is among them where the config does not tie it to the embedding. Raises SourceError
    where `architecture` does, or when a size is no positive whole number. Source: transformers' modeling_whisper.py.
    """
    layers = architecture(config, where).layers
    width, mels, vocabulary = (_size(config, key, where) for key in ("d_model", "num_mel_bins", "vocab_size"))

    def norm(module: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{module}.weight", (width,)
        yield f"{module}.bias", (width,)

    def affine(module: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{module}.weight", shape
        yield f"{module}.bias", shape[:1]

    yield from affine("encoder.conv1", width, mels, 3)
    yield from affine("encoder.conv2", width, width, 3)
    yield "encoder.embed_positions.weight", (_size(config, "max_source_positions", where), width)
    yield "decoder.embed_positions.weight", (_size(config, "max_target_positions", where), width)
    yield EMBEDDING, (vocabulary, width)
    for stack, count in layers.items():
        inner = _size(config, f"{stack}_ffn_dim", where)
        for layer in range(count):
            place = f"{stack}.layers.{layer}"
            for block in _BLOCKS[stack]:
                for kind in ("q", "v", "out"):
                    yield from affine(f"{place}.{block}.{kind}_proj", width, width)
                yield f"{place}.{block}.k_proj.weight", (width, width)
                yield from norm(f"{place}.{block}_layer_norm")
            yield from affine(f"{place}.fc1", inner, width)
            yield from affine(f"{place}.fc2", width, inner)
            yield from norm(f"{place}.final_layer_norm")
        yield from norm(f"{stack}.layer_norm")
    if not config.get("tie_word_embeddings", True):
        yield UNTIED_OUTPUT, (vocabulary, width)


def _size(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key, DIMENSIONS[key])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SourceError(f"{where}: config.json has {key} = {shown(value)}, expected a positive whole number")
    return value


@dataclass(frozen=True)
class Architecture:
    """Heads and layers of both stacks, from `config.json`."""

    heads: Mapping[Stack, int]
    layers: Mapping[Stack, int]


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Read head and layer counts of a Whisper `config.json`.

    Raises SourceError when `model_type` is not Whisper's or a count is missing or not a positive integer.
    """
    found = config.get("model_type")
    if found != MODEL_TYPE:
        raise SourceError(
            f"{where} is not a Whisper checkpoint: its config.json has model_type {shown(found)}, "
            f"supported is '{MODEL_TYPE}'"
        )

    def count(key: str) -> int:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
            raise SourceError(
                f"{where}: config.json has {key} = {shown(value)}, expected a positive whole number of at most "
                f"{MAX_COUNT}"
            )
        return value

    stacks: tuple[Stack, ...] = ("encoder", "decoder")
    return Architecture(
        heads={stack: count(f"{stack}_attention_heads") for stack in stacks},
        layers={stack: count(f"{stack}_layers") for stack in stacks},
    )
