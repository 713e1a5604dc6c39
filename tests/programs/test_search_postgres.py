"""Two runs share one search in a real PostgreSQL, and one of them is killed."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from postgres import postgres
from search_cases import NORMALIZER, write_models, write_speech

import hsa
from hsa.searches import databases

pytest.importorskip("optuna", reason="optuna is not installed: pip install 'hsa-merge[search]'")

SCRIPT = """
import json, sys
import hsa
sources, arguments = json.loads(sys.argv[1])
hsa.search(sources, **arguments, progress=lambda step: print(step.finished, flush=True))
"""
TRIALS = 40


def start(sources: dict[str, Any], arguments: dict[str, Any], output: Path) -> subprocess.Popen[str]:
    given = json.dumps([sources, {**arguments, "output": str(output)}])
    return subprocess.Popen([sys.executable, "-c", SCRIPT, given], stdout=subprocess.PIPE, text=True)


def test_two_runs_share_a_search_and_one_is_killed(tmp_path: Path) -> None:
    sources = write_models(tmp_path / "models")
    dev = write_speech(tmp_path / "dev", sources, 6, 0)
    arguments = {"method": "task_arithmetic,ties", "dev": [str(dev)], "trials": TRIALS, "normalizer": NORMALIZER}
    arguments |= {"batch": 4, "racing": False, "study": "ours"}
    with postgres() as url:
        arguments["storage"] = url
        first, second = (start(sources, arguments, tmp_path / name) for name in ("first", "second"))
        assert first.stdout is not None
        assert second.stdout is not None
        for line in first.stdout:
            if int(line) >= 12:
                break
        first.send_signal(signal.SIGKILL)
        first.wait()
        second.stdout.read()
        assert second.wait() == 0
        found = hsa.search(sources, **arguments, output=tmp_path / "third")
    assert len(found.trials) == TRIALS
    assert max(Counter(trial.name for trial in found.trials).values()) == 1
    assert all(trial.state == "complete" for trial in found.trials)
    document = (tmp_path / "second" / "search.json").read_text(encoding="utf-8")
    assert [trial["values"] for trial in json.loads(document)["trials"]] == [list(t.values) for t in found.trials]
    names = ["base", "primary", "secondary", "tertiary", "average", "task_arithmetic defaults", "ties defaults"]
    assert [trial.name for trial in found.trials[:7]] == names
    alone = hsa.search(
        sources, **{**arguments, "storage": None, "study": "search", "trials": 7}, output=tmp_path / "alone"
    )
    assert [trial.values for trial in found.trials[:7]] == [trial.values for trial in alone.trials]
    best = "best/model.safetensors"
    assert (tmp_path / "second" / best).read_bytes() == (tmp_path / "third" / best).read_bytes()
    for path in (tmp_path / "second").rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes(), path


@pytest.mark.parametrize("listens", [False, True], ids=["nobody", "somebody who says nothing"])
def test_a_server_that_does_not_answer_is_one_line_without_its_password(
    listens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "ANSWER_SECONDS", 2)
    sources = write_models(tmp_path / "models")
    dev = write_speech(tmp_path / "dev", sources, 2, 0)
    arguments = {"method": "ties", "dev": [str(dev)], "trials": 10, "normalizer": NORMALIZER, "study": "mine"}
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        storage = f"postgresql://me:secret@127.0.0.1:{server.getsockname()[1]}/studies"
        with pytest.raises(hsa.MachineError, match=r"cannot be used: .*(refused|timeout)") as error:
            hsa.search(sources, **arguments, output=tmp_path / "out", storage=storage)
    assert "secret" not in str(error.value)
