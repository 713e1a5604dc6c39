"""The formula that a card and `hsa methods` state: of the settings of a merge, and of the defaults."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from hsa.architectures.generic import GENERIC
from hsa.methods.masked import MaskedMethod
from hsa.methods.registry import method_named, methods

MASKED = [name for name, method in methods().items() if isinstance(method, MaskedMethod)]


def stated(method: str, **settings: Any) -> str:
    """The formula on the card of a merge with these settings."""
    own = method_named(method)
    text = own.card_text(own.Settings(**settings).as_dict(), [], GENERIC).method
    return text.split("`")[1]


@pytest.mark.parametrize("name", methods())
def test_the_formula_of_a_method_is_that_of_its_defaults(name: str) -> None:
    method = methods()[name]
    assert method.formula_with(method.Settings().as_dict()) == method.formula_with({}) == method.formula


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("linear", {}, "sum(w_i * M_i) / sum(w_i)"),
        ("linear", {"normalize": False}, "sum(w_i * M_i)"),
        ("task_arithmetic", {}, "B + lambda * sum(w_i * (M_i - B))"),
        ("task_arithmetic", {"normalize": True}, "B + lambda * sum(w_i * (M_i - B)) / sum(w_i)"),
        (
            "ties",
            {},
            "B + lambda * sum(w_i * trim(M_i - B)) / sum(w_i), both sums over the models that have the elected sign, "
            "which is that of sum(w_i * trim(M_i - B)) over all models, trim keeps the int(density * n) largest of "
            "n elements",
        ),
        (
            "dare_linear",
            {"rescale": "density"},
            "B + lambda * sum(w_i * f_i * mask_i * (M_i - B)), mask_i is 1 with probability density, else 0, "
            "f_i = 1 / density",
        ),
    ],
)
def test_a_formula_as_a_whole(method: str, settings: dict[str, Any], expected: str) -> None:
    assert stated(method, **settings) == expected


@pytest.mark.parametrize("name", MASKED)
def test_what_masked_task_vectors_are_divided_by_and_multiplied_with(name: str) -> None:
    votes = methods()[name].votes
    for normalize, rescale in product((False, True), ("none", "l1", "density")):
        text = stated(name, normalize=normalize, rescale=rescale)
        assert (" / sum(w_i)" in text) == normalize
        assert ("both sums over the models that have the elected sign" in text) == (votes and normalize)
        assert ("the sum over the models that have the elected sign" in text) == (votes and not normalize)
        assert ("w_i * f_i * " in text) == (rescale != "none")
        assert ("f_i = 1 / density" in text, "f_i = sum(|M_i - B|)" in text) == (rescale == "density", rescale == "l1")


@pytest.mark.parametrize(
    ("method", "settings", "part"),
    [
        ("multislerp", {}, "w_i divided by their sum"),
        ("nuslerp", {"flatten": False}, "each of the rows by itself"),
        ("nuslerp", {"flatten": False, "row_wise": True}, "each of the columns by itself"),
        ("model_stock", {"filter_wise": True}, "for each of the rows by itself"),
        ("sce", {"select_topk": 0.5}, "the int(select_topk * m) largest of the m that are not 0"),
        ("sce", {"select_topk": [0.5, 1.0]}, "the int(select_topk * m) largest of the m that are not 0"),
    ],
)
def test_what_a_setting_adds(method: str, settings: dict[str, Any], part: str) -> None:
    """And what is not there with the other value of it."""
    other = {"normalize_weights": False} if method == "multislerp" else {}
    assert part in stated(method, **settings) and part not in stated(method, **other)
