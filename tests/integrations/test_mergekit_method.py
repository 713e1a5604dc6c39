"""What `hsa mergekit` does without mergekit; tests/programs runs it with the real one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hsa.actions.mergekit_config.roles import assign
from hsa.cli.app import run
from hsa.errors import RequestError
from hsa.integrations.mergekit_method import DEFAULTS, config_of
from hsa.methods.hsa import HsaSettings


def test_without_mergekit_the_error_says_how_to_install_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mergekit", None)
    assert run(["mergekit", str(tmp_path / "config.yml"), str(tmp_path / "out"), "--cuda"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == 'hsa: error: mergekit is not installed; pip install "hsa-merge[mergekit]"\n'
    assert list(tmp_path.iterdir()) == []


def test_a_command_line_without_arguments_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["mergekit"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hsa: error: Missing argument") and error.endswith("See: hsa mergekit --help\n")
    assert error.count("\n") == 1


def test_the_defaults_are_those_of_hsa_merge() -> None:
    assert config_of({}) == HsaSettings()
    assert config_of({"lambda": 0.25, "k": 60.0}) == HsaSettings(lam=0.25, k=60.0)
    assert set(DEFAULTS) == {"k", "lambda", "alpha", "targets"}


@pytest.mark.parametrize(
    ("one", "two", "primary"),
    [
        ("primary", "secondary", "a"),
        ("secondary", "primary", "b"),
        ("primary", None, "a"),
        (None, "primary", "b"),
        ("secondary", None, "b"),
        (None, "secondary", "a"),
    ],
)
def test_roles_decide_whatever_the_order(one: str | None, two: str | None, primary: str) -> None:
    assert assign([("a", one), ("b", two)]) == {"primary": primary, "secondary": "b" if primary == "a" else "a"}


def test_without_roles_the_order_decides() -> None:
    assert assign([("a", None), ("b", None)]) == {"primary": "a", "secondary": "b"}


def test_all_models_but_primary_are_secondaries_in_their_order() -> None:
    of_three = [("a", None), ("b", None), ("c", None)]
    assert assign(of_three) == {"primary": "a", "secondary": "b", "model3": "c"}
    assert assign([("a", "secondary"), *of_three[1:]]) == {"primary": "b", "secondary": "a", "model3": "c"}
    assert assign([*of_three, ("d", "primary")]) == {"primary": "d", "secondary": "a", "model3": "b", "model4": "c"}


def test_weights_are_settings_where_they_say_something() -> None:
    assert config_of({}, [1.0, 1.0]) == HsaSettings()
    assert config_of({}, [1.0, 0.5]) == HsaSettings(weights=[1.0, 0.5])


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([("a", "primary"), ("b", "primary")], "a and b both have the role primary"),
        ([("a", "primary"), ("b", "base")], "the role of b is 'base', expected primary or secondary"),
        ([("a", 1), ("b", None)], "the role of a is 1"),
        ([("a", "primary")], "got 1"),
        ([(str(number), None) for number in range(9)], "merges 2 to 8 models .*, got 9"),
        ([("a", "secondary"), ("b", "secondary")], "a and b both have the role secondary"),
        ([("a", "primary"), ("b", None), ("c", "primary")], "a and c both have the role primary; one must be primary"),
        ([(name, "secondary") for name in "abc"], "a, b and c all have the role secondary; one must be primary"),
    ],
    ids=str,
)
def test_roles_that_cannot_be(others: list[tuple[str, object]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        assign(others)
