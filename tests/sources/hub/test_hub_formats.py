"""Hub ids whose weights are pickles or adapters, against a server on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_hsa, run_python
from helpers import merge_arguments, read_tensors, write_adapter, write_pickle
from hub_server import Servers
from hub_support import IDS, MERGER, commit_of, env, files, merge, refused, servers

from hsa.sources.checkpoint import PICKLES, WEIGHTS

__all__ = ["env", "servers"]


def merged_here(sources: Mapping[str, Path], output: Path, env: Mapping[str, str], *more: str) -> bytes:
    """The weights of a merge of directories."""
    done = run_hsa(*merge_arguments(sources, output, "--no-sync", *more), env=env)
    assert done.returncode == 0, done.stderr
    return files(output)[WEIGHTS]


def test_pickle_weights_are_fetched_whole(
    servers: Servers, env: dict[str, str], triple: dict[str, Path], tmp_path: Path
) -> None:
    write_pickle(triple["primary"], read_tensors(triple["primary"]), shards=2)
    write_pickle(triple["secondary"], read_tensors(triple["secondary"]))
    for role, name in IDS.items():
        servers.add(name, triple[role])
    report = merge(IDS, tmp_path / "out", env)
    assert files(tmp_path / "out")[WEIGHTS] == merged_here(triple, tmp_path / "local", env)
    for role in ("primary", "secondary"):
        size = sum(path.stat().st_size for path in triple[role].glob("*.bin"))
        assert f"{role}: pickle weights: {size} bytes of {IDS[role]} fetched whole" in report["notes"]
    assert [seen.range for seen in servers.of("cdn")].count(None) == 3
    servers.seen.clear()
    assert merge(IDS, tmp_path / "again", {**env, "HF_HUB_OFFLINE": "1"})["bytes_fetched"] == 0
    assert servers.seen == []


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_on_the_hub_is_refused(
    servers: Servers, env: dict[str, str], triple: dict[str, Path], tmp_path: Path
) -> None:
    tensors: dict[str, Any] = dict(read_tensors(triple["secondary"]))
    write_pickle(triple["secondary"], tensors | {"model.trap": Trap(tmp_path / "ran")})
    for role, name in IDS.items():
        servers.add(name, triple[role])
    refused(IDS, tmp_path / "out", env, 2, "secondary: ", f"/{PICKLES.weights} holds more", "posix.mkdir", "could run")
    assert not (tmp_path / "ran").exists()
    torch.load(triple["secondary"] / PICKLES.weights, weights_only=False)
    assert (tmp_path / "ran").exists(), "unpickled freely it does run"


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_an_adapter_on_the_hub_stands_on_base(
    servers: Servers, env: dict[str, str], triple: dict[str, Path], tmp_path: Path, role: str
) -> None:
    """Base is fetched whole for a primary, for the output is base's tensors then; for a secondary in ranges alone."""
    weights = {n: t for n, t in read_tensors(triple["base"]).items() if n.endswith(("q_proj.weight", "fc1.weight"))}
    write_adapter(tmp_path / "adapter", weights)
    triple[role] = tmp_path / "adapter"
    for name, path in zip(IDS.values(), triple.values(), strict=True):
        servers.add(name, path)
    plan = merge(IDS, tmp_path / "out", env, "--dry-run")
    assert not (tmp_path / "out").exists()
    assert plan["bytes_to_fetch"] > 0
    report = merge(IDS, tmp_path / "out", env)
    assert files(tmp_path / "out")[WEIGHTS] == merged_here(triple, tmp_path / "local", env)
    etag = servers.repos[IDS["base"]].etag(triple["base"] / WEIGHTS)
    of_base = {seen.range for seen in servers.of("cdn") if etag in seen.path}
    assert (None in of_base) == (role == "primary")
    source = json.loads((tmp_path / "out" / "hsa_merge.json").read_bytes())["sources"][role]
    assert (source["id"], source["revision"], source["format"]) == (IDS[role], commit_of(IDS[role]), "adapter")
    assert report["bytes_fetched"] > 0
    done = run_python(MERGER, *IDS.values(), *map(str, triple.values()), env={**env, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr


def test_an_adapter_as_base_is_refused(
    servers: Servers, env: dict[str, str], triple: dict[str, Path], tmp_path: Path
) -> None:
    write_adapter(tmp_path / "adapter", {"model.encoder.layers.0.fc1.weight": torch.empty(128, 64)})
    for name, path in zip(IDS.values(), {**triple, "base": tmp_path / "adapter"}.values(), strict=True):
        servers.add(name, path)
    refused(IDS, tmp_path / "out", env, 2, "base: ", "holds a LoRA adapter, not a pretrained model")
