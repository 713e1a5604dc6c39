"""What the tests of hub ids share: a triple on the server of `hub_server`, and runs that must succeed or be refused.

huggingface_hub reads its environment when it is imported, so every run is a process of its own (see `forked`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from forked import run_hsa, run_python
from helpers import merge_arguments
from hub_server import SIGNATURE, TOKEN, Servers, running

Triple = Mapping[str, Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = {"base": "org/whisper", "primary": "org/first", "secondary": "org/second"}


@pytest.fixture
def servers() -> Iterator[Servers]:
    with running() as found:
        yield found


@pytest.fixture
def env(servers: Servers, tmp_path: Path) -> dict[str, str]:
    """The environment of a run: the server, a token, caches of the test's own, and an impatient client."""
    return {
        "HF_ENDPOINT": servers.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
        "HSA_CACHE": "",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@pytest.fixture
def published(servers: Servers, shared_triple: Triple) -> dict[str, str]:
    """The triple on the server; hub ids by role."""
    for role, name in IDS.items():
        servers.add(name, shared_triple[role])
    return dict(IDS)


def commit_of(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


def weights_sent(servers: Servers) -> int:
    return sum(seen.bytes for seen in servers.of("cdn"))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def arguments(ids: Mapping[str, str], output: Path, *more: str) -> list[str]:
    sources = {role: Path(name) for role, name in ids.items()}
    return [*merge_arguments(sources, output, "--no-sync", *more)]


MERGER = """
import sys, torch, hsa
hub = hsa.Merger(*sys.argv[1:4]).merge(k=0.5, lam=0.3)
local = hsa.Merger(*sys.argv[4:7]).merge(k=0.5, lam=0.3)
assert hub.keys() == local.keys() and hub
assert all(torch.equal(hub[name], local[name]) for name in hub)
"""

IMPATIENT = """
import sys
from hsa.sources.hub import range_requests
from hsa.__main__ import main
range_requests.PAUSE = 0.01
main()
"""
"""The command line, with next to no pauses between tries."""


def merge(ids: Mapping[str, str], output: Path, env: Mapping[str, str], *more: str) -> dict[str, Any]:
    """A merge that must succeed; its report, after a look for secrets and paths."""
    done = run_hsa(*arguments(ids, output, "--json", *more), env=env)
    assert done.returncode == 0, done.stderr
    for secret in (TOKEN, SIGNATURE):
        assert secret not in done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def refused(ids: Mapping[str, str], output: Path, env: Mapping[str, str], code: int, *expected: str) -> str:
    """A merge that must be refused with one line that holds no secret, also with --debug; and nothing written."""
    done = run_python(IMPATIENT, *arguments(ids, output, "--debug"), env=env)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    for secret in (TOKEN, SIGNATURE):
        assert secret not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("hsa: error: ")
    for part in expected:
        assert part in line
    assert not output.exists()
    return line
