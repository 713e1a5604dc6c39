"""Options that are made from declarations: of sources, of the settings of methods, and of runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import snapshot

import hsa
from hsa.cli import app
from hsa.methods.all_settings import all_settings
from hsa.methods.hsa import HsaSettings
from hsa.methods.settings import declared
from hsa.option_names import command_line

Triple = dict[str, Path]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert app.run(arguments) == 2
    return capsys.readouterr().err.removeprefix("hsa: error: ").strip()


def options_of(command: str) -> dict[str, Any]:
    return {parameter.name: parameter for parameter in app.program().commands[command].params}


def test_every_setting_is_an_option_with_its_default_and_its_help() -> None:
    options = options_of("merge")
    for each in declared(HsaSettings):
        found = options[each.name]
        assert (found.opts, found.help.count(each.about.help)) == ([command_line(each.name)], 1)
        assert found.default == (None if each.about.per_model else each.default)


@pytest.mark.parametrize("command", ["merge", "sweep"])
def test_models_in_their_order_merge_as_those_by_name_do(command: str, shared_triple: Triple, tmp_path: Path) -> None:
    by_name = [f"--{role}={path}" for role, path in shared_triple.items()]
    base, *models = shared_triple.values()
    in_order = ["--method=hsa", f"--base={base}", *(f"--model={path}" for path in models)]
    for place, sources, ids in (
        ("one", by_name, ["--primary-id=a/b", "--secondary-id=c/d"]),
        ("two", in_order, ["--model-id=a/b", "--model-id=c/d"]),
    ):
        assert app.run([command, *sources, *ids, f"--output={tmp_path / place}", "--no-sync"]) == 0
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two") != {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--base=b --primary=p --secondary=s --model=m",
            "--model and --primary both say what is merged; give the models by --model alone, or by their names",
        ),
        ("--base=b --model=m", "method hsa merges 2 to 8 models, got 1"),
        ("--base=b --model=m --model=n --model-id=a/b", "--model-id must be as many as models, got 1 for 2 models"),
        ("--base=b --model=m --model=n --method=none", "--method must be one of "),
        ("--model=m --model=n", "needs --base, the model that the others were trained from; give it"),
    ],
)
def test_sources_that_do_not_fit_are_refused(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "merge", f"--output={tmp_path / 'out'}", *arguments.split())
    assert not (tmp_path / "out").exists()


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar

from hsa.methods.base import Contract, Method
from hsa.methods.settings import Settings, setting


@dataclass(frozen=True)
class MeanSettings(Settings):
    method: ClassVar[str] = "mean"
    portion: float = setting(0.5, "Share of the first model.", low=0.0, high=1.0, axis=True)
    normalise: bool = setting(True, "Leave weights as they are.", python="Scale weights to a sum of one.")


class Mean(Method):
    name, title, Settings = "mean", "Mean", MeanSettings
    contract = Contract(base="none", least=2, most=2)

    def apply(self, block, decision, out):
        raise NotImplementedError
"""
"""A method of a user's, which has other settings and sources than HSA."""


@pytest.fixture
def mean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mean_plugin.py"
    path.write_text(PLUGIN, encoding="utf-8")
    monkeypatch.setenv("HSA_PLUGINS", str(path))


@pytest.mark.usefixtures("mean")
def test_options_of_every_method_are_offered_and_say_whose_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert app.run(["merge", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--method NAME How to merge: .*hsa, .*mean.*\. \[default: hsa\]", text)
    assert re.search(r"--k NUMBER hsa[^:]*: Share of heads merged", text)
    assert "--portion NUMBER mean: Share of the first model. [default: 0.5]" in text
    assert "--normalise / --no-normalise mean: Leave weights as they are." in text
    assert "--dtype DTYPE Output: auto" in text


@pytest.mark.usefixtures("mean")
def test_an_option_that_the_method_lacks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"--output={tmp_path / 'out'}"
    line = refused(capsys, "merge", "--base=b", "--primary=p", "--secondary=s", output, "--portion=0.5")
    assert line.startswith("method hsa has no --portion; its settings are --k, --lambda, ")
    models = ["--method=mean", "--model=m", "--model=n", output]
    line = refused(capsys, "merge", *models, "--k=0.5")
    limits = "--only, --except, --layers, --stack"
    assert line == f"method mean has no --k; its settings are --portion, --no-normalise, --dtype, {limits}"
    assert refused(capsys, "merge", *models, "--portion=2").startswith("--portion must be in [0, 1]")


@pytest.mark.usefixtures("mean")
def test_sources_are_those_of_the_methods_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ("--model=m --model=n --base=b", "method mean takes no base"),
        ("--model=m", "method mean merges 2 models, got 1"),
        ("", "Missing option '--model'. See: hsa merge --help"),
        ("--model=m --model=n --primary=p", "method mean has no --primary; give its sources by --model"),
    ):
        line = refused(capsys, "merge", "--method=mean", f"--output={tmp_path / 'out'}", *arguments.split())
        assert message in line
        assert "\n" not in line


@pytest.mark.parametrize(("given", "value"), [((0.3,), 0.3), ((0.3, 0.5), [0.3, 0.5])])
def test_a_setting_may_be_given_once_or_for_each_model(
    given: tuple[float, ...], value: Any, shared_triple: Triple, tmp_path: Path
) -> None:
    base, *models = shared_triple.values()
    options = [f"--base={base}", *(f"--model={path}" for path in models), *(f"--density={each}" for each in given)]
    assert app.run(["merge", "--method=ties", *options, f"--output={tmp_path / 'out'}", "--no-sync"]) == 0
    hsa.merge(method="ties", base=base, models=models, density=value, output=tmp_path / "python", sync=False)
    first, second = ((tmp_path / name / "hsa_merge.json").read_bytes() for name in ("out", "python"))
    assert json.loads(first)["parameters"]["density"] == value
    assert first == second


def test_more_values_than_models_are_refused(
    shared_triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, *models = shared_triple.values()
    options = [f"--base={base}", *(f"--model={path}" for path in models), *["--density=0.5"] * 3]
    line = refused(capsys, "merge", "--method=ties", *options, f"--output={tmp_path / 'out'}")
    assert line == "--density must have as many values as there are models, 2, got 3"


def test_help_says_what_may_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["merge", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Share of each task vector that is kept." in text
    alone = [name for name, each in all_settings(lambda about: about.per_model).items() if not each.about.repeated]
    assert sorted(alone) == ["density", "epsilon", "gamma"]
    assert text.count("Repeat it to give each model its own.") == len(alone)


@pytest.mark.usefixtures("mean")
def test_a_flag_switches_off_what_is_on_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("hsa.actions.request.Request.of", lambda **keywords: seen.append(keywords) or 1 / 0)
    for more in ([], ["--no-normalise", "--no-hash"]):
        with pytest.raises(ZeroDivisionError):
            app.run(["merge", "--method=mean", "--model=m", "--model=n", f"--output={tmp_path / 'out'}", *more])
    assert [each.get("normalise") for each in seen] == [None, False]
    assert [each.get("digest") for each in seen] == [None, False]


def test_a_plugin_that_cannot_be_loaded_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0", encoding="utf-8")
    monkeypatch.setenv("HSA_PLUGINS", str(path))
    assert f"HSA_PLUGINS: {path} cannot be loaded (ZeroDivisionError" in refused(capsys, "merge", "--help")
