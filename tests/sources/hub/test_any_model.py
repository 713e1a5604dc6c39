"""Models of no family with heads on the Hub: which of their files are fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forked import run_hsa
from helpers import edit_json, read_tensors, same_tensors, write_tensors
from hub_server import Servers
from hub_support import env, servers

import hsa
from hsa.testing.llama_checkpoints import LlamaShape, write_llama

__all__ = ["env", "servers"]

IDS = ("org/one", "org/two")


@pytest.fixture
def llamas(tmp_path: Path, servers: Servers) -> list[Path]:
    """Two tied Llamas, with code and files that no merge takes, on the server too."""
    paths = []
    for name in IDS:
        path = write_llama(
            tmp_path / "sources" / name, LlamaShape(hidden_size=60, vocab_size=20_011, tied=True), role=name
        )
        edit_json(path / "config.json", auto_map={"AutoModel": "modeling_mine.Mine"})
        for file in ("modeling_mine.py", "optimizer.pt", "notes.txt", "tokenizer.model"):
            (path / file).write_text(name)
        tensors = read_tensors(path)
        write_tensors(path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
        servers.add(name, path)
        paths.append(path)
    return paths


def run(output: Path, env: dict[str, str], *more: str) -> dict[str, Any]:
    models = [f"--model={name}" for name in IDS]
    done = run_hsa("merge", "--method=linear", *models, f"--output={output}", "--no-sync", "--json", *more, env=env)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_merge_from_the_hub_is_that_of_directories(
    llamas: list[Path], servers: Servers, env: dict[str, str], tmp_path: Path
) -> None:
    report = run(tmp_path / "out", env)
    assert sum("is model.embed_tokens.weight once more" in note for note in report["notes"]) == 2
    local = hsa.merge(method="linear", models=llamas, output=tmp_path / "local", sync=False).output
    same_tensors(tmp_path / "out", local)
    small = {path.name for path in local.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == small
    assert {"modeling_mine.py", "tokenizer.model", "LICENSE", "chat_template.jinja"} < small
    fetched = {Path(seen.path).name for seen in servers.seen}
    assert not fetched & {"optimizer.pt", "notes.txt"}


def test_a_dry_run_fetches_headers_and_small_files_alone(
    llamas: list[Path], servers: Servers, env: dict[str, str], tmp_path: Path
) -> None:
    plan = run(tmp_path / "out", env, "--dry-run")
    size = sum((path / "model.safetensors").stat().st_size for path in llamas)
    assert 0 < plan["bytes_to_fetch"] < size and not (tmp_path / "out").exists()
    assert "lm_head.weight" not in plan["targets"] and "model.embed_tokens.weight" in plan["targets"]


def test_hsa_refuses_a_model_without_heads_before_weights_are_fetched(
    llamas: list[Path], servers: Servers, env: dict[str, str], tmp_path: Path
) -> None:
    sources = [f"--{role}={name}" for role, name in zip(("base", "primary", "secondary"), (*IDS, IDS[0]), strict=True)]
    done = run_hsa("merge", *sources, f"--output={tmp_path / 'out'}", env=env)
    assert done.returncode == 2 and "is not a Whisper checkpoint" in done.stderr
    assert sum(seen.bytes for seen in servers.of("cdn")) < (llamas[0] / "model.safetensors").stat().st_size
