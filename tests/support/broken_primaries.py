"""A seeded generator of primaries whose tensors and config.json do not fit together, and transformers' judgement.

Each is a small change of a sound checkpoint: tensors dropped, renamed, reshaped, emptied or added, or a size in
config.json changed. Some do no harm: transformers says which.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import read_tensors, write_tensors

from hsa.architectures.whisper import WHISPER

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
EMBEDDING = "model.decoder.embed_tokens.weight"
WRAPPERS = ("_orig_mod", "_orig_module", "module", "_checkpoint_wrapped_module", "base_layer", "shard", "student")
SIZES = (
    "vocab_size",
    "num_mel_bins",
    "encoder_layers",
    "decoder_layers",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "max_source_positions",
    "max_target_positions",
    "d_model",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "num_hidden_layers",
    "hidden_size",
)


@dataclass(frozen=True)
class Breakage:
    """What is changed, in words, and the change of tensors and config, in place."""

    label: str
    change: Callable[[Tensors, Config], object]

    def apply(self, directory: Path) -> None:
        """Change the checkpoint in a directory."""
        tensors, path = read_tensors(directory), directory / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        self.change(tensors, config)
        write_tensors(directory, tensors)
        path.write_text(json.dumps(config), encoding="utf-8")


def breakages(count: int, names: list[str], seed: int = 0) -> Iterator[Breakage]:
    """So many breakages of a checkpoint with these tensor names, each kind in its turn."""
    chance = random.Random(seed)
    copied = [name for name in names if WHISPER.target(name, "encoder-qkv") is None]
    kinds = (_drop, _drop_many, _rename, _wrap, _reshape, _empty, _add, _miscount)
    for number in range(count):
        yield kinds[number % len(kinds)](chance, names if chance.random() < 0.2 else copied)


def _drop(chance: random.Random, names: list[str]) -> Breakage:
    name = chance.choice(names)
    return Breakage(f"without {name}", lambda tensors, _: tensors.pop(name))


def _drop_many(chance: random.Random, names: list[str]) -> Breakage:
    part = chance.choice(("decoder.layers.1.", "layer_norm.", "fc1.", "conv1.", "encoder_attn.", "embed_", "bias"))

    def change(tensors: Tensors, _: Config) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return Breakage(f"without all of {part}", change)


def _rename(chance: random.Random, names: list[str]) -> Breakage:
    name = chance.choice(names)
    pieces = name.split(".")
    place = chance.randrange(len(pieces))
    pieces[place] = chance.choice((f"{pieces[place]}2", pieces[place].upper(), "gamma", ""))
    return Breakage(f"{name} as {'.'.join(pieces)}", lambda t, _: t.update({".".join(pieces): t.pop(name)}))


def _wrap(chance: random.Random, names: list[str]) -> Breakage:
    """A wrapper's part in some names or all, in front, in the middle or before the last."""
    wrapper = chance.choice(WRAPPERS)
    stack = chance.choice(("model.", "model.decoder.layers.1.", "model.encoder.layers.0."))
    place = chance.choice((0, 1, 2, -1))

    def wrapped(name: str) -> str:
        pieces = name.split(".")
        at = place if place >= 0 else len(pieces) - 1
        return ".".join([*pieces[:at], wrapper, *pieces[at:]])

    def change(tensors: Tensors, _: Config) -> None:
        for name in [name for name in tensors if name.startswith(stack)]:
            tensors[wrapped(name)] = tensors.pop(name)

    return Breakage(f"{wrapper} at {place} in {stack}*", change)


def _reshape(chance: random.Random, names: list[str]) -> Breakage:
    name = chance.choice(names)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "transposed": lambda t: t.movedim(0, -1) if t.ndim > 1 else t[None],
        "a row less": lambda t: t[:-1],
        "a row more": lambda t: torch.cat([t, t[:1]]),
        "flat": lambda t: t.flatten() if t.ndim > 1 else t[:, None],
    }
    way = chance.choice(list(ways))
    return Breakage(f"{name} {way}", lambda tensors, _: tensors.update({name: ways[way](tensors[name])}))


def _empty(chance: random.Random, names: list[str]) -> Breakage:
    name = chance.choice(names)
    return Breakage(f"{name} empty", lambda tensors, _: tensors.update({name: tensors[name][:0]}))


def _add(chance: random.Random, names: list[str]) -> Breakage:
    name = chance.choice(names)
    ways: dict[str, Callable[[Tensors], object]] = {
        "a scale": lambda t: t.update({name: t[name].to(torch.int8), f"{name}_scale": torch.ones(1)}),
        "an adapter": lambda t: t.update({f"{name.rpartition('.')[0]}.lora_A.default.weight": torch.ones(2, 64)}),
        "the embedding again": lambda t: t.update({"proj_out.weight": t[EMBEDDING].clone()}),
        "the embedding by its other name": lambda t: t.update({"proj_out.weight": t.pop(EMBEDDING)}),
        "another output": lambda t: t.update({"proj_out.weight": torch.ones(3, 64)}),
        "a bias": lambda t: t.update({"model.decoder.layers.0.self_attn.k_proj.bias": torch.zeros(64)}),
        "a layer": lambda t: t.update({n.replace("layers.1.", "layers.2."): t[n].clone() for n in [*t]}),
        "anything": lambda t: t.update({f"model.{chance.random()}": torch.ones(3)}),
    }
    way = chance.choice(list(ways))
    return Breakage(f"{name} with {way}", lambda tensors, _: ways[way](tensors))


def _miscount(chance: random.Random, names: list[str]) -> Breakage:
    key, step = chance.choice((*SIZES, "tie_word_embeddings")), chance.choice((-1, 1, 3))
    if key == "tie_word_embeddings":
        return Breakage("untied", lambda _, config: config.update({key: False}))
    return Breakage(f"{key} {step:+d}", lambda _, config: config.update({key: max(1, config.get(key, 2) + step)}))


def why_not_whole(directory: Path) -> str | None:
    """What keeps transformers from loading a checkpoint for speech recognition whole; None if nothing does."""
    from transformers import WhisperForConditionalGeneration
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        _, info = WhisperForConditionalGeneration.from_pretrained(
            directory, output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # whatever it is: the checkpoint is not whole
        return f"{type(error).__name__}: {error}"
    finally:
        logging.set_verbosity(level)
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    return str(wrong) if wrong else None
