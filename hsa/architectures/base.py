"""The interface of a model family: the names of its tensors, its stacks of layers, its heads and its presets."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from hsa.errors import SourceError, shown

Preset = Literal["encoder-qkv", "attention-qkv", "attention-all"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
"""Names of the presets in ascending order: each preset includes the targets of those before it."""

MAX_COUNT = 10_000
"""Upper limit of the heads or layers that a caller or a config.json may claim. Work grows with these counts before any
tensor is looked at."""
MAX_NAME = 1000
"""The longest name, in characters, in which a prefix is searched for: the search takes quadratic time."""

KINDS = ("q", "k", "v", "out")
"""Kinds of projections in an attention block, in display order."""

Part = Literal["weight", "bias"]

_LAYER = re.compile(r"(?:(?P<stack>[^.]+(?:\.[^.]+)*?)\.)?(?:layers?|h|blocks?)\.(?P<layer>0|[1-9][0-9]{0,5})\.")

_AFTER = frozenset({"layer_norm", "norm", "final_layer_norm", "ln_f", "lm_head", "proj_out", "classifier", "projector"})
"""Modules that come after the layers of a stack."""

_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_orig_module|module|_module|_forward_module|_\w+_wrapped_module)\.")
"""Name components that torch.compile, DataParallel, FSDP, activation checkpointing and similar wrappers insert."""


@dataclass(frozen=True)
class Partition:
    """How a tensor is split into equal groups, such as heads: along its rows (axis 0) or its columns (axis 1)."""

    axis: int = 0
    groups: int = 1


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a file header describes it: its name as stored, its element type in safetensors notation, its
    shape."""

    name: str
    code: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorPlace:
    """The meaning of the canonical name of an attention projection: the place of the tensor in the model.

    `stack` is a stack of layers such as `encoder`, `block` an attention block such as `self_attn`, `kind` one of
    `KINDS`. `presets` are the names of the presets that merge the tensor.
    """

    name: str
    stack: str
    layer: int
    block: str
    kind: str
    part: Part
    presets: frozenset[str]

    @property
    def module(self) -> str:
        """The name of its linear layer in the attention block, such as `q_proj`."""
        return self.name.split(".")[-2]

    @property
    def head_axis(self) -> Literal[0, 1]:
        """0 where a head owns consecutive output rows (q, k, v: weight [d_model, d_model] and bias [d_model]), 1 where
        it owns consecutive columns (the weight of the output projection)."""
        return 1 if self.kind == "out" else 0

    @property
    def has_heads(self) -> bool:
        """Whether each head owns a part of it. The bias of the output projection has no such parts: all heads add to
        it."""
        return self.part == "weight" or self.head_axis == 0


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that the model of a `config.json` has: its canonical name and its shape.

    `size_keys` names the config key that gives each dimension (None where every model of the family has the same size).
    `required_by` names the config key that makes the model have this tensor (None where every model of the family has
    it).
    """

    name: str
    shape: tuple[int, ...]
    size_keys: tuple[str | None, ...]
    required_by: str | None = None


@dataclass(frozen=True)
class ModelCounts:
    """Heads and layers of every stack, from `config.json`."""

    heads: Mapping[str, int]
    layers: Mapping[str, int]


@dataclass(frozen=True)
class Tie:
    """An output projection that `config.json` may tie to the embedding, so that both are one matrix.

    `size_keys` names the config key that gives each dimension of the two tensors.
    """

    output: str
    embedding: str
    size_keys: tuple[str | None, ...]


@dataclass(frozen=True)
class Features:
    """The feature extractor of a family: its class in transformers, and the defaults of that class for missing
    settings.

    `defaults` gives feature_size, sampling_rate, hop_length and chunk_length. `mel_bins` and `positions` are the keys
    of `config.json` that give the number of mel bins and the number of encoder positions. `frames_per_position` frames
    of features become one position.
    """

    extractor: str
    defaults: Mapping[str, int]
    mel_bins: str
    positions: str
    frames_per_position: int


@dataclass(frozen=True)
class ModelClass:
    """A class of transformers that loads checkpoints of a family, and what a model card says about such a model.

    `task` is the Hub's name of the task (empty if unknown), `use` the same in words. `processor` is the class of
    transformers that prepares the input (empty if unknown). `reads_tokens` and `reads_features` say whether it includes
    the tokenizer and the feature extractor. If `custom_code`, the class is loaded with code from the checkpoint's own
    directory. `library` is the Hub's name of the library that loads it (empty if unknown).
    """

    name: str
    description: str
    task: str
    use: str
    processor: str
    reads_tokens: bool
    reads_features: bool = True
    custom_code: bool = False
    library: str = "transformers"


class Architecture(ABC):
    """A family of models: the names of its tensors, and the meaning of its `config.json`.

    Each file of this package defines one family: a subclass and an instance of it, which `registry` finds.

    `name` identifies the family in code, `title` in text for readers; `tags` are its tags on the Hub. `model_types` are
    its values of `model_type` in config.json. `prefix` begins the tensor names that its model for a task saves;
    canonical names lack it. `all_stacks` and `blocks` are its stacks of layers and its attention blocks, in display
    order. `first_target` is the canonical name of a tensor that every preset merges. `defaults` are the values that
    transformers uses for keys that a config leaves out. `aliases` are alternative names of keys, which take precedence
    (`attribute_map` in transformers). `width` is the key of the size that is divided among the heads.
    """

    name: str
    title: str
    tags: tuple[str, ...]
    model_types: frozenset[str]
    prefix: str = "model."
    all_stacks: tuple[str, ...]
    blocks: tuple[str, ...]
    first_target: str
    defaults: Mapping[str, Any] = MappingProxyType({})
    aliases: Mapping[str, str] = MappingProxyType({})
    width: str
    tie: Tie | None = None
    features: Features | None = None
    has_heads: bool = True
    """Whether its attention heads are known, so that methods that merge heads accept its models."""
    lists_tensors: bool = True
    """Whether `expected` lists the tensors of a model. If not, a checkpoint may contain any tensors."""

    @abstractmethod
    def knows(self, name: str) -> bool:
        """Whether some model of the family has a tensor with this canonical name."""

    @abstractmethod
    def place(self, name: str) -> TensorPlace | None:
        """The attention projection that a tensor's name refers to, with or without `prefix`; None for other tensors."""

    def layer_of(self, name: str) -> tuple[str, int] | None:
        """The stack and the layer number of a tensor, by its canonical name; None for tensors outside of layers. If the
        name begins with the layers, the stack is `model`.

        Example:
            >>> from hsa.architectures.registry import named
            >>> named("whisper").layer_of("encoder.layers.3.fc1.bias")
            ('encoder', 3)
        """
        match = _LAYER.match(name)
        return None if match is None else (match["stack"] or "model", int(match["layer"]))

    def tied_output(self, names: Iterable[str], config: Mapping[str, Any]) -> tuple[str, str] | None:
        """The names of an output projection and of the embedding to which `config.json` ties it, if both may be stored.
        None for families that define `tie`."""
        return None

    def follows_layers(self, name: str) -> bool:
        """Whether a tensor outside of layers comes after them, such as the last norm or the output projection."""
        return name.split(".")[-2:][0] in _AFTER

    @abstractmethod
    def group_of(self, name: str) -> tuple[str, str]:
        """The stack of any tensor of a checkpoint, and its kind in words for readers. Sums over tensors are grouped by
        these."""

    @abstractmethod
    def layers_key_of(self, name: str) -> str | None:
        """The key of config.json that counts the layers of a tensor's stack, by its canonical name; None outside of
        layers."""

    @abstractmethod
    def model_class(self, config: Mapping[str, Any]) -> ModelClass:
        """The class of transformers that a checkpoint with this `config.json` is loaded with."""

    def stacks(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The stacks of layers that the model of this config has; by default all."""
        return self.all_stacks

    @abstractmethod
    def expected(self, config: Mapping[str, Any], where: str) -> Iterator[ExpectedTensor]:
        """Every tensor that a model with this config saves; raises SourceError where a size is no positive number."""

    @abstractmethod
    def expected_targets(self, layers: Mapping[str, int], preset: Preset) -> Iterator[str]:
        """Canonical names of the weights that a preset merges in a model with this number of layers of each stack.
        Biases may be missing, so they are not listed."""

    def kind(self, config: Mapping[str, Any]) -> str:
        """The property that merged models must share, in words for messages: `a Whisper checkpoint`."""
        return f"a {self.title} checkpoint"

    def embedding_of(self, names: Iterable[str]) -> str | None:
        """The embedding of tokens among the canonical names of a model's tensors; None where there is none."""
        return self.tie.embedding if self.tie is not None and self.tie.embedding in names else None

    def is_family_of(self, config: Mapping[str, Any]) -> bool:
        """Whether the model of this config is one of the family, by its `model_type`."""
        model_type = config.get("model_type")
        return isinstance(model_type, str) and model_type in self.model_types

    def heads_key(self, stack: str) -> str:
        """The key of config.json that counts the attention heads of a stack's layers."""
        return f"{stack}_attention_heads"

    def layers_key(self, stack: str) -> str:
        """The key of config.json that counts the layers of a stack."""
        return f"{stack}_layers"

    def target(self, name: str, preset: Preset) -> TensorPlace | None:
        """The place that a tensor's name refers to if the preset merges the tensor, else None."""
        place = self.place(name)
        return place if place is not None and preset in place.presets else None

    def canonical(self, name: str) -> str:
        """The plain name without `prefix`."""
        return plain(name).removeprefix(self.prefix)

    def plain_names(self, stored: Iterable[str]) -> dict[str, str]:
        """The plain name of each tensor of a checkpoint, by its name as stored. A leading `prefix` is kept.

        An unknown prefix is removed if the rest is a tensor name of the family that no other tensor has. Any other name
        is kept.

        Example:
            >>> from hsa.architectures.registry import named
            >>> named("whisper").plain_names(["asr.model.encoder.conv1.bias"])
            {'asr.model.encoder.conv1.bias': 'model.encoder.conv1.bias'}
        """
        plain_by_stored = {name: plain(name) for name in stored}
        taken = {name.removeprefix(self.prefix) for name in plain_by_stored.values()}
        for name, plain_name in plain_by_stored.items():
            if self.knows(plain_name.removeprefix(self.prefix)) or len(plain_name) > MAX_NAME:
                continue
            while plain_name and not self.knows(plain_name.removeprefix(self.prefix)):
                plain_name = plain_name.partition(".")[2]
            bare = plain_name.removeprefix(self.prefix)
            if plain_name and bare not in taken:
                taken.add(bare)
                plain_by_stored[name] = plain_name
        return plain_by_stored

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the config ties the output projection to the embedding. That is the default if the config does not
        say."""
        return self.tie is not None and bool(config.get("tie_word_embeddings", True))

    def counts(self, config: Mapping[str, Any], where: str) -> ModelCounts:
        """Head and layer counts of a `config.json`.

        Raises SourceError when `model_type` is not one of the family's or a count is missing or not a positive integer.
        """
        if not self.is_family_of(config):
            raise not_of_families(config, where, [self])

        def count(key: str) -> int:
            value = config.get(key)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
                raise SourceError(
                    f"{where}: config.json has {key} = {shown(value)}, expected a positive whole number of at most "
                    f"{MAX_COUNT}"
                )
            return value

        return ModelCounts(
            heads={stack: count(self.heads_key(stack)) for stack in self.all_stacks},
            layers={stack: count(self.layers_key(stack)) for stack in self.all_stacks},
        )


def plain(name: str) -> str:
    """The tensor's name without the parts that wrappers such as torch.compile or FSDP add, at any place in it.

    Example:
        >>> plain("_orig_mod.model.encoder.layers.0.module.fc1.weight")
        'model.encoder.layers.0.fc1.weight'
    """
    return _WRAPPER.sub("", name) if "_mod" in name or "module" in name else name


def not_of_families(config: Mapping[str, Any], where: str, families: Collection[Architecture]) -> SourceError:
    """The error for a `config.json` whose `model_type` belongs to none of these families."""
    titles = " or ".join(family.title for family in families)
    supported = [f"'{model_type}'" for family in families for model_type in sorted(family.model_types)]
    return SourceError(
        f"{where} is not a {titles} checkpoint: its config.json has model_type {shown(config.get('model_type'))}, "
        f"supported {'is' if len(supported) == 1 else 'are'} {', '.join(supported)}"
    )
