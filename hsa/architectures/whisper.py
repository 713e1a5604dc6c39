"""Names and shapes of Whisper's tensors, and the meaning of the names: stack, layer, projection, and layout of heads.

No module outside `hsa.architectures` parses such names. Only the synthetic checkpoints of `hsa.testing` repeat them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from hsa.architectures.base import (
    KINDS,
    Architecture,
    ExpectedTensor,
    Features,
    ModelClass,
    Preset,
    TensorPlace,
    Tie,
)
from hsa.errors import SourceError, shown

EMBEDDING = "decoder.embed_tokens.weight"
UNTIED_OUTPUT = "proj_out.weight"
MODEL_TYPE = "whisper"

_SIZES = {
    "d_model": 384,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "vocab_size": 51865,
}
"""Sizes in a `config.json`, with the defaults of transformers' WhisperConfig."""

_GENERATION = ModelClass(
    "WhisperForConditionalGeneration",
    description="Whisper sequence-to-sequence speech recognition model",
    task="automatic-speech-recognition",
    use="Speech recognition",
    processor="WhisperProcessor",
    reads_tokens=True,
)
_CLASSIFICATION = ModelClass(
    "WhisperForAudioClassification",
    description="Whisper encoder with a head for audio classification",
    task="audio-classification",
    use="Audio classification with primary's labels",
    processor="AutoFeatureExtractor",
    reads_tokens=False,
)

_BLOCKS = {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}

_NAME = re.compile(
    r"(?P<stack>encoder|decoder)\.layers\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<block>self_attn|encoder_attn)"
    r"\.(?P<kind>q|k|v|out)_proj\.(?P<part>weight|bias)"
)

_TENSOR = re.compile(
    r"(encoder|decoder)\.layers\.[0-9]+\."
    r"((self|encoder)_attn\.(q|k|v|out)_proj|(self_attn|encoder_attn|final)_layer_norm|fc[12])\.(weight|bias)"
    r"|(encoder\.(conv1|conv2|layer_norm)|decoder\.layer_norm|projector|classifier)\.(weight|bias)"
    r"|(encoder\.embed_positions|decoder\.embed_positions|decoder\.embed_tokens|proj_out)\.weight|layer_weights"
)

_OTHER_KINDS = (
    ("feed-forward", re.compile(r"layers\.[0-9]+\.fc[12]\.(weight|bias)")),
    ("norm", re.compile(r"(layers\.[0-9]+\.)?([a-z_]+_)?layer_norm\.(weight|bias)")),
    ("embedding", re.compile(r"embed_(tokens|positions)\.weight")),
    ("convolution", re.compile(r"conv[12]\.(weight|bias)")),
)


class Whisper(Architecture):
    """OpenAI's Whisper as implemented in transformers: for speech recognition, or its encoder for audio classification.

    Source: transformers' modeling_whisper.py and configuration_whisper.py.
    """

    name = "whisper"
    title = "Whisper"
    tags = ("whisper",)
    model_types = frozenset({MODEL_TYPE})
    all_stacks = ("encoder", "decoder")
    blocks = ("self_attn", "encoder_attn")
    first_target = "encoder.layers.0.self_attn.q_proj.weight"
    defaults: Mapping[str, Any] = {**_SIZES, "tie_word_embeddings": True, "classifier_proj_size": 256}
    aliases: Mapping[str, str] = {
        "num_hidden_layers": "encoder_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "encoder_attention_heads",
        "num_key_value_heads": "encoder_attention_heads",
    }
    width = "d_model"
    tie = Tie(UNTIED_OUTPUT, EMBEDDING, ("vocab_size", "d_model"))
    features = Features(
        "WhisperFeatureExtractor",
        defaults={"feature_size": 80, "sampling_rate": 16000, "hop_length": 160, "chunk_length": 30},
        mel_bins="num_mel_bins",
        positions="max_source_positions",
        frames_per_position=2,  # the second convolution halves them
    )

    def knows(self, name: str) -> bool:
        return _TENSOR.fullmatch(name) is not None

    def place(self, name: str) -> TensorPlace | None:
        """The projection that a tensor's name means.

        Example:
            >>> WHISPER.place("model.decoder.layers.3.self_attn.v_proj.bias").layer
            3
        """
        bare = self.canonical(name)
        match = _NAME.fullmatch(bare)
        if match is None or match["block"] not in _BLOCKS[match["stack"]]:
            return None
        stack, block, kind, part = match["stack"], match["block"], match["kind"], match["part"]
        presets = _presets(stack, kind, part)
        return TensorPlace(bare, stack, int(match["layer"]), block, kind, part, presets)  # type: ignore[arg-type]

    def group_of(self, name: str) -> tuple[str, str]:
        """The stacks are encoder, decoder, and output for tensors in neither. A name that is not Whisper's has kind
        `other`."""
        bare = self.canonical(name)
        stack, _, rest = bare.partition(".")
        if stack not in ("encoder", "decoder"):
            return "output", "output projection" if bare == UNTIED_OUTPUT else "other"
        place = self.place(bare)
        if place is not None:
            block = "self-attention" if place.block == "self_attn" else "cross-attention"
            return stack, f"{block} {'out' if place.kind == 'out' else 'q, k, v'}"
        for kind, pattern in _OTHER_KINDS:
            if pattern.fullmatch(rest):
                return stack, kind
        return stack, "other"

    def layers_key_of(self, name: str) -> str | None:
        """The key of config.json that counts the layers of a tensor's stack.

        Example:
            >>> WHISPER.layers_key_of("encoder.layers.3.fc1.bias")
            'encoder_layers'
        """
        stack, _, rest = name.partition(".")
        return self.layers_key(stack) if stack in _BLOCKS and rest.startswith("layers.") else None

    def expected_targets(self, layers: Mapping[str, int], preset: Preset) -> Iterator[str]:
        for stack, count in layers.items():
            for layer in range(count):
                for block in _BLOCKS[stack]:
                    for kind in KINDS:
                        if preset in _presets(stack, kind, "weight"):
                            yield f"{stack}.layers.{layer}.{block}.{kind}_proj.weight"

    def model_class(self, config: Mapping[str, Any]) -> ModelClass:
        """The class for classification if the config's `architectures` names it, else the class for speech recognition.

        Example:
            >>> WHISPER.model_class({"architectures": ["WhisperForAudioClassification"]}).task
            'audio-classification'
        """
        classes = config.get("architectures")
        return _CLASSIFICATION if isinstance(classes, list) and _CLASSIFICATION.name in classes else _GENERATION

    def stacks(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The stacks of the model. A model for classification has no decoder."""
        return self.all_stacks if self.model_class(config) is _GENERATION else ("encoder",)

    def expected(self, config: Mapping[str, Any], where: str) -> Iterator[ExpectedTensor]:
        """Every tensor that a model with this config saves.

        This includes an output projection of its own if the config does not tie it to the embedding. Raises SourceError
        as `counts` does, or if a size is not a positive whole number.

        Example:
            >>> config = {"model_type": "whisper", "encoder_layers": 4, "decoder_layers": 4}
            >>> config |= {"encoder_attention_heads": 6, "decoder_attention_heads": 6}
            >>> next(WHISPER.expected(config, "here")).shape
            (384, 80, 3)
        """
        layers = self.counts(config, where).layers
        sizes = {key: _size(config, key, where) for key in _SIZES}

        def tensor(name: str, *dimensions: str | int, required_by: str | None = None) -> ExpectedTensor:
            shape = tuple(sizes[part] if isinstance(part, str) else part for part in dimensions)
            return ExpectedTensor(
                name, shape, tuple(part if isinstance(part, str) else None for part in dimensions), required_by
            )

        def affine(module: str, *dimensions: str | int, required_by: str | None = None) -> Iterator[ExpectedTensor]:
            yield tensor(f"{module}.weight", *dimensions, required_by=required_by)
            yield tensor(f"{module}.bias", *dimensions[:1], required_by=required_by)

        stacks = self.stacks(config)
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
            yield from _classifier(config, sizes["d_model"], layers["encoder"], where)
        elif not self.is_tied(config):
            yield tensor(UNTIED_OUTPUT, "vocab_size", "d_model", required_by="tie_word_embeddings")


@cache
def _presets(stack: str, kind: str, part: str) -> frozenset[str]:
    """The presets that merge a projection. No preset merges the bias of `out_proj`, which belongs to no head."""
    if kind == "out":
        return frozenset({"attention-all"} if part == "weight" else ())
    return frozenset({"attention-qkv", "attention-all", *(["encoder-qkv"] if stack == "encoder" else [])})


def _classifier(config: Mapping[str, Any], width: int, layers: int, where: str) -> Iterator[ExpectedTensor]:
    """The tensors that a model for classification has instead of a decoder."""
    projection_size = _positive(config.get("classifier_proj_size", 256), "classifier_proj_size", where)
    id2label = config.get("id2label")
    labels = config.get("num_labels", len(id2label) if isinstance(id2label, dict) else 2)
    labels, required_by = _positive(labels, "num_labels", where), "architectures"
    if config.get("use_weighted_layer_sum", False):
        yield ExpectedTensor("layer_weights", (layers + 1,), ("encoder_layers",), "use_weighted_layer_sum")
    yield ExpectedTensor("projector.weight", (projection_size, width), ("classifier_proj_size", "d_model"), required_by)
    yield ExpectedTensor("projector.bias", (projection_size,), ("classifier_proj_size",), required_by)
    yield ExpectedTensor(
        "classifier.weight", (labels, projection_size), ("id2label", "classifier_proj_size"), required_by
    )
    yield ExpectedTensor("classifier.bias", (labels,), ("id2label",), required_by)


def _size(config: Mapping[str, Any], key: str, where: str) -> int:
    return _positive(config.get(key, _SIZES[key]), key, where)


def _positive(value: Any, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SourceError(f"{where}: config.json has {key} = {shown(value)}, expected a positive whole number")
    return value


WHISPER = Whisper()
