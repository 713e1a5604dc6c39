"""Writes `tests/format1`: small sources, and what hsa wrote from them in format 1, the first format of its records.

It was run once, by hand, at commit 960aef6 (hsa 0.1.0); only its imports have changed since. The files must never be
written again by later code: they stand for the outputs, patches, sweeps and releases that users have, which every later
version must read. It is kept to tell how they were made, and as a pattern for the files of a later format. It refuses a
folder that exists.

    python tests/golden/make_format1.py FOLDER
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from helpers import edit_json, read_tensors, write_adapter, write_openai, write_pickle

import hsa
from hsa.testing.whisper_checkpoints import WhisperShape, write_checkpoint, write_triple

SHAPE = WhisperShape(
    d_model=16,
    encoder_layers=2,
    decoder_layers=1,
    encoder_heads=4,
    decoder_heads=4,
    ffn_dim=16,
    vocab_size=268,
    num_mel_bins=8,
    max_source_positions=50,
    max_target_positions=8,
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = {
    "title": "A model of format 1",
    "license": "apache-2.0",
    "language": "en",
    "role": "composed model",
    "adaptation_context": "read speech | with a pipe, <angle brackets> and an accent: é",
}
ENCODER_QKV = [
    f"encoder.layers.{layer}.self_attn.{name}"
    for layer in range(SHAPE.encoder_layers)
    for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias")
]
SOURCES = {role: f"sources/{role}" for role in ("base", "primary", "secondary")}
GRID: dict[str, Any] = {"lam": (0.1, 0.5), "targets": ("encoder-qkv", "attention-all"), "k": (0.5,)}
RECIPE = """\
title: Format 1
defaults:
  group: first
  base: sources/base
  primary: sources/primary
  secondary: sources/secondary
  card: {license: apache-2.0, role: composed model}
merges:
  - name: plain
  - name: cast
    group: second
    k: 25
    lambda: 0.3
    dtype: bfloat16
    primary_id: org/older-children
    card: {adaptation_context: "read speech, ages 6 to 9"}
"""

OUTPUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "sources": {**SOURCES, "secondary": "sources/secondary-float16"},
        "targets": "attention-all",
        "k": 25,
        "lam": 0.3,
        "alpha": 1.5,
        "max_shard_size": "20KB",
        "assets_from": "secondary",
        "base_id": f"openai/whisper-tiny@{COMMIT}",
        "primary_id": "org/older-children",
        "secondary_id": "org/younger-children@v1.0",
        "card": CARD,
    },
    "scales-and-cast": {"attention_scale": 0.5, "non_attention_scale": 1.25, "dtype": "float16"},
    "per-tensor": {
        "k": {name: 0.25 + 0.25 * (place % 3) for place, name in enumerate(ENCODER_QKV)},
        "lam": {f"model.{name}": 0.1 * place for place, name in enumerate(ENCODER_QKV)},
    },
    "two-heads": {"num_heads": 2, "num_layers": 5, "targets": "attention-qkv", "k": 0},
    "reference": {"numerics": "reference", "load_dtype": "float32", "targets": "attention-all"},
    "openai-and-pickle": {"sources": {**SOURCES, "base": "sources/base.pt", "secondary": "sources/secondary-pickled"}},
    "adapter": {"sources": {**SOURCES, "primary": "sources/adapter"}},
    "without-digests": {"digest": False},
}
PATCHES = ("plain", "everything", "per-tensor")
"""The outputs of which there is a patch too."""


def write_sources() -> None:
    triple = write_triple("sources", SHAPE, seed=1)
    write_checkpoint("sources/secondary-float16", SHAPE, dtype="float16", role="secondary", seed=1)
    edit_json(Path("sources/secondary-float16/normalizer.json"), colour="color")
    pickled = Path(shutil.copytree(triple["secondary"], "sources/secondary-pickled"))
    write_pickle(pickled, read_tensors(triple["secondary"]))
    write_openai(Path("sources/base.pt"), triple["base"])
    adapted = {name: tensor for name, tensor in read_tensors(triple["base"]).items() if name.endswith("v_proj.weight")}
    write_adapter(Path("sources/adapter"), adapted, base_model_name_or_path="base")


def main(folder: Path) -> None:
    folder.mkdir()
    os.chdir(folder)
    write_sources()
    outputs = {}
    for name, given in OUTPUTS.items():
        sources = given.get("sources", SOURCES)
        parameters = {key: value for key, value in given.items() if key != "sources"}
        hsa.merge(**sources, output=f"outputs/{name}", **parameters)
        ids = {key: value for key, value in parameters.items() if key.endswith("_id")}
        outputs[name] = {"sources": sources, "ids": ids, "patch": name in PATCHES}
        if name in PATCHES:
            hsa.merge_patch(**sources, output=f"patches/{name}.safetensors", **parameters)
    hsa.sweep(**SOURCES, output="sweep", **GRID)
    hsa.sweep(**SOURCES, output="sweep-full", full=True, lam=(0.1, 0.5))
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    assert hsa.release("recipe.yaml", "release").ok
    files = {
        path.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path().rglob("*"))
        if path.is_file()
    }
    about = "what there is in this folder, with SHA-256 digests; written by tests/golden/make_format1.py"
    document = {"about": about, "outputs": outputs, "files": files}
    Path("contents.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    (given,) = sys.argv[1:]
    main(Path(given).absolute())
