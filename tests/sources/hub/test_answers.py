"""A server in the Hub's place that answers with nonsense: one line, exit code 1, no traceback.

And caches that cannot be written, and local paths with a typo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from forked import run_python
from helpers import merged, run_hsa, same_tensors
from hub_server import Fault, Handler, Servers
from hub_support import COMMIT, IDS, arguments, env, merge, published, refused, servers

from hsa.sources.hub.repository import find_id

__all__ = ["env", "published", "servers"]

Env = dict[str, str]
Ids = dict[str, str]


@pytest.mark.parametrize(
    "answer",
    {
        "a list": [],
        "a text": "org/whisper",
        "a number": 5,
        "null": None,
        "a list of numbers": [1, 2],
        "no commit": {"id": "org/whisper", "siblings": [{"rfilename": "config.json"}]},
        "a number for a commit": {"id": "org/whisper", "sha": 5, "siblings": [{"rfilename": "config.json"}]},
        "siblings that are a text": {"id": "x", "sha": COMMIT, "siblings": "config.json"},
        "siblings that are an object": {"id": "x", "sha": COMMIT, "siblings": {"rfilename": "config.json"}},
        "siblings that are null": {"id": "x", "sha": COMMIT, "siblings": None},
        "siblings that are numbers": {"id": "x", "sha": COMMIT, "siblings": [1, 2]},
        "siblings without names": {"id": "x", "sha": COMMIT, "siblings": [{"name": "config.json"}]},
        "siblings with names that are numbers": {"id": "x", "sha": COMMIT, "siblings": [{"rfilename": 5}]},
        "siblings with names that are lists": {"id": "x", "sha": COMMIT, "siblings": [{"rfilename": ["config.json"]}]},
        "siblings with blobs that are numbers": {
            "id": "x",
            "sha": COMMIT,
            "siblings": [{"rfilename": "config.json", "lfs": 5}],
        },
        "a date that is none": {"id": "x", "sha": COMMIT, "lastModified": "yesterday", "siblings": []},
    }.items(),
    ids=lambda case: case[0],
)
def test_an_answer_of_the_api_that_has_another_form_is_one_line(
    answer: tuple[str, object], servers: Servers, env: Env, published: Ids, tmp_path: Path
) -> None:
    servers.api = json.dumps(answer[1]).encode()
    refused(published, tmp_path / "out", env, 1, "base: ", servers.url)


@pytest.mark.parametrize("text", [b"", b"<html>", b"\xff\xfe", b"[" * 100_000, b'{"id": ' + b"9" * 5000 + b"}"])
def test_an_answer_of_the_api_that_cannot_be_parsed_is_one_line(
    text: bytes, servers: Servers, env: Env, published: Ids, tmp_path: Path
) -> None:
    servers.api = text
    refused(published, tmp_path / "out", env, 1, "base: ", servers.url)


@pytest.mark.parametrize(
    "location",
    [
        "http://[::1",
        "http://127.0.0.1:99999/x",
        "http://127.0.0.1:port/x",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "data:,x",
        "http://host name/x",
        "http://127.0.0.1:1/x",
        "http://" + "a" * 300 + ".invalid/",
        "//",
    ],
)
def test_a_redirect_to_a_broken_address_is_one_line(
    location: str, servers: Servers, env: Env, published: Ids, tmp_path: Path
) -> None:
    servers.location = location
    refused(published, tmp_path / "out", env, 1, "base")


def _with_range(content_range: str) -> Fault:
    def answer(handler: Handler) -> bool:
        handler.note(0)
        handler.answer(206, b"\0" * 64, Content_Range=content_range)
        return True

    return answer


@pytest.mark.parametrize(
    "content_range",
    [
        "bytes 0-" + "9" * 5000 + "/5",
        "bytes " + "0" * 5000 + "-7/5",
        "bytes 0-7/" + "9" * 5000,
        "bytes 7-0/100",
        "bytes -/-",
        "bytes */100",
        "lines 0-7/100",
        "",
    ],
    ids=lambda text: text[:12],
)
def test_an_absurd_content_range_is_one_line(
    content_range: str, servers: Servers, env: Env, published: Ids, tmp_path: Path
) -> None:
    servers.always = _with_range(content_range)
    line = refused(published, tmp_path / "out", env, 1 if not content_range.startswith("bytes 0-7/") else 2, "base")
    assert len(line) < 1000


@pytest.mark.parametrize("size", ["-1", "9" * 30])
def test_an_absurd_size_of_a_file_is_one_line(
    size: str, servers: Servers, env: Env, published: Ids, tmp_path: Path
) -> None:
    servers.linked_size = size
    refused(published, tmp_path / "out", env, 1, "base", "bytes")


@pytest.mark.parametrize("size", ["many", "1e3", "9" * 5000])
def test_a_size_that_is_no_number_counts_as_none(
    size: str, servers: Servers, env: Env, published: Ids, shared_triple: Mapping[str, Path], tmp_path: Path
) -> None:
    """huggingface_hub leaves such a size out; the files are fetched whole then."""
    servers.linked_size = size
    merge(published, tmp_path / "out", env)
    same_tensors(tmp_path / "out", merged(shared_triple, tmp_path / "local"))


# Caches that cannot be written --------------------------------------------------------------------------------


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
"""A shell's commands that run a program with the directory $0 on a read-only filesystem; needs root."""


def run_sealed(directory: Path, *arguments: str, env: Env) -> subprocess.CompletedProcess[str]:
    """Run the command line where nothing in `directory` can be written, not even by root."""
    command = [sys.executable, "-m", "hsa", *arguments]
    environment = {**os.environ, **env}
    if os.getuid() == 0:
        command = ["unshare", "-m", "bash", "-c", READ_ONLY, str(directory), *command]
        probe = subprocess.run([*command[:6], "true"], capture_output=True, text=True, check=False)
        if probe.returncode:
            pytest.skip(f"no read-only mount can be made here: {probe.stderr.strip()}")
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    places = [path for path in (directory, *directory.rglob("*")) if path.is_dir() and not path.is_symlink()]
    for path in places:
        path.chmod(0o555)
    try:
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    finally:
        for path in places:
            path.chmod(0o755)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_filled_cache_that_cannot_be_written_is_enough(
    offline: str, servers: Servers, env: Env, published: Ids, tmp_path: Path
) -> None:
    merge(published, tmp_path / "first", env)
    again = arguments(published, tmp_path / "again")
    done = run_sealed(tmp_path / "hf", *again, env={**env, "HF_HUB_OFFLINE": offline})
    assert done.returncode == 0, done.stderr
    same_tensors(tmp_path / "again", tmp_path / "first")


def test_an_empty_cache_that_cannot_be_written_is_named_with_a_remedy(
    servers: Servers, env: Env, published: Ids, tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    done = run_sealed(tmp_path / "hf", *arguments(published, tmp_path / "out"), env=env)
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("hsa: error: ") and str(tmp_path / "hf") in line and "HF_HOME" in line, line
    assert "destination" not in line
    assert not (tmp_path / "out").exists()


def test_ranges_that_cannot_be_kept_name_the_cache_of_ranges(
    servers: Servers, env: Env, published: Ids, tmp_path: Path
) -> None:
    """The small files are in the ordinary cache, which can be written; only this package's own cache cannot."""
    (tmp_path / "ranges").mkdir()
    done = run_sealed(
        tmp_path / "ranges", *arguments(published, tmp_path / "out"), env={**env, "HSA_CACHE": str(tmp_path / "ranges")}
    )
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("hsa: error: ") and str(tmp_path / "ranges") in line and "HSA_CACHE" in line, line
    assert "destination" not in line


def test_a_config_alone_in_the_cache_lacks_the_weights(
    servers: Servers, env: Env, published: Ids, tmp_path: Path
) -> None:
    fetch = "from huggingface_hub import hf_hub_download as d\nimport sys\nfor r in sys.argv[1:]: d(r, 'config.json')"
    done = run_python(fetch, *published.values(), env=env)
    assert done.returncode == 0, done.stderr
    line = refused(
        published,
        tmp_path / "out",
        {**env, "HF_HUB_OFFLINE": "1"},
        1,
        "the weights of org/whisper",
        "HF_HUB_OFFLINE is set",
    )
    assert "holds no weights" not in line


# Paths that look local ------------------------------------------------------------------------------------------


def test_a_hub_that_cannot_be_reached_says_how_a_local_path_is_written(tmp_path: Path, env: Env) -> None:
    """It said that what was fetched is kept, where nothing was, and nothing of the path that may have been meant."""
    ids = {"base": "tt/base", "primary": "tt/primary", "secondary": "tt/secondary"}
    unreachable = {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}
    line = refused(ids, tmp_path / "out", unreachable, 1, "base: tt/base", "http://127.0.0.1:9 cannot be reached")
    assert line.endswith("check the network and try again; a local directory of that name would be ./tt/base")
    assert "is kept" not in line


def test_a_typo_in_a_local_path_asks_no_hub(
    triple: Mapping[str, Path], servers: Servers, env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = {"base": "sources/bse", "primary": "sources/primary", "secondary": "sources/secondary"}
    done = run_hsa(*arguments(wrong, tmp_path / "out"), env=env)
    assert done.returncode == 2
    assert "did you mean sources/base?" in done.stderr and "sources/bse@main" in done.stderr
    assert servers.seen == []


def test_what_looks_local_is_local_unless_a_revision_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_id("openai/whisper-tiny") is not None
    (tmp_path / "openai").mkdir()
    assert find_id("openai/whisper-tiny") is None
    assert find_id("openai/whisper-tiny@main") is not None
    assert IDS["base"].count("/") == 1
