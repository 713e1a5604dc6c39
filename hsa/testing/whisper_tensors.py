"""List the tensors of a synthetic Whisper model: names, shapes and heads, in the order of its state dict."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hsa.testing.whisper_config import WhisperShape


@dataclass(frozen=True)
class WhisperTensor:
    """A tensor of the model. Its `heads` are groups of equal size along `head_axis`; 0 for a tensor without heads.

    `projection` is (stack, layer, kind) if its heads may be loud.
    """

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    heads: int = 0
    head_axis: int = 0
    projection: tuple[str, int, str] | None = None

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def row_elements(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def _norm(name: str, width: int) -> Iterator[WhisperTensor]:
    yield WhisperTensor(f"{name}.weight", (width,), mean=1.0)
    yield WhisperTensor(f"{name}.bias", (width,))


def _affine(name: str, *weight_shape: int) -> Iterator[WhisperTensor]:
    yield WhisperTensor(f"{name}.weight", weight_shape)
    yield WhisperTensor(f"{name}.bias", weight_shape[:1])


def _attention(name: str, width: int, heads: int, place: tuple[str, int] | None) -> Iterator[WhisperTensor]:
    """Projections in the order of transformers' modules; `k_proj` has no bias in Whisper."""
    for kind in "kvq":
        projection = None if place is None else (*place, kind)
        yield WhisperTensor(f"{name}.{kind}_proj.weight", (width, width), heads=heads, projection=projection)
        if kind != "k":
            yield WhisperTensor(f"{name}.{kind}_proj.bias", (width,), heads=heads, projection=projection)
    yield WhisperTensor(f"{name}.out_proj.weight", (width, width), heads=heads, head_axis=1)
    yield WhisperTensor(f"{name}.out_proj.bias", (width,))


def _stack(shape: WhisperShape, stack: str) -> Iterator[WhisperTensor]:
    width = shape.d_model
    layers, heads = (
        (shape.encoder_layers, shape.encoder_heads)
        if stack == "encoder"
        else (shape.decoder_layers, shape.decoder_heads)
    )
    for index in range(layers):
        layer = f"model.{stack}.layers.{index}"
        yield from _attention(f"{layer}.self_attn", width, heads, (stack, index))
        yield from _norm(f"{layer}.self_attn_layer_norm", width)
        if stack == "decoder":
            yield from _attention(f"{layer}.encoder_attn", width, heads, None)
            yield from _norm(f"{layer}.encoder_attn_layer_norm", width)
        yield from _affine(f"{layer}.fc1", shape.ffn_dim, width)
        yield from _affine(f"{layer}.fc2", width, shape.ffn_dim)
        yield from _norm(f"{layer}.final_layer_norm", width)
    yield from _norm(f"model.{stack}.layer_norm", width)


def whisper_tensors(shape: WhisperShape) -> Iterator[WhisperTensor]:
    width = shape.d_model
    yield from _affine("model.encoder.conv1", width, shape.num_mel_bins, 3)
    yield from _affine("model.encoder.conv2", width, width, 3)
    yield WhisperTensor("model.encoder.embed_positions.weight", (shape.max_source_positions, width))
    yield from _stack(shape, "encoder")
    yield WhisperTensor("model.decoder.embed_tokens.weight", (shape.vocab_size, width))
    yield WhisperTensor("model.decoder.embed_positions.weight", (shape.max_target_positions, width))
    yield from _stack(shape, "decoder")


def tensor_shapes(shape: WhisperShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a saved WhisperForConditionalGeneration, in the order of its state dict.

    Names start with `model.`. The output projection is tied to the token embedding, so it is absent.
    """
    return {tensor.name: tensor.shape for tensor in whisper_tensors(shape)}
