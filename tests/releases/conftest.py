"""A recipe that the tests build."""

from __future__ import annotations

from pathlib import Path

import pytest
from release_trees import write_recipe

Triple = dict[str, Path]


@pytest.fixture
def recipe(triple: Triple, tmp_path: Path) -> Path:
    """Three merges of one triple."""
    merges = ({"name": "a"}, {"name": "b", "k": 0.3}, {"name": "c", "targets": "attention-qkv"})
    return write_recipe(tmp_path / "recipe.yaml", triple, *merges)
