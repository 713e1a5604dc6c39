"""`hsa methods`: every registered method, and all that one declares, made from the declarations alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hsa.cli import app
from hsa.methods.registry import methods
from hsa.methods.settings import Settings, declared
from hsa.option_names import command_line
from hsa.system.plugins import VARIABLE

SUPPORT = Path(__file__).parents[1] / "support"

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar

from hsa.methods.base import Contract, Method, ModelRole
from hsa.methods.settings import MAX_FLOAT32, Settings, setting


@dataclass(frozen=True)
class WordySettings(Settings):
    method: ClassVar[str] = "wordy"
    t: float | None = setting(None, "Where.", low=0.0, high=1.0, axis=True, search=(0.25, 0.5), required=True)
    sharpness: float = setting(2.5, "How sharp.", low=0.5)
    least: float = setting(-1.0, "How low.", low=-MAX_FLOAT32, high=3.0)
    rounds: int = setting(7, "How often.", whole=True, low=1, high=9)
    kind: str = setting("one", "Which.", choices=("one", "two"), structural=True)
    plain: bool = setting(False, "Simply.")
    shares: float = setting(1.0, "Of each.", low=0.0, high=1.0, per_model=True, repeated=True, default_text="1 each")


class Wordy(Method):
    name, Settings = "wordy", WordySettings
    title = "A title " + "that is longer than a line of a terminal is wide, " * 3
    formula = "sum of " + "very * " * 30 + "much"
    source = "Nobody, 2026"
    contract = Contract(base="optional", least=2, most=5, named=(ModelRole("left", "The left one."),))

    def apply(self, block, decision, out):
        raise NotImplementedError
"""


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "wordy.py"
    path.write_text(PLUGIN, encoding="utf-8")
    monkeypatch.setenv(VARIABLE, f"{SUPPORT / 'maximum_method.py'}:{path}")


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert app.run(["methods", *arguments]) == code
    return capsys.readouterr().out


def known() -> list[str]:
    """Every method that there is, those of the plugins too."""
    return [*methods()]


def words(text: str) -> list[str]:
    return text.split()


def test_every_method_is_a_row_of_a_table_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys)
    head, *lines = text.splitlines()
    assert words(head) == ["method", "title", "base", "models"]
    assert max(map(len, text.splitlines())) <= 80
    rows = [line for line in lines if not line.startswith(" ")]
    assert [line.split()[0] for line in rows] == known() and {"hsa", "linear", "maximum", "wordy"} <= set(known())
    for line, method in zip(rows, methods().values(), strict=True):
        contract = method.contract
        count = f"{contract.least}" if contract.least == contract.most else f"{contract.least} to {contract.most}"
        assert re.search(rf" {contract.base} +{count}$", line), line
        assert set(words(method.title)) <= set(words(text)), method.name


def test_json_has_every_method_as_it_is_declared(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(said(capsys, "--json"))["methods"]
    assert [each["name"] for each in listed] == known()
    for each, (name, method) in zip(listed, methods().items(), strict=True):
        assert json.loads(said(capsys, name, "--json")) == each
        assert (each["title"], each["formula"], each["source"]) == (method.title, method.formula, method.source)
        assert each["contract"]["base"] == method.contract.base
        assert [role["role"] for role in each["contract"]["named"]] == [role.name for role in method.contract.named]
        assert [entry["argument"] for entry in each["settings"]] == [one.name for one in declared(method.Settings)]
        for entry, one in zip(each["settings"], declared(method.Settings), strict=True):
            assert (entry["name"], entry["help"]) == (one.key, one.about.help)
            assert (entry["low"], entry["high"]) == (one.about.low, one.about.high)
            assert entry["default"] == (list(one.default) if isinstance(one.default, tuple) else one.default)
            assert entry["search"] == (None if one.about.search is None else list(one.about.search))
            assert (entry["sweep"], entry["required"]) == (one.about.axis, one.about.required)


@pytest.mark.parametrize("name", [*methods(), "maximum", "wordy"])
def test_one_method_is_explained_in_80_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, method = said(capsys, name), methods()[name]
    assert max(map(len, text.splitlines())) <= 80
    own, _, every = text.partition("Settings of every method:")
    found = set(words(text))
    for part in (method.title, method.formula, method.source):
        assert set(words(part)) <= found
    common = {each.name for each in declared(Settings)}
    for each in declared(method.Settings):
        place = every if each.name in common else own
        assert f"\n  {command_line(each.name)}\n" in place, each.name
        assert set(words(each.about.help)) <= found, each.name
    patch = re.search(r"hsa merge --patch  (yes|no)", text)
    assert patch and (patch[1] == "yes") == (name == "hsa")


def test_ranges_defaults_and_uses_of_settings_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(words(said(capsys, "wordy")))
    for expected in (
        "--t Where. (required; 0 to 1; searched 0.25 to 0.5; hsa sweep takes several)",
        "--sharpness How sharp. (default 2.5; at least 0.5)",
        "--least How low. (default -1; at most 3)",
        "--rounds How often. (default 7; 1 to 9)",
        "--kind Which. (default one; one, two)",
        "--plain Simply. (default off; on or off)",
        "--shares Of each. (default 1 each; 0 to 1; repeat it to give each model its own; "
        "by tensor, layer or pattern in Python and YAML)",
        "base optional models 2 to 5 (left)",
        "hsa merge --patch no: method wordy changes whole tensors",
    ):
        assert expected in text, expected


def test_what_a_method_needs_of_a_model_and_gives_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(words(said(capsys, "hsa")))
    for expected in (
        "heads needs a Whisper",
        "(primary, secondary)",
        "--k Share of heads merged per tensor, 0 to 1; above 1 a percentage. (default 0.6; 0 to 100; searched 0.1 to ",
        "hsa merge --patch yes hsa sweep patches, or checkpoints with --full",
        "hsa inspect heads and their scores",
    ):
        assert expected in text, expected
    text = " ".join(words(said(capsys, "hsa_script")))
    assert "hsa merge --patch no: numerics 'reference' computes every tensor" in text
    assert "hsa.Merger no: it works on whole tensors" in text
    assert "heads needs" not in said(capsys, "maximum")


def test_an_unknown_method_is_refused_with_the_names_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["tis"], ["tis", "--json"]):
        assert app.run(["methods", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        assert f"must be one of {', '.join(known())}, got 'tis'" in printed.err


def test_the_command_imports_no_library_that_merges_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    code = "import sys; from hsa.cli import app; app.run(['methods', 'linear']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("linear: Linear merge")
    assert not {"numpy", "torch", "transformers", "huggingface_hub"} & set(done.stdout.splitlines()[-1].split())


def test_no_row_is_made_by_hand(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the plugins their methods are not there."""
    monkeypatch.setenv(VARIABLE, "")
    text = said(capsys)
    assert "wordy" not in text and "linear" in text
