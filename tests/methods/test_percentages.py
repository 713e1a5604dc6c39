"""A `k` above 1 is a percentage, and a run says so: `--k 1.5` is not one and a half times anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hsa
from hsa.cli import app
from hsa.methods.hsa_warnings import percentage_findings

Triple = dict[str, Path]
Report = tuple[tuple[str, ...], tuple[str, ...]]
DOUBTFUL = "k = 1.5 is taken as a percentage, the share 0.015; a share of heads lies between 0 and 1, such as 0.6"
USUAL = "k = 60 is taken as a percentage, the share 0.6"


def both(report: Any) -> Report:
    return report.notes, report.warnings


WAYS: dict[str, Callable[[Triple, Path, float], Report]] = {
    "merge": lambda triple, place, k: both(hsa.merge(**triple, output=place / "out", k=k, sync=False)),
    "patch": lambda triple, place, k: both(hsa.merge_patch(**triple, output=place / "p.safetensors", k=k)),
    "sweep": lambda triple, place, k: both(hsa.sweep(**triple, output=place / "sweep", k=[0.5, k], sync=False)),
    "inspect": lambda triple, place, k: both(hsa.inspect(**triple, k=k, energy=False)),
    "inspect an output": lambda triple, place, k: both(
        hsa.inspect(hsa.merge(**triple, output=place / "out", k=k, sync=False).output)
    ),
    "per tensor": lambda triple, place, k: both(
        hsa.merge(
            **triple,
            output=place / "per",
            k=dict.fromkeys(hsa.inspect(**triple, energy=False).tensors, 0.5)
            | {next(iter(hsa.inspect(**triple, energy=False).tensors)): k},
        )
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_k_above_1_is_said_to_be_a_percentage(way: str, shared_triple: Triple, tmp_path: Path) -> None:
    for k, note, warning in ((1.5, "", DOUBTFUL), (60, USUAL, ""), (1, "", ""), (0.6, "", "")):
        place = tmp_path / str(k)
        place.mkdir()
        notes, warnings = WAYS[way](shared_triple, place, k)
        assert [text for text in notes if text.startswith("k = ")] == ([note] if note else [])
        assert [text for text in warnings if text.startswith("k = ")] == ([warning] if warning else [])


def test_the_command_line_says_so_too(
    shared_triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [f"--{role}={path}" for role, path in shared_triple.items()]
    assert app.run(["merge", *sources, f"--output={tmp_path / 'out'}", "--k=1.5", "--quiet"]) == 0
    assert f"hsa: warning: {DOUBTFUL}\n" in capsys.readouterr().err
    assert (
        app.run(["merge", *sources, f"--output={tmp_path / 'out'}", "--k=60", "--dry-run", "--json", "--overwrite"])
        == 0
    )
    assert USUAL in json.loads(capsys.readouterr().out)["notes"]
    recipe = tmp_path / "recipe.yaml"
    lines = [f"    {role}: {path}" for role, path in shared_triple.items()]
    recipe.write_text("\n".join(["merges:", "  - name: a", "    group: g", "    k: 1.5", *lines]), encoding="utf-8")
    assert app.run(["release", str(recipe), f"--output={tmp_path / 'tree'}"]) == 0
    assert f"hsa: warning: g/a: {DOUBTFUL}\n" in capsys.readouterr().err


def test_many_values_are_one_line() -> None:
    found = percentage_findings([10, 20, 30, 40, 50, 2, 0.5])
    assert len(found.notes) == len(found.warnings) == 1
    assert found.notes[0].endswith("the share 0.3; and 2 more")
