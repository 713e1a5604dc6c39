"""Triples that the tests merge: made once, copied where a test changes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hsa.synthetic import SHAPES, write_triple

Triple = dict[str, Path]


@pytest.fixture(scope="session")
def shared_triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """A float32 triple of the smallest shape, for reading alone."""
    return write_triple(tmp_path_factory.mktemp("triple"), SHAPES["test"])


@pytest.fixture
def triple(shared_triple: Triple, tmp_path: Path) -> Triple:
    """A copy of the triple, under `tmp_path/sources`, that a test may damage."""
    return {role: Path(shutil.copytree(path, tmp_path / "sources" / role)) for role, path in shared_triple.items()}
