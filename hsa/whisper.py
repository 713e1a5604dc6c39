"""What a Whisper tensor's name says: its stack, layer and projection, and how its heads lie.

Tensor names of Whisper stand in this module alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hsa.config import Preset
from hsa.errors import SourceError

Stack = Literal["encoder", "decoder"]
Block = Literal["self_attn", "encoder_attn"]
Kind = Literal["q", "k", "v", "out"]
Part = Literal["weight", "bias"]

MODEL_TYPE = "whisper"
EMBEDDING = "decoder.embed_tokens.weight"
UNTIED_OUTPUT = "proj_out.weight"

_NAME = re.compile(
    r"(?P<stack>encoder|decoder)\.layers\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<block>self_attn|encoder_attn)"
    r"\.(?P<kind>q|k|v|out)_proj\.(?P<part>weight|bias)"
)


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


def expected_targets(layers: Mapping[Stack, int], preset: Preset) -> Iterator[str]:
    """Canonical names of the weights that a preset merges in a model with so many layers; biases may be missing."""
    blocks: dict[Stack, tuple[Block, ...]] = {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}
    for stack, count in layers.items():
        for layer in range(count):
            for block in blocks[stack]:
                for kind in ("q", "k", "v", "out"):
                    projection = parse(f"{stack}.layers.{layer}.{block}.{kind}_proj.weight")
                    if projection is not None and is_target(projection, preset):
                        yield projection.name


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
            f"{where} is not a Whisper checkpoint: its config.json has model_type {found!r}, "
            f"supported is {MODEL_TYPE!r}"
        )

    def count(key: str) -> int:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SourceError(f"{where}: config.json has {key} = {value!r}, expected a positive whole number")
        return value

    stacks: tuple[Stack, ...] = ("encoder", "decoder")
    return Architecture(
        heads={stack: count(f"{stack}_attention_heads") for stack in stacks},
        layers={stack: count(f"{stack}_layers") for stack in stacks},
    )
