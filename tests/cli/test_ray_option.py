"""`--ray`, whose address may be left out, and what is refused without Ray."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import run_hsa
from release_trees import write_recipe

import hsa
from hsa.cli import app, options
from hsa.errors import RequestError

Triple = dict[str, Path]
RELEASE: Any = app.program().commands["release"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("r.yaml --output t", False),
        ("r.yaml --output t --ray", True),
        ("r.yaml --output t --ray --json", True),
        ("--ray r.yaml --output t", True),
        ("--ray --output t r.yaml", True),
        ("--ray --output t -- r.yaml", True),
        ("--output t --ray -- r.yaml", True),
        ("r.yaml --output t --ray head:6379", "head:6379"),
        ("--ray head:6379 r.yaml --output t", "head:6379"),
        ("r.yaml --output t --ray=head:6379 --json", "head:6379"),
        ("r.yaml --output t --ray [::1]:6379", "[::1]:6379"),
        ("r.yaml --output t --ray ray://head:10001", "ray://head:10001"),
        ("r.yaml --output t --ray auto", "auto"),
        ("r.yaml --output t --ray=head", "head"),
    ],
)
def test_the_address_may_be_left_out(words: str, expected: bool | str) -> None:
    with RELEASE.make_context("release", words.split()) as context:
        assert (context.params["recipe"], context.params["output"]) == ("r.yaml", "t")
        assert context.params["as_json"] == ("--json" in words)
        assert options.ray_address(context.params["ray"]) == expected


def test_help_and_completion_know_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["release", "--help"]) == 0
    assert "  --ray [ADDRESS]  " in capsys.readouterr().out
    for words, expected in (("hsa release --ra", {"--ray"}), ("hsa release r.yaml --ray --js", {"--json"})):
        asked = {"_HSA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        assert set(run_hsa(env=asked).stdout.split()) == expected


def test_what_is_no_address_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "tree"
    for word in ("head", "head:port", "http://head:6379", "head:6379/x"):
        assert app.run(["release", "r.yaml", f"--output={tree}", f"--ray={word}"]) == 2
        printed = capsys.readouterr()
        assert printed.err == f"hsa: error: --ray takes HOST:PORT or ray://HOST:PORT, got '{word}'\n"
    assert app.run(["release", "r.yaml", f"--output={tree}", "--ray", "--ray"]) == 2
    assert "--ray is given 2 times and takes one value" in capsys.readouterr().err
    for value in (3, None, ["head:6379"]):
        with pytest.raises(RequestError, match=r"^ray must be True, False or an address HOST:PORT, got "):
            hsa.release("r.yaml", tree, ray=value)  # type: ignore[arg-type]
    assert not tree.exists()


def test_without_ray_the_hint_says_what_to_install(
    shared_triple: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe = write_recipe(tmp_path / "recipe.yaml", shared_triple, {"name": "a"})
    with pytest.raises(
        RequestError, match=r"^ray=True needs ray, which is not installed: pip install 'hsa-merge\[ray\]'$"
    ):
        hsa.release(recipe, tmp_path / "tree", ray=True)
    assert app.run(["release", str(recipe), f"--output={tmp_path / 'tree'}", "--ray"]) == 2
    assert "--ray needs ray, which is not installed: pip install 'hsa-merge[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "tree").exists()
