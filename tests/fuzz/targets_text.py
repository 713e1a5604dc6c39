"""Hostile text beside the weights: indexes, configs, small files and recipes."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from arena import Arena
from guard import Finding

from hsa.releases import recipe
from hsa.sources.checkpoint import CONFIG, INDEX
from hsa.system.strict_json import count_marks

# The JSON files of a source ------------------------------------------------------------------------------------------


def index_seeds(arena: Arena) -> Iterable[bytes]:
    text = (arena.sharded / INDEX).read_bytes()
    yield text
    for name in ("../../secret/model.safetensors", "/etc/passwd", "../link/model.safetensors", "x\0.safetensors"):
        yield text.replace(b"model-00002-of-00002.safetensors", json.dumps(name)[1:-1].encode(), 3)


def config_seeds(arena: Arena) -> Iterable[bytes]:
    text = (arena.triple["primary"] / CONFIG).read_bytes()
    yield text
    document = json.loads(text)
    deep: Any = 1
    for _ in range(60):
        deep = [deep]
    yield json.dumps({**document, "deep": deep, "dtype": "float16", "tie_word_embeddings": False}).encode()


def any_config_seeds(arena: Arena) -> Iterable[bytes]:
    text = (arena.llamas["model1"] / CONFIG).read_bytes()
    yield text
    document = json.loads(text)
    code = {"AutoModelForCausalLM": "modeling_mine.LlamaForCausalLM", "AutoModel": ["../../secret/x.Y", None]}
    yield json.dumps({**document, "auto_map": code, "tie_word_embeddings": True}).encode()
    names = {"architectures": ["<b>`x`\n"], "model_type": "llama", "quantization_config": {"quant_method": "x"}}
    yield json.dumps({**document, **names, "auto_map": {"AutoModel": "os.path.join"}}).encode()


def merge_config(arena: Arena) -> str:
    return arena.merge("--dtype=float16")


def merge_tokenized(arena: Arena) -> str:
    """With the small files of primary; what is written, `hsa verify` calls sound."""
    said = arena.merge(primary=arena.tokenized)
    if said == "success":
        code, _, lines = arena.run("verify", str(arena.output))
        if code:
            raise Finding(f"merge wrote what verify refuses: {lines!r:.500}")
    return said


def merge_adapter(arena: Arena) -> str:
    return arena.merge(secondary=arena.adapter)


# Recipes -------------------------------------------------------------------------------------------------------------


def read_recipe(arena: Arena, data: bytes) -> str:
    """Read alone: what a recipe names as sources is its author's to say, and may lie anywhere."""
    return arena.call(lambda: recipe.loads(data, "recipe.yaml", arena.sources))


def recipe_seeds(arena: Arena) -> Iterable[bytes]:
    yield (Path(__file__).resolve().parents[2] / "examples" / "whisper-scaling.yaml").read_bytes()
    yield b"merges: [{name: a, group: b, base: x/a, primary: ~/b, secondary: ../c, k: 60, card: {title: 'x'}}]\n"
    yield b"a: &a [x, x]\nb: &b [*a, *a]\nmerges: [*b, *b]\n"
    yield b"!!python/object/apply:os.system ['true']\n"


def release_recipe(arena: Arena, data: bytes) -> str:
    """`hsa release` of a recipe whose only entry says what the input says, but for its sources, which are the sound
    ones: any other input is the recipe, where its entries can name no source that is there."""
    sources = {role: str(path) for role, path in arena.triple.items()}
    if count_marks(data) < 10_000:
        with contextlib.suppress(ValueError, RecursionError, TypeError):
            entry = {"name": "a", "group": "g", **json.loads(data), **sources}
            data = json.dumps({"merges": [{k: v for k, v in entry.items() if k != "assets_from"}]}).encode()
    shutil.rmtree(arena.output, ignore_errors=True)
    path = arena.output.parent / "recipe.yaml"
    path.write_bytes(data)
    try:
        code, _, lines = arena.run("release", str(path), f"--output={arena.output}", "--quiet", codes=(0, 1, 2))
    finally:
        path.unlink()
        shutil.rmtree(arena.output, ignore_errors=True)
    return "success" if code == 0 else lines[-1] if lines else "refused"


def release_seeds(arena: Arena) -> Iterable[bytes]:
    yield b'{"k": 0.6, "lambda": 0.5, "max_shard_size": "50KB", "card": {"title": "x"}}'
    yield b'{"name": "../b", "group": "<b>", "targets": "attention-all", "dtype": "float16", "lambda": {}}'
