"""Where the tests put outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsa.system import fsio


@pytest.fixture(params=[True, False], ids=["swap", "no-swap"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With a filesystem that can swap two directories, and as if on one that cannot."""
    if not request.param:
        monkeypatch.setattr(fsio, "exchange", lambda first, second: False)
    return bool(request.param)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory to put outputs in, so that anything stray beside them shows."""
    place = tmp_path / "place"
    place.mkdir()
    return place
