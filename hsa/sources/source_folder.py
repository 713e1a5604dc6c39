"""Messages about what a source's folder holds instead of weights, or beside the weights that are read."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from hsa.errors import shown

_TRAINING = re.compile(r"checkpoint-([0-9]{1,18})")
"""Pattern for folders of training checkpoints, as transformers' Trainer names them."""

_SHARD = re.compile(r"(pytorch_)?model-[0-9]{5}-of-[0-9]{5}\.(safetensors|bin)")
MAX_NAMED = 4
"""The most entries of a folder that a message names."""


def describe_missing_weights(directory: Path, weights_names: Sequence[str]) -> str:
    """Describe a directory that holds none of these weights files, and say what to do.

    Example:
        >>> # run/checkpoint-500 and run/checkpoint-1000 hold weights
        >>> describe_missing_weights(Path("run"), ("model.safetensors",))
        'run holds no weights, but training checkpoints; give the newest of them, run/checkpoint-1000'
    """
    names = entry_names(directory)
    training = (name for name in names if _TRAINING.fullmatch(name))
    weights_paths = [
        f"{name}/{file}" for name in training for file in weights_names if os.path.lexists(directory / name / file)
    ]
    newest = newest_training_checkpoint(weights_paths, weights_names)
    if newest is not None:
        return f"{directory} holds no weights, but training checkpoints; give the newest of them, {directory / newest}"
    problem = f"{directory} holds no weights; looked for {_in_pairs(weights_names)}"
    shards = sorted(name for name in names if _SHARD.fullmatch(name))
    if shards:
        return f"{problem}; there are shards such as {shards[0]}, but not their index: copy that too"
    if not names:
        return f"{problem}; the directory is empty"
    examples = ", ".join(shown(name) for name in sorted(names)[:MAX_NAMED])
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{problem}; there are {examples}{more}: give the directory that holds the weights, or download them too"


def notes_on_unread_weights(role: str, names: Collection[str], whole: str, index: str, adapter: str) -> Iterator[str]:
    """Yield notes on weights that are in the folder but are not read.

    `names` are the entries of the folder. `whole` and `index` are the names of a single weights file and of a shard
    index in the format that is read; `adapter` is the name of an adapter's config. The weights that are read are those
    that transformers reads.
    """
    if whole in names and index in names:
        yield (
            f"{role} holds {whole} and also shards with their index, {index}: {whole} is read, as transformers does, "
            f"and the shards are left out; if these are the weights you mean, move {whole} away"
        )
    if adapter in names:
        yield (
            f"{role} holds a whole model and also an adapter ({adapter}): the whole model is read and the adapter is "
            f"left out; transformers with peft would load the adapter on its own base instead, so move away what you "
            f"do not mean"
        )


def _in_pairs(names: Sequence[str]) -> str:
    """Join names in pairs, since they belong together; an odd last name stays alone."""
    pairs = [" and ".join(names[first : first + 2]) for first in range(0, len(names), 2)]
    return f"{', '.join(pairs[:-1])}, and {pairs[-1]}" if pairs[1:] else pairs[0]


def entry_names(directory: Path) -> list[str]:
    """List a directory. Returns nothing if it cannot be listed; its files may still be readable by name."""
    try:
        return os.listdir(directory)
    except OSError:
        return []


def newest_training_checkpoint(files: Collection[str], weights_names: Collection[str]) -> str | None:
    """Return the training checkpoint with the largest number, among those that hold one of these weights files.

    `files` are paths below a folder, such as `checkpoint-500/model.safetensors`.
    """
    numbered = []
    for path in files:
        folder, _, name = path.partition("/")
        match = _TRAINING.fullmatch(folder)
        if match and name in weights_names:
            numbered.append((int(match[1]), folder))
    return max(numbered)[1] if numbered else None
