"""Triples that the tests merge: made once, copied where a test changes them; and real ones, where there are any.

Set HSA_REAL_TRIPLE to a directory with `base`, `primary` and `secondary`; clips are transcribed where
HSA_REAL_CLIPS, or else `clips` beside the triple, holds `transcripts.tsv` and FLAC files.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from soundness import every_output_verified

from hsa.testing.whisper_checkpoints import SHAPES, write_triple

Triple = dict[str, Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that take long come first, so that no core waits for one that another began last."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def verified_outputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """merge and verify agree on every output of every test; `unverified(reason)` marks a test whose outputs cannot."""
    if request.node.get_closest_marker("unverified"):
        yield
        return
    with every_output_verified(monkeypatch):
        yield


@pytest.fixture(scope="session")
def shared_triple(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """A float32 triple of the smallest shape, for reading alone."""
    return write_triple(tmp_path_factory.mktemp("triple"), SHAPES["test"])


@pytest.fixture(scope="session", params=["float32", "float16", "bfloat16"])
def typed_triple(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """The same in each element type, for reading alone."""
    return write_triple(tmp_path_factory.mktemp(request.param), SHAPES["test"], dtype=request.param)


@pytest.fixture
def triple(shared_triple: Triple, tmp_path: Path) -> Triple:
    """A copy of the triple, under `tmp_path/sources`, that a test may damage."""
    return {role: Path(shutil.copytree(path, tmp_path / "sources" / role)) for role, path in shared_triple.items()}


@pytest.fixture(scope="session")
def real() -> Triple:
    place = os.environ.get("HSA_REAL_TRIPLE")
    if not place:
        pytest.skip("HSA_REAL_TRIPLE is not set: it names a directory with base, primary and secondary")
    triple = {role: Path(place) / role for role in ("base", "primary", "secondary")}
    lacking = [str(path) for path in triple.values() if not (path / "config.json").is_file()]
    assert not lacking, f"HSA_REAL_TRIPLE is {place}, where {', '.join(lacking)} holds no config.json"
    return triple


@pytest.fixture(scope="session")
def real_weights(real: Triple, tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """The real models without their tokenizers, which are large and have no say in what is warned of."""
    folder = tmp_path_factory.mktemp("real")
    for model in real["base"].parent.iterdir():
        if (model / "config.json").is_file():
            (folder / model.name).mkdir()
            for file in (model / "config.json", *model.glob("*.safetensors*")):
                shutil.copyfile(file, folder / model.name / file.name)
    return {role: folder / path.name for role, path in real.items()}


@pytest.fixture(scope="session")
def clips(real: Triple) -> Path:
    given = os.environ.get("HSA_REAL_CLIPS")
    folder = Path(given) if given else real["base"].parent / "clips"
    if not (folder / "transcripts.tsv").is_file():
        pytest.skip(f"no clips: HSA_REAL_CLIPS is {given or 'not set'} and {folder} holds no transcripts.tsv")
    if importlib.util.find_spec("soundfile") is None:
        pytest.skip("soundfile is not installed, which reads FLAC")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, for the pages."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed, which drives Chromium")
    program = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("chromium is not installed, which shows the page")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()
