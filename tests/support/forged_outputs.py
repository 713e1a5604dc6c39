"""What the tests of verify share: how they damage and forge an output, and read what a report says."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3

import hsa
from hsa.outputs import provenance
from hsa.outputs.card import render as render_card
from hsa.system import manifest
from hsa.system.manifest import PROVENANCE

Triple = dict[str, Path]
WEIGHTS = "model.safetensors"
TARGET = "model.encoder.layers.1.self_attn.v_proj.weight"
COPIED = "model.decoder.layers.0.fc1.weight"


def flip(path: Path, position: int, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1 << bit
    path.write_bytes(raw)


def forge(output: Path, change: Callable[[dict[str, Any]], None] = lambda document: None) -> None:
    """Write the provenance again, so that it fits what the files hold now and what `change` made of it."""
    document = json.loads((output / PROVENANCE).read_text())
    change(document)
    for name, entry in document["files"].items():
        if entry and (output / name).is_file():
            entry["blake3"] = blake3((output / name).read_bytes()).hexdigest()
    document[manifest.DIGEST] = manifest.document_digest(document)
    (output / PROVENANCE).write_bytes(manifest.render(document))


def forge_with_card(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the record, and write the card that goes with it."""
    forge(output, change)  # type: ignore[arg-type]
    config = json.loads((output / "config.json").read_text())
    card = render_card(provenance.load(output).record, sorted(os.listdir(output)), config)
    (output / "README.md").write_bytes(card)
    forge(output)


def named(report: hsa.VerifyReport) -> set[str]:
    return {problem.file for problem in report.problems}


def told(report: hsa.VerifyReport) -> str:
    return "\n".join(f"{problem.file}: {problem.what}" for problem in report.problems)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)
