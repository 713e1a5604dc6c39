"""docs/mergekit.md says of every method how many models it takes and its parameters: held to what the code declares."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hsa.actions.mergekit_config.merge_methods import METHODS, MergekitMethod, Parameter
from hsa.methods.base import Contract
from hsa.methods.descriptions import models_text
from hsa.methods.registry import method_named

DOCUMENT = Path(__file__).parents[2] / "docs" / "mergekit.md"


def table() -> dict[str, tuple[str, str]]:
    """The columns of models and of parameters, by method."""
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = text.split("| `merge_method` | models | parameters |")[1].split("\n\n")[0].splitlines()[2:]
    found = {}
    for line in lines:
        names, models, parameters = (cell.strip() for cell in line.strip("|").split(" | "))
        for name in re.findall("`([a-z_]+)`", names):
            assert name not in found, f"{name} has two lines"
            found[name] = models, parameters
    return found


TABLE = table()


def models_of(method: MergekitMethod) -> str:
    contract, base = method_named(method.name).contract, method.base == "required"
    most = contract.most if method.most is None else min(contract.most, method.most - base)
    count = models_text(Contract(least=max(contract.least, method.least - base), most=most))
    return {"required": f"base and {count}", "optional": f"{count}, base if given", "counts": count}[method.base]


def text_of(parameter: Parameter) -> str:
    starred = "" if parameter.scope == "shared" else "\\*"
    if parameter.required:
        return f"`{parameter.name}`{starred}"
    value = parameter.default
    shown = str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else f"{value:g}"
    return f"`{parameter.name}` ({shown}){starred}"


def test_every_method_has_a_line() -> None:
    assert TABLE.keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_models_is_the_contracts(name: str) -> None:
    models, _ = TABLE[name]
    assert models.partition(", with")[0] == models_of(METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_the_parameters_are_those_that_are_read(name: str) -> None:
    _, parameters = TABLE[name]
    expected = {text_of(each) for each in METHODS[name].parameters if each.has_effect}
    assert set(parameters.split(", ")) == expected
