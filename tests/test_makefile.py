"""The Makefile runs every test: also those that need other programs, which `make test` leaves out or skips."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = ("tests/programs", "tests/integrations")
"""Folders of tests for the environment of integrations."""


def recipe(target: str) -> str:
    """The commands of a target, with continued lines joined."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert found is not None, f"the Makefile has no target {target}"
    return found[1]


def named_tests(target: str) -> list[Path]:
    """The folders and modules of tests that a target names."""
    return [ROOT / word for word in recipe(target).split() if word.startswith("tests/")]


@pytest.mark.parametrize("folder", ELSEWHERE)
def test_every_module_for_other_programs_is_run(folder: str) -> None:
    named = named_tests("test-integrations")
    modules = sorted((ROOT / folder).rglob("test_*.py"))
    assert modules
    left_out = [path.name for path in modules if not any(path == each or path.is_relative_to(each) for each in named)]
    assert not left_out, f"make test-integrations runs none of {left_out}"


@pytest.mark.parametrize("target", ["test-integrations", "test-interpret", "test-gpu", "test-faults", "parity"])
def test_what_a_target_names_is_there(target: str) -> None:
    named = named_tests(target)
    assert named
    assert all(path.exists() for path in named), named


def test_every_module_that_writes_parity_rows_is_run_by_its_target() -> None:
    writers = [
        path for folder in ELSEWHERE for path in (ROOT / folder).glob("test_*.py") if "measured(" in path.read_text()
    ]
    assert sorted(writers) == sorted(named_tests("parity"))


def test_every_benchmark_is_run() -> None:
    """Also those that take too long for `make bench`."""
    run = "".join(map(recipe, ("bench", "bench-full", "bench-gpu")))
    left_out = [path.name for path in (ROOT / "bench").glob("bench_*.py") if f"bench/{path.name}" not in run]
    assert not left_out
