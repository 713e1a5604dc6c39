"""A model that is named by its id on the Hub, from a server on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from helpers import run_hsa
from hub_support import env, published, servers
from speech_sets import write_set

__all__ = ["env", "published", "servers"]
Triple = dict[str, Path]


def test_a_hub_id_gives_the_transcripts_of_its_files(
    published: Mapping[str, str], shared_triple: Triple, env: dict[str, str], tmp_path: Path
) -> None:
    table = write_set(tmp_path / "speech", (0.4, 0.6))
    out = tmp_path / "out"
    arguments = (f"--data={table}", "--device=cpu", "--language=de", f"--output={out}", "--json")
    done = run_hsa("eval", published["primary"], *arguments, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["run"]["decoded"] == 2 and found["models"][0]["given"] == published["primary"]
    again = json.loads(run_hsa("eval", shared_triple["primary"], *arguments).stdout)
    assert again["run"]["decoded"] == 0, "a directory with the same bytes has the same key"
    assert again["models"][0]["digest"] == found["models"][0]["digest"]
