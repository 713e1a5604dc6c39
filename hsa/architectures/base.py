"""What describes every model family: stacks, attention projections and their heads, and the presets of targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Preset = Literal["encoder-qkv", "attention-qkv", "attention-all"]


MAX_COUNT = 10_000
"""Heads or layers that a caller or a config.json may claim: work grows with them before any tensor is looked at."""


Stack = Literal["encoder", "decoder"]
STACKS: tuple[Stack, ...] = ("encoder", "decoder")


Block = Literal["self_attn", "encoder_attn"]
BLOCKS: tuple[Block, ...] = ("self_attn", "encoder_attn")


ProjectionKind = Literal["q", "k", "v", "out"]
KINDS: tuple[ProjectionKind, ...] = ("q", "k", "v", "out")


Part = Literal["weight", "bias"]


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
    kind: ProjectionKind
    part: Part

    @property
    def module(self) -> str:
        """The name of its linear layer in the attention block, such as `q_proj`."""
        return f"{self.kind}_proj"

    @property
    def head_axis(self) -> Literal[0, 1]:
        return 1 if self.kind == "out" else 0


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that the model of a `config.json` has: its canonical name and its shape.

    `size_keys` names the config's key behind each dimension (None where every Whisper has the same), `required_by` the
    key that makes the model have this tensor (None where every Whisper has it).
    """

    name: str
    shape: tuple[int, ...]
    size_keys: tuple[str | None, ...]
    required_by: str | None = None


@dataclass(frozen=True)
class Architecture:
    """Heads and layers of both stacks, from `config.json`."""

    heads: Mapping[Stack, int]
    layers: Mapping[Stack, int]
