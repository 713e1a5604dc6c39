"""Real models whose weights alone are merged."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

Triple = Mapping[str, Path]


@pytest.fixture(scope="session")
def real_weights(real: Triple, tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """The real models without their tokenizers, which are large and have no say here."""
    folder = tmp_path_factory.mktemp("real")
    for model in real["base"].parent.iterdir():
        if (model / "config.json").is_file():
            (folder / model.name).mkdir()
            for file in (model / "config.json", *model.glob("*.safetensors*")):
                shutil.copyfile(file, folder / model.name / file.name)
    return {role: folder / path.name for role, path in real.items()}
