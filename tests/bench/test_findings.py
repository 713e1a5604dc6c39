"""The page of findings has the figures of the searches, and says where a best is less than claimed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import findings
import pytest


def trial(name: str, method: str | None, wer: float, kind: str = "sampled", state: str = "complete") -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "method": method, "settings": {"lam": 1.5} if kind == "sampled" else {},
        "state": state, "values": [wer], "wer": {"dev": wer}, "decoded": 60,
    }  # fmt: skip


def row(model: str, wer: float, difference: float | None, verdict: str | None) -> dict[str, Any]:
    ends = None if difference is None else [difference - 0.01, difference + 0.01]
    return {
        "model": model, "set": "far", "words": 700, "wer": wer, "interval": [wer - 0.02, wer + 0.02],
        "difference": difference, "difference_interval": ends, "verdict": verdict,
    }  # fmt: skip


def study(best: float = 0.06, difference: float = -0.03, verdict: str = "better") -> dict[str, Any]:
    return {
        "best": "trial 4",
        "command": "hsa merge --method ties --base /here/base --model /here/m1 --lambda 1.5 --output merged",
        "trials": [
            trial("base", None, 0.5, "source"),
            trial("m1", None, 0.2, "source"),
            trial("ties defaults", "ties", 0.08, "default"),
            trial("trial 4", "ties", best),
            trial("trial 5", "ties", 0.3, state="stopped"),
        ],
        "dev": [row("trial 4", best, None, None)],
        "test": [row("trial 4", 0.07, None, None), row("ties defaults", 0.1, difference, verdict)],
        "savings": {"raced": 44, "equal": 0},
        "seconds": 100.4,
        "merging": 3.2,
    }


def write(folder: Path, document: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "search.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def test_the_page_has_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "findings.md"
    page.write_text("before\n<!-- findings -->\nold\n<!-- /findings -->\nafter\n", encoding="utf-8")
    assert findings.main([str(write(tmp_path / "search", study())), "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- findings -->\n") and text.endswith("\n<!-- /findings -->\nafter\n")
    assert "old" not in text
    assert "Best: **ties** with lam 1.5, 6.00 % on dev (700 words)." in text
    assert "best baseline there is ties defaults with 8.00 %, so the best is 25.0 % below it" in text
    assert "| ties | 8.00 % | 6.00 % | lam 1.5 | 3 | 1 |" in text
    assert "| ties defaults | 10.00 (8.00 to 12.00) | -3.00 (-4.00 to -2.00) * |" in text
    assert "hsa merge --method ties --base base --model m1 --lambda 1.5 --output merged" in text
    assert "5 models, 100 s of trials, 3 s of them for merging; 300 utterances decoded, 44 not decoded" in text
    assert "all is as claimed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"best": 0.073}, "dev: the best is 8.8 % below the best baseline, less than 10 %"),
        ({"difference": 0.03, "verdict": "worse"}, "dev: the best is worse than ties defaults on far"),
        (
            {"difference": 0.002, "verdict": "no difference shown"},
            "the best has a higher rate than ties defaults on far",
        ),
    ],
)
def test_what_is_less_than_claimed_is_said(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert findings.main([str(write(tmp_path / "search", study(**changes)))]) == 1
    assert said in capsys.readouterr().err


def test_a_search_without_test_sets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="expected one dev set and test sets"):
        findings.main([str(write(tmp_path / "search", {**study(), "test": []}))])
