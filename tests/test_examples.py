"""The examples in the docstrings of public names run, in a folder with the models and recordings that they name."""

from __future__ import annotations

import doctest
import inspect
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from search_cases import write_models, write_speech

import hsa

NAMES = sorted(set(hsa.__all__) - {"__version__"})
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

RECIPE = """
merges:
  - {name: small, group: scaling, base: whisper-small, primary: m1, secondary: m2}
"""

MADE: dict[str, Callable[[], Any]] = {
    "merged": lambda: hsa.merge("whisper-small", "m1", "m2", "merged", sync=False),
    "sweep": lambda: hsa.sweep("whisper-small", "m1", "m2", "sweep", lam=[0.3], sync=False),
}
"""What examples of other names use, and how it is made."""

NEEDED = {"verify": "merged", "VerifyReport": "merged", "inspect": "merged", "apply": "sweep", "evaluate": "merged",
          "Evaluation": "merged"}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to the models `whisper-small`, `m1` and `m2`, the sets `dev.tsv` and `test.tsv`, and a recipe."""
    folder = tmp_path_factory.mktemp("prepared")
    sources = write_models(folder / "models", dtype="float32")
    for name, path in zip(("whisper-small", "m1", "m2"), [sources["base"], *sources["models"]], strict=False):
        (folder / name).symlink_to(path)
    table = write_speech(folder / "speech", sources)
    for name in ("dev.tsv", "test.tsv"):
        (folder / name).write_text(table.read_text(encoding="utf-8"), encoding="utf-8")
    for clip in table.parent.glob("*.wav"):
        shutil.copy(clip, folder)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_public_docstring_has_an_example_that_runs(
    name: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = getattr(hsa, name)
    if isinstance(owner, type) and issubclass(owner, hsa.HsaError) and owner is not hsa.HsaError:
        return  # an error is shown by its base class
    folder = tmp_path / "folder"
    shutil.copytree(prepared, folder, symlinks=True)
    monkeypatch.chdir(folder)
    if name in NEEDED:
        MADE[NEEDED[name]]()
    module = inspect.getmodule(owner)
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(owner) or "", {**vars(module), "hsa": hsa}, name, None, 0)
    assert test.examples, f"hsa.{name} has no example"
    skipped = [example.source for example in test.examples if example.options.get(doctest.SKIP)]
    assert not skipped, "an example that is skipped shows nothing"
    said: list[str] = []
    with warnings.catch_warnings():
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not said, "\n".join(said)
