"""What runs without torch, and the lowest versions that setup.py allows; `make test-pythons` tries them for real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import pythons

Triple = dict[str, Path]

BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(("torch", "triton", "transformers"), None))
from hsa.cli.app import run
sys.exit(run(sys.argv[1:]))
"""

NEEDED_BY_TRANSFORMERS_5_17 = {"safetensors": (0, 8), "huggingface_hub": (1, 5)}
"""What the metadata of transformers 5.17.0 asks for, the lowest that setup.py allows."""


def test_every_cpu_command_runs_where_torch_cannot_be_imported(shared_triple: Triple, tmp_path: Path) -> None:
    lines = [f"    {role}: {path}" for role, path in shared_triple.items()]
    recipe = "\n".join(["merges:", "  - name: a", "    group: g", *lines])
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    place = tmp_path / "place"
    place.mkdir()
    for command in pythons.commands(shared_triple, place):
        done = subprocess.run(
            [sys.executable, "-c", BLOCKED, *command], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, (command, done.stderr)
    assert (place / "tree" / "g" / "a" / "model.safetensors").is_file()


def test_what_needs_torch_says_so_where_it_is_missing(shared_triple: Triple, tmp_path: Path) -> None:
    sources = [f"--{role}={path}" for role, path in shared_triple.items()]
    for more, code in ((["--numerics=reference"], 2), (["--backend=triton"], 2), (None, 1)):
        command = ["demo"] if more is None else ["merge", *sources, f"--output={tmp_path / 'out'}", *more]
        done = subprocess.run([sys.executable, "-c", BLOCKED, *command], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert re.fullmatch(r"hsa: error: [^\n]*torch[^\n]*\n", done.stderr)


def test_the_lowest_versions_can_be_installed_together() -> None:
    lowest = {}
    for text in pythons.requirements():
        name, version = re.match(r"([\w.-]+)==([\d.]+)", text).groups()  # type: ignore[union-attr]
        lowest[name] = tuple(map(int, version.split(".")))
    assert lowest["transformers"] == (5, 17)
    for name, needed in NEEDED_BY_TRANSFORMERS_5_17.items():
        assert lowest[name] >= needed


def test_an_interpreter_is_found_by_its_version_or_not_at_all() -> None:
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if pythons.interpreter(own) is None:
        pytest.skip(f"no python{own} is on the PATH")
    assert pythons.interpreter("3.99") is None
