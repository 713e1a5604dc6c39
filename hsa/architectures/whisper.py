"""Names and shapes of Whisper's tensors, and what they say: stack, layer, projection, and how heads lie.

No module outside `hsa.architectures` parses such names. Only the made-up checkpoints of `hsa.testing` write them again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hsa.architectures.base import (
    KINDS,
    MAX_COUNT,
    STACKS,
    Architecture,
    Block,
    ExpectedTensor,
    Preset,
    Projection,
    Stack,
)
from hsa.errors import SourceError, shown

MODEL_TYPE = "whisper"
MAX_NAME = 1000
"""Characters of a name up to which a prefix is looked for: work goes by the square of their number."""
FIRST_TARGET = "encoder.layers.0.self_attn.q_proj.weight"
"""The canonical name of a tensor that every preset merges."""
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
ALIASES = {
    "num_hidden_layers": "encoder_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_key_value_heads": "encoder_attention_heads",
}
"""Second names of sizes in a `config.json`; transformers lets them replace the first (its `attribute_map`)."""
GENERATION = "WhisperForConditionalGeneration"
CLASSIFICATION = "WhisperForAudioClassification"

_BLOCKS: dict[Stack, tuple[Block, ...]] = {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}

_NAME = re.compile(
    r"(?P<stack>encoder|decoder)\.layers\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<block>self_attn|encoder_attn)"
    r"\.(?P<kind>q|k|v|out)_proj\.(?P<part>weight|bias)"
)


_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_orig_module|module|_module|_forward_module|_\w+_wrapped_module)\.")
"""What torch.compile, DataParallel, FSDP, activation checkpointing and their like put between the parts of a name."""

_WHISPER_TENSOR = re.compile(
    r"(encoder|decoder)\.layers\.[0-9]+\."
    r"((self|encoder)_attn\.(q|k|v|out)_proj|(self_attn|encoder_attn|final)_layer_norm|fc[12])\.(weight|bias)"
    r"|(encoder\.(conv1|conv2|layer_norm)|decoder\.layer_norm|projector|classifier)\.(weight|bias)"
    r"|(encoder\.embed_positions|decoder\.embed_positions|decoder\.embed_tokens|proj_out)\.weight|layer_weights"
)

_KINDS = (
    ("feed-forward", re.compile(r"layers\.[0-9]+\.fc[12]\.(weight|bias)")),
    ("norm", re.compile(r"(layers\.[0-9]+\.)?([a-z_]+_)?layer_norm\.(weight|bias)")),
    ("embedding", re.compile(r"embed_(tokens|positions)\.weight")),
    ("convolution", re.compile(r"conv[12]\.(weight|bias)")),
)


def plain(name: str) -> str:
    """The tensor's name without the parts that wrappers such as torch.compile or FSDP add, at any place in it.

    Example:
        >>> plain("_orig_mod.model.encoder.layers.0.module.fc1.weight")
        'model.encoder.layers.0.fc1.weight'
    """
    return _WRAPPER.sub("", name) if "_mod" in name or "module" in name else name


def canonical(name: str) -> str:
    """The plain name without the leading `model.` that WhisperForConditionalGeneration puts there."""
    return plain(name).removeprefix("model.")


def is_whisper_tensor(name: str) -> bool:
    """Whether a canonical name is that of a tensor which some Whisper model has."""
    return _WHISPER_TENSOR.fullmatch(name) is not None


def layer_key(name: str) -> str | None:
    """The key of config.json that counts the layers among which a tensor lies, by its canonical name; None outside.

    Example:
        >>> layer_key("encoder.layers.3.fc1.bias")
        'encoder_layers'
    """
    stack, _, rest = name.partition(".")
    return f"{stack}_layers" if stack in _BLOCKS and rest.startswith("layers.") else None


def plain_names(stored: Iterable[str]) -> dict[str, str]:
    """The plain name of each tensor of a checkpoint, by its name as stored; both begin with `model.`, or neither does.

    A prefix that is no known wrapper's is removed where the rest is a name of Whisper's that no other tensor has.
    A name that fits in no way is kept.

    Example:
        >>> plain_names(["asr.model.encoder.conv1.bias"])
        {'asr.model.encoder.conv1.bias': 'model.encoder.conv1.bias'}
    """
    plain_by_stored = {name: plain(name) for name in stored}
    taken = {name.removeprefix("model.") for name in plain_by_stored.values()}
    for name, plain_name in plain_by_stored.items():
        if is_whisper_tensor(plain_name.removeprefix("model.")) or len(plain_name) > MAX_NAME:
            continue
        while plain_name and not is_whisper_tensor(plain_name.removeprefix("model.")):
            plain_name = plain_name.partition(".")[2]
        bare = plain_name.removeprefix("model.")
        if plain_name and bare not in taken:
            taken.add(bare)
            plain_by_stored[name] = plain_name
    return plain_by_stored


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
                for kind in KINDS:
                    projection = parse(f"{stack}.layers.{layer}.{block}.{kind}_proj.weight")
                    if projection is not None and is_target(projection, preset):
                        yield projection.name


def model_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that a checkpoint with this `config.json` is loaded with: for classification where its
    `architectures` says so, else for speech recognition.

    Example:
        >>> model_class({"architectures": ["WhisperForAudioClassification"]})
        'WhisperForAudioClassification'
    """
    classes = config.get("architectures")
    return CLASSIFICATION if isinstance(classes, list) and CLASSIFICATION in classes else GENERATION


def stacks_of(config: Mapping[str, Any]) -> tuple[Stack, ...]:
    """The stacks of layers that the model of this config has; one for classification has no decoder."""
    return STACKS if model_class(config) == GENERATION else ("encoder",)


def state_dict(config: Mapping[str, Any], where: str) -> Iterator[ExpectedTensor]:
    """Every tensor that a model with this config saves; `model_class` says which class of model that is.

    An output projection of its own is among them where the config does not tie it to the embedding. Raises SourceError
    where `architecture` does, or when a size is not a positive whole number. Source: transformers' modeling_whisper.py.

    Example:
        >>> config = {"model_type": "whisper", "encoder_layers": 4, "decoder_layers": 4}
        >>> config |= {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
        >>> next(state_dict(config, "here")).shape
        (384, 80, 3)
    """
    layers = architecture(config, where).layers
    sizes = {key: _size(config, key, where) for key in DIMENSIONS}

    def tensor(name: str, *dimensions: str | int, required_by: str | None = None) -> ExpectedTensor:
        shape = tuple(sizes[part] if isinstance(part, str) else part for part in dimensions)
        return ExpectedTensor(
            name, shape, tuple(part if isinstance(part, str) else None for part in dimensions), required_by
        )

    def affine(module: str, *dimensions: str | int, required_by: str | None = None) -> Iterator[ExpectedTensor]:
        yield tensor(f"{module}.weight", *dimensions, required_by=required_by)
        yield tensor(f"{module}.bias", *dimensions[:1], required_by=required_by)

    stacks = stacks_of(config)
    yield from affine("encoder.conv1", "d_model", "num_mel_bins", 3)
    yield from affine("encoder.conv2", "d_model", "d_model", 3)
    yield tensor("encoder.embed_positions.weight", "max_source_positions", "d_model")
    if "decoder" in stacks:
        yield tensor("decoder.embed_positions.weight", "max_target_positions", "d_model")
        yield tensor(EMBEDDING, "vocab_size", "d_model")
    for stack in stacks:
        layers_key = f"{stack}_layers"
        ffn_key = f"{stack}_ffn_dim"
        for layer in range(layers[stack]):
            place = f"{stack}.layers.{layer}"
            for block in _BLOCKS[stack]:
                for kind in ("q", "v", "out"):
                    yield from affine(f"{place}.{block}.{kind}_proj", "d_model", "d_model", required_by=layers_key)
                yield tensor(f"{place}.{block}.k_proj.weight", "d_model", "d_model", required_by=layers_key)
                yield from affine(f"{place}.{block}_layer_norm", "d_model", required_by=layers_key)
            yield from affine(f"{place}.fc1", ffn_key, "d_model", required_by=layers_key)
            yield from affine(f"{place}.fc2", "d_model", ffn_key, required_by=layers_key)
            yield from affine(f"{place}.final_layer_norm", "d_model", required_by=layers_key)
        yield from affine(f"{stack}.layer_norm", "d_model")
    if "decoder" not in stacks:
        yield from _classifier(config, sizes["d_model"], where)
    elif not is_tied(config):
        yield tensor(UNTIED_OUTPUT, "vocab_size", "d_model", required_by="tie_word_embeddings")


def _classifier(config: Mapping[str, Any], width: int, where: str) -> Iterator[ExpectedTensor]:
    """What a model for classification has in the place of a decoder."""
    projection_size = _positive(config.get("classifier_proj_size", 256), "classifier_proj_size", where)
    id2label = config.get("id2label")
    labels = config.get("num_labels", len(id2label) if isinstance(id2label, dict) else 2)
    labels, required_by = _positive(labels, "num_labels", where), "architectures"
    if config.get("use_weighted_layer_sum", False):
        count = architecture(config, where).layers["encoder"] + 1
        yield ExpectedTensor("layer_weights", (count,), ("encoder_layers",), "use_weighted_layer_sum")
    yield ExpectedTensor("projector.weight", (projection_size, width), ("classifier_proj_size", "d_model"), required_by)
    yield ExpectedTensor("projector.bias", (projection_size,), ("classifier_proj_size",), required_by)
    yield ExpectedTensor(
        "classifier.weight", (labels, projection_size), ("id2label", "classifier_proj_size"), required_by
    )
    yield ExpectedTensor("classifier.bias", (labels,), ("id2label",), required_by)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the config ties the output projection to the embedding, as it does where it says nothing of it."""
    return bool(config.get("tie_word_embeddings", True))


def _size(config: Mapping[str, Any], key: str, where: str) -> int:
    return _positive(config.get(key, DIMENSIONS[key]), key, where)


def _positive(value: Any, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SourceError(f"{where}: config.json has {key} = {shown(value)}, expected a positive whole number")
    return value


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """Read head and layer counts of a Whisper `config.json`.

    Raises SourceError when `model_type` is not Whisper's or a count is missing or not a positive integer.
    """
    model_type = config.get("model_type")
    if model_type != MODEL_TYPE:
        raise SourceError(
            f"{where} is not a Whisper checkpoint: its config.json has model_type {shown(model_type)}, "
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

    return Architecture(
        heads={stack: count(f"{stack}_attention_heads") for stack in STACKS},
        layers={stack: count(f"{stack}_layers") for stack in STACKS},
    )
