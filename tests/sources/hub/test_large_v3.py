"""Repositories of the shape of Whisper large-v3: how much of them is fetched, and that a killed fetch goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from forked import run_python
from hub_server import Handler, Servers
from hub_support import env, servers, weights_sent

from hsa.sources import safetensors
from hsa.sources.checkpoint import WEIGHTS
from hsa.system.dtypes import CODES
from hsa.testing.whisper_checkpoints import SHAPES, DType, tensor_shapes, write_config

__all__ = ["env", "servers"]


def write_hollow(directory: Path, shape: str, dtype: DType) -> Path:
    """A checkpoint with the real layout of a size and nothing but holes for data."""
    directory.mkdir(parents=True)
    write_config(directory, SHAPES[shape], dtype)
    itemsize = 2 if dtype == "float16" else 4
    entries, end = [], 0
    for name, dims in sorted(tensor_shapes(SHAPES[shape]).items()):
        count = itemsize
        for dim in dims:
            count *= dim
        entries.append(safetensors.TensorEntry(name, CODES[dtype], dims, end, end + count))
        end += count
    raw = safetensors.serialize(entries, {"format": "pt"})
    (directory / WEIGHTS).write_bytes(raw)
    os.truncate(directory / WEIGHTS, len(raw) + end)
    return directory


OPEN = """
import json, sys
from hsa.errors import SourceError
from hsa.system.fsio import Tally
from hsa.sources.hub.client import Hub
from hsa.sources.hub.needs import Needs
from hsa.architectures.whisper import WHISPER
hub = Hub()
with hub.open(sys.argv[1], sys.argv[2], Tally(), Needs("targets", "encoder-qkv", assets=True)) as checkpoint:
    readable = {True: [0, 0], False: [0, 0]}
    for name, ref in checkpoint.tensors.items():
        target = WHISPER.target(name, "encoder-qkv") is not None
        view = memoryview(bytearray(8))
        try:
            checkpoint.read_into(ref, view)
            checkpoint.read_into(ref, view, ref.nbytes - 8)
            readable[target][1] += 1
        except SourceError as error:
            assert "were not fetched" in str(error)
        readable[target][0] += 1
    checkpoint.check_unchanged()
print(json.dumps({"fetched": hub.fetched, "targets": readable[True], "others": readable[False]}))
"""


@pytest.mark.parametrize(("role", "dtype"), [("base", "float16"), ("secondary", "float32")])
def test_the_share_of_large_v3_that_is_fetched(
    servers: Servers, env: dict[str, str], tmp_path: Path, role: str, dtype: DType
) -> None:
    directory = write_hollow(tmp_path / "large", "large-v3", dtype)
    servers.add("org/large", directory)
    done = run_python(OPEN, role, "org/large", env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    size = (directory / WEIGHTS).stat().st_size
    sent = sum(seen.bytes for seen in servers.seen)
    assert found["fetched"] == {role: sent}
    assert sent < 0.12 * size
    assert len(servers.of("cdn")) <= 70
    assert len(servers.of("hub")) + len(servers.of("hub", "HEAD")) <= 12
    assert found["targets"] == [160, 160]
    assert found["others"][1] < found["others"][0] / 10, "what lies between targets alone is here too"
    (part,) = (tmp_path / "hf" / "hsa").rglob(f"{WEIGHTS}.part")
    assert part.stat().st_size == size
    print(f"large-v3 {dtype}: {sent} of {size} bytes, {sent / size:.2%}, in {len(servers.of('cdn'))} requests")


def test_a_killed_fetch_goes_on_where_it_was(servers: Servers, env: dict[str, str], tmp_path: Path) -> None:
    directory = write_hollow(tmp_path / "large", "large-v3", "float16")
    servers.add("org/large", directory)
    reached, released = threading.Event(), threading.Event()

    def stall(handler: Handler) -> bool:
        if len(servers.of("cdn")) < 40:
            return False
        reached.set()
        released.wait(30)
        handler.close_connection = True
        return True

    servers.always = stall
    patient = {**os.environ, **env, "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    with subprocess.Popen([sys.executable, "-c", OPEN, "base", "org/large"], env=patient) as process:
        assert reached.wait(60)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    released.set()
    servers.always = None
    before = weights_sent(servers)
    servers.seen.clear()
    done = run_python(OPEN, "base", "org/large", env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["targets"] == [160, 160]
    size = (directory / WEIGHTS).stat().st_size
    assert before > 0.04 * size
    assert before + weights_sent(servers) < 0.12 * size + (32 << 20), "what was on disk is not fetched again"
    assert weights_sent(servers) < 0.08 * size


def test_two_runs_fetch_once(servers: Servers, env: dict[str, str], tmp_path: Path) -> None:
    directory = write_hollow(tmp_path / "small", "small", "float16")
    servers.add("org/small", directory)
    command = [sys.executable, "-c", OPEN, "base", "org/small"]
    both = [subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    places = [seen.range for seen in servers.of("cdn")]
    assert len(places) == len(set(places)) > 1
    assert sum(one["fetched"].get("base", 0) for one in found) >= weights_sent(servers)
