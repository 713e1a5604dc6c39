"""Outputs that the tests verify: one made once, and copies of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from forged_outputs import Triple

import hsa


@pytest.fixture(scope="session")
def merged(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output in two files of weights, for reading alone."""
    output = tmp_path_factory.mktemp("merged") / "out"
    hsa.merge(**shared_triple, output=output, max_shard_size="300KB")
    return output


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(merged, tmp_path / "out"))


@pytest.fixture
def single(shared_triple: Triple, tmp_path: Path) -> Path:
    """An output in one file of weights."""
    hsa.merge(**shared_triple, output=tmp_path / "single", sync=False)
    return tmp_path / "single"
