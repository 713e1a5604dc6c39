"""Checkpoints of Murmur, the family of `murmur_family.py`: a Whisper's values under other names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from helpers import read_tensors, write_tensors

STACKS = {"encoder": "speech_encoder", "decoder": "text_decoder"}


def murmur_name(name: str) -> str:
    """Murmur's name for a tensor or a config key of Whisper's, with or without `model.`."""
    prefix, bare = ("model.", name[6:]) if name.startswith("model.") else ("", name)
    stack = next((stack for stack in STACKS if bare.startswith(stack)), "")
    return prefix + STACKS.get(stack, "") + bare[len(stack) :]


def write_murmur(whisper: Path, directory: Path) -> Path:
    """The checkpoint of a Whisper as one of Murmur's: the same values under other names."""
    shutil.copytree(whisper, directory)
    config: dict[str, Any] = json.loads((whisper / "config.json").read_text())
    config = {murmur_name(key): value for key, value in config.items()} | {"model_type": "murmur"}
    (directory / "config.json").write_text(json.dumps(config))
    write_tensors(directory, {murmur_name(name): tensor for name, tensor in read_tensors(whisper).items()})
    return directory
