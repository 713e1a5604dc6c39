"""What a search draws: ranges of the methods, what a user changes of them, and the settings that are made of draws."""

from __future__ import annotations

import pytest

from hsa.errors import RequestError
from hsa.methods.registry import method_named, methods
from hsa.methods.settings import declared
from hsa.searches.samplers import grid_points
from hsa.searches.space import parse_layers, parse_space, space_of, with_layers

RANGES = {
    "ties": {"ties.weight1": (0, 1), "ties.weight2": (0, 1), "ties.density": (0.05, 1), "ties.lambda": (0.5, 2)},
    "hsa": {"hsa.k": (0.1, 1), "hsa.lambda": (0, 1), "hsa.alpha": (0, 2)},
    "linear": {"linear.weight1": (0, 1), "linear.weight2": (0, 1)},
    "tsv_m": {"tsv_m.lambda": (0.3, 2), "tsv_m.share": (0.05, 1)},
    "karcher": {},
}


@pytest.mark.parametrize("method", RANGES)
def test_ranges_are_those_of_the_settings(method: str) -> None:
    space = space_of(method, 2, {})
    assert {axis.name: (axis.low, axis.high) for axis in space.axes} == RANGES[method]


def test_hsa_with_two_secondaries_draws_their_weights() -> None:
    names = [axis.name for axis in space_of("hsa", 3, {}).axes]
    assert names[-2:] == ["hsa.weight1", "hsa.weight2"]


@pytest.mark.parametrize("method", sorted(methods()))
def test_what_is_drawn_makes_settings(method: str) -> None:
    contract = method_named(method).contract
    count = max(contract.least, min(contract.most, 3))
    space = space_of(method, count, {})
    for point in grid_points({method: space}, 30):
        settings = method_named(method).Settings(**space.settings(point))
        settings.check_models(count)
        assert settings.complete


def test_a_range_a_value_and_choices() -> None:
    given = parse_space(["ties.density=0.2:0.8", "lambda=1", "ties.normalize=on,off", "weights=1"], ["ties", "hsa"])
    assert given["hsa"] == {"lam": ["1"], "weights": ["1"]}
    space = space_of("ties", 3, given["ties"])
    assert [(axis.name, axis.low, axis.high, axis.choices) for axis in space.axes] == [
        ("ties.density", 0.2, 0.8, ()),
        ("ties.normalize", 0.0, 0.0, (True, False)),
    ]
    assert space.fixed == {"weights": 1.0, "lam": 1.0}
    drawn = {"ties.density": 0.123456789, "ties.normalize": False}
    assert space.settings(drawn) == {"weights": 1.0, "lam": 1.0, "density": 0.2, "normalize": False}


def test_numbers_have_few_digits_and_stay_inside() -> None:
    space = space_of("ties", 2, {"density": ["0.33333:0.77777"], "lam": ["1"], "weights": ["1"]})
    (axis,) = space.axes
    assert axis.rounded(0.5123456) == 0.5123
    assert axis.rounded(0.33333) == 0.33333
    assert axis.rounded(0.77777) == 0.77777


def test_weights_are_one_for_each_model() -> None:
    space = space_of("linear", 3, {})
    drawn = {f"linear.weight{number}": number / 4 for number in (1, 2, 3)}
    assert space.settings(drawn) == {"weights": [0.25, 0.5, 0.75]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ties.density", "takes NAME=LOW:HIGH"),
        ("ties.densty=0.1:0.2", "has no setting 'densty'"),
        ("della.density=0.1:0.2", "names method 'della'"),
        ("ties.density=0.8:0.2", "is no range"),
        ("ties.density=0.1:x", "a number, or LOW:HIGH with two of them, got 'x'"),
        ("ties.density=0.1:1.5", r"must be a? ?.*in \[0, 1\], got 1.5"),
        ("ties.density=nan", "must be a number, or LOW:HIGH"),
        ("ties.on-mismatch=first,error", "is the same for all candidates"),
        ("ties.normalize=maybe", "True or False"),
    ],
)
def test_refusals_say_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        space_of("ties", 2, parse_space([text], ["ties"])["ties"])


def test_values_by_layer_name_every_target_of_hsa() -> None:
    layer_of = {f"encoder.layers.{layer}.self_attn.q_proj.weight": layer for layer in range(4)}
    space = with_layers(space_of("hsa", 2, {}), parse_layers("0-1,2-3"), layer_of)
    names = [axis.name for axis in space.axes]
    assert names == ["hsa.k", "hsa.lambda[0-1]", "hsa.lambda[2-3]", "hsa.alpha[0-1]", "hsa.alpha[2-3]"]
    settings = space.settings(dict(zip(names, (0.5, 0.1, 0.9, 1.0, 2.0), strict=True)))
    assert settings["k"] == 0.5
    assert list(settings["lam"].values()) == [0.1, 0.1, 0.9, 0.9]
    assert list(settings["alpha"].values()) == [1.0, 1.0, 2.0, 2.0]


def test_values_by_layer_of_other_methods_reach_to_both_ends() -> None:
    space = with_layers(space_of("ties", 2, {"weights": ["1"], "density": ["1"]}), parse_layers("0-1,2-3"), {"a": 3})
    settings = space.settings({"ties.lambda[0-1]": 0.6, "ties.lambda[2-3]": 1.2})
    assert settings["lam"] == [{"layers": [0, 1], "value": 0.6}, {"layers": [2, None], "value": 1.2}]
    method_named("ties").Settings(**settings)


@pytest.mark.parametrize("text", ["1-3", "0-3,5-6", "0-3,3-6", "3-1", "a", "0-", ""])
def test_ranges_of_layers_follow_one_another(text: str) -> None:
    with pytest.raises(RequestError, match="follow one another from 0 on"):
        parse_layers(text)


def test_ranges_leave_no_layer_out() -> None:
    with pytest.raises(RequestError, match="must reach layer 5"):
        with_layers(space_of("ties", 2, {}), parse_layers("0-3"), {"a": 5})


def test_defaults_are_told_where_they_lie_in_the_space() -> None:
    assert space_of("hsa", 2, {}).defaults() == {"hsa.k": 0.6, "hsa.lambda": 0.5, "hsa.alpha": 0.2}
    assert space_of("hsa", 2, {"k": ["0.7:0.9"]}).defaults() is None
    assert space_of("tsv_m", 2, {}).defaults() is None  # its share depends on the number of models


def test_every_searched_number_lies_within_what_a_setting_may_be() -> None:
    seen = 0
    for method in methods().values():
        for each in declared(method.Settings):
            if each.about.search is not None:
                low, high = each.about.search
                assert low < high
                space_of(method.name, max(2, method.contract.least), {each.name: [f"{low}:{high}"]})
                seen += 1
    assert seen > 20
