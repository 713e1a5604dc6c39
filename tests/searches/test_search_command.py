"""The command `hsa search`: what it prints and writes, and what it refuses in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from search_cases import NORMALIZER, write_models, write_speech

import hsa
from hsa.errors import RequestError
from hsa.searches.durations import seconds_of

Case = dict[str, Any]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("command")
    sources = write_models(folder / "models")
    dev = write_speech(folder / "dev", sources, 3, 0)
    words = ["--base", sources["base"], "--primary", sources["models"][0], "--secondary", sources["models"][1]]
    return {"sources": words, "dev": str(dev), "folder": folder}


def run(case: Case, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hsa", "search", *case["sources"], "--normalizer", NORMALIZER, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_command_says_what_it_found_and_goes_on(case: Case) -> None:
    output = case["folder"] / "search"
    words = ["--dev", f"mine={case['dev']}", "--output", str(output), "--method", "hsa,ties", "--space", "lambda=1"]
    first = run(case, *words, "--trials", "6")
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0] == str(output)
    assert any(line.startswith("  command hsa merge --method ") for line in lines)
    assert "the best candidate's figures there are optimistic" in first.stderr
    kept = sorted(path.name for path in output.iterdir())
    assert kept == [
        ".lock", "best", "report.html", "report.md", "search.json", "study.db", "transcripts", "trials.csv",
    ]  # fmt: skip
    second = run(case, *words, "--trials", "8", "--json")
    assert second.returncode == 0, second.stderr
    document = json.loads(second.stdout)
    assert document == json.loads((output / "search.json").read_text(encoding="utf-8"))
    assert [trial["name"] for trial in document["trials"]] == [
        "base", "primary", "secondary", "average", "hsa defaults", "ties defaults", "trial 7", "trial 8",
    ]  # fmt: skip
    assert all(trial["settings"].get("lam") == 1.0 for trial in document["trials"][4:])
    again = run(case, *words, "--trials", "8", "--seed", "1")
    assert again.returncode == 2
    assert "was begun with seed 0, and now it is 1" in again.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "best"], "best"),
        (["--method", "ties,ties"], "must name methods, each once"),
        (["--trials", "0"], "--trials must be a whole number from 1"),
        (["--objective", "median"], "--objective must be mean, worst or pareto, or the name of a dev set (dev)"),
        (["--space", "alpha=-1"], "alpha must be"),
        (["--by-layer", "1-2"], "--by-layer must be ranges of layers"),
        (["--sampler", "best"], "--sampler must be tpe, cmaes, nsga2, random or grid"),
        (["--time", "soon"], "--time must be a duration such as 90s, 30m or 2h"),
        (["--soup", "thick"], "--soup must be greedy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_are_one_line(case: Case, words: list[str], message: str, tmp_path: Path) -> None:
    done = run(case, "--dev", case["dev"], "--output", str(tmp_path / "out"), *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_without_optuna_it_says_what_to_install(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RequestError, match=r"needs optuna, which is not installed: pip install 'hsa-merge\[search\]'"):
        hsa.search(["m1", "m2"], method="linear", dev=case["dev"], output=tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), (5, 5), (0.5, 0.5)]
)
def test_durations(text: str | float, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "2", "-1h", "1m2h", "0s", "1 h", 0, -1, True, float("nan")])
def test_what_is_no_duration(text: Any) -> None:
    with pytest.raises(RequestError, match="must be a duration such as 90s, 30m or 2h"):
        seconds_of(text)
