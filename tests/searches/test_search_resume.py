"""Searches that are killed while the sampler draws from what it has learnt so far go on as if they had not been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from search_cases import NORMALIZER, write_models, write_speech

import hsa

pytestmark = pytest.mark.long

SCRIPT = """
import json, os, sys
sys.path[:0] = {paths!r}
import hsa
from test_search_resume import score
sources, arguments, calls = json.loads(sys.argv[1])
left = calls

def evaluate(model):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    return score(model)

hsa.search(sources, evaluate=evaluate, **arguments)
"""


def score(model: Any) -> float:
    """A number that depends on two of the model's tensors."""
    tensors = dict(model.named_parameters())
    names = sorted(tensors)
    one, other = (tensors[names[place]].detach().double().abs().mean() for place in (3, -3))
    return float((one - 0.02).abs() + (other * 2 - 0.05).abs())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_models(tmp_path_factory.mktemp("resume") / "models")


@pytest.mark.parametrize(
    ("sampler", "method", "calls"),
    [
        ("tpe", "task_arithmetic,ties", [21]),
        ("cmaes", "task_arithmetic", [20]),
        ("nsga2", "task_arithmetic,ties", [21]),
    ],
)
def test_a_killed_search_draws_the_same_settings(
    sampler: str, method: str, calls: list[int], sources: dict[str, Any], tmp_path: Path
) -> None:
    """Killed several times, after so many scores each, always beyond the trials that are drawn at random."""
    arguments = {"sampler": sampler, "method": method, "trials": 34, "seed": 3}
    whole = hsa.search(sources, output=tmp_path / "whole", evaluate=score, **arguments)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    script = SCRIPT.format(paths=paths)
    for count in calls:
        given = json.dumps([sources, {**arguments, "output": str(tmp_path / "killed")}, count])
        done = subprocess.run([sys.executable, "-c", script, given], check=False)
        assert done.returncode == 9
    resumed = hsa.search(sources, output=tmp_path / "killed", evaluate=score, **arguments)
    assert outcome(resumed) == outcome(whole)
    drawn = [trial for trial in whole.trials if trial.candidate.kind == "sampled"]
    assert len({json.dumps(dict(trial.settings), sort_keys=True) for trial in drawn}) > len(drawn) // 2


def outcome(study: hsa.Study) -> list[tuple[Any, ...]]:
    return [(t.name, t.candidate.method, dict(t.settings), t.state, t.values, t.result.weights) for t in study.trials]


def test_a_candidate_that_cannot_be_decoded_is_a_failed_trial(
    sources: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the search goes on; a source that cannot be decoded ends it."""
    from hsa.errors import SourceError
    from hsa.evaluation.recognizers import WhisperRecognizer

    dev = str(write_speech(tmp_path / "dev", sources, 3, 0))
    arguments = {"method": "task_arithmetic", "dev": [dev], "trials": 9, "normalizer": NORMALIZER, "max_tokens": 8}
    whole = hsa.search(sources, output=tmp_path / "whole", **arguments)
    calls = 0

    def breaks(self: Any, inputs: Any, drafts: Any = None) -> list[str]:
        nonlocal calls
        calls += 1
        if calls == at:
            raise RuntimeError("numbers that no model can have")
        return part_texts(self, inputs, drafts)

    part_texts = WhisperRecognizer.part_texts
    monkeypatch.setattr(WhisperRecognizer, "part_texts", breaks)
    at = 7
    found = hsa.search(sources, output=tmp_path / "failed", **arguments)
    states = [trial.state for trial in found.trials]
    assert states.count("failed") == 1
    failed = found.trials[states.index("failed")]
    assert failed.candidate.method == "task_arithmetic"
    assert "RuntimeError: numbers that no model can have" in str(failed.result.failure)
    assert len(found.trials) == len(whole.trials)
    calls, at = 0, 1
    with pytest.raises(SourceError, match="numbers that no model can have"):
        hsa.search(sources, output=tmp_path / "source", **arguments)
