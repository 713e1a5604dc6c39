"""Values of settings that differ by tensor, by layer, by pattern and by model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from hsa.architectures.base import Partition, TensorInfo
from hsa.errors import RequestError
from hsa.methods.task_arithmetic import TaskArithmeticSettings
from hsa.methods.tensors import LayerSpan, TensorTask

NAME = "encoder.layers.3.fc1.weight"


def task(
    name: str = NAME, layer: int | None = 3, depth: float = 0.25, numbers: tuple[int, ...] = (0, 1, 2)
) -> TensorTask:
    info = TensorInfo(name, "F32", (4, 4))
    return TensorTask(
        name=name,
        place=None,
        layers=0,
        shape=(4, 4),
        partition=Partition(),
        sources={f"model{number + 1}": info for number in numbers},
        anchor="model1",
        out_code="F32",
        output_name=name,
        numbers=numbers,
        models_given=3,
        span=None if layer is None else LayerSpan("encoder", layer, 13),
        depth=depth,
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, 0.5),
        (1, 1.0),
        ({NAME: 0.75}, 0.75),
        ({f"model.{NAME}": 0.75}, 0.75),
        ([0.25], 0.25),
        ([0.0, 1.0], 0.25),
        ([0.0, 1.0, 5.0], 0.5),
        ([8.0, 4.0, 2.0, 1.0, 0.5], 4.0),
        ([{"filter": "fc1", "value": 0.4}, 0.6], 0.4),
        ([{"filter": "self_attn", "value": 0.4}, 0.6], 0.6),
        ([{"filter": "*.weight", "value": 0.4}, 0.6], 0.4),
        ([{"filter": "fc1", "value": [0.0, 1.0]}, 0.6], 0.25),
        ([{"filter": "self_attn", "value": 0.4}, {"filter": None, "value": 0.3}], 0.3),
        ([{"filter": "fc", "value": 0.1}, {"filter": "fc1", "value": 0.2}], 0.1),
    ],
)
def test_a_value_for_one_tensor(value: Any, expected: float) -> None:
    assert TaskArithmeticSettings(lam=value).of("lam", task()) == expected


@pytest.mark.parametrize("depth", [0.0, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_list_over_layers_is_interpolated(count: int, depth: float) -> None:
    values = [float(number * number) for number in range(count)]
    position = depth * (count - 1)
    low, high = math.floor(position), math.ceil(position)
    share = position - low
    found = TaskArithmeticSettings(lam=values).of("lam", task(depth=depth))
    assert found == pytest.approx((1 - share) * values[low] + share * values[high], abs=1e-15)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (2, (2.0, 2.0, 2.0)),
        ([1, 2, 3], (1.0, 2.0, 3.0)),
        ([1, [0.0, 1.0], 3], (1.0, 0.25, 3.0)),
        ([1, {NAME: 0.5}, [{"filter": "fc1", "value": -1}, 0]], (1.0, 0.5, -1.0)),
        ([{"filter": "fc1", "value": 0.5}, 1], (0.5, 0.5, 0.5)),
        ({NAME: 0.5}, (0.5, 0.5, 0.5)),
    ],
)
def test_a_value_for_each_model(weights: Any, expected: tuple[float, ...]) -> None:
    assert TaskArithmeticSettings(weights=weights).each("weights", task()) == expected


def test_a_tensor_that_lacks_a_model_takes_the_values_of_the_others() -> None:
    settings = TaskArithmeticSettings(weights=[1, 2, 3])
    assert settings.each("weights", task(numbers=(0, 2))) == (1.0, 3.0)
    with pytest.raises(RequestError, match=r"^weights must have as many values as there are models, 3, got 2$"):
        TaskArithmeticSettings(weights=[1, 2]).each("weights", task(numbers=(0, 2)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.5", r"^lam must be a number finite, got '0.5'|^lam must be a number"),
        ([], "^lam is an empty list"),
        ([1, "2"], "^entry 2 of lam must be a number"),
        ([1, math.nan], "^entry 2 of lam must be"),
        ({"filter": "fc1", "value": 1}, "^lam is one entry with a filter; give a list"),
        ([0.6, {"filter": "fc1", "value": 0.4}], "^lam has 0.6 before its last entry"),
        ([{"filter": "fc1", "value": "much"}, 1], "^lam of 'fc1' must be a number"),
        ([{"filter": 3, "value": 1}, 1], "^lam has an entry with the filter 3"),
        ([{"filter": "fc1", "value": 1, "scale": 2}], "^lam has an entry with the key 'scale'"),
        ({3: 1}, "^lam per tensor must be given by tensor names, got the key 3"),
        ({NAME: 1, f"model.{NAME}": 1}, "which are one tensor"),
    ],
)
def test_what_is_no_value_is_refused(value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TaskArithmeticSettings(lam=value)


def test_a_tensor_that_no_filter_fits_is_named() -> None:
    settings = TaskArithmeticSettings(lam=[{"filter": "self_attn", "value": 0.4}])
    with pytest.raises(RequestError, match=rf"^lam has no value for tensor {NAME}: none of its filters"):
        settings.of("lam", task())


@pytest.mark.parametrize(
    "changes",
    [
        {"lam": [0.1, 0.9]},
        {"lam": [{"filter": "fc1", "value": [0, 1]}, 0.5], "weights": [1, [0, 2], 3]},
        {"weights": {NAME: 0.5}},
        {"only": "encoder.*", "exclude": ["*.bias", "*norm*"], "layers": "2-5, 9", "stack": "encoder"},
        {"on_mismatch": "error"},
    ],
)
def test_settings_are_read_back_from_their_record(changes: Mapping[str, Any]) -> None:
    settings = TaskArithmeticSettings(**changes)
    assert TaskArithmeticSettings.from_dict(settings.as_dict()) == settings


def test_nobody_can_change_a_list_that_settings_were_given() -> None:
    values = [0.0, 1.0]
    settings = TaskArithmeticSettings(lam=values)
    values[0] = 100.0
    assert settings.of("lam", task()) == 0.25


def test_limits_that_say_nothing_are_in_no_record() -> None:
    assert TaskArithmeticSettings().as_dict().keys() == {"lambda", "weights", "normalize", "dtype"}


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "inside"),
    [
        ({}, True),
        ({"only": "encoder.*"}, True),
        ({"only": ["decoder.*", "*fc1*"]}, True),
        ({"only": "model.encoder.*"}, True),
        ({"only": "decoder.*"}, False),
        ({"exclude": "*.weight"}, False),
        ({"only": "encoder.*", "exclude": "*fc*"}, False),
        ({"layers": "3"}, True),
        ({"layers": 3}, True),
        ({"layers": "0-3"}, True),
        ({"layers": "0,2,4-9"}, False),
        ({"layers": "4-11"}, False),
        ({"stack": "encoder"}, True),
        ({"stack": "decoder", "layers": "3"}, False),
    ],
)
def test_limits(limits: Mapping[str, Any], inside: bool) -> None:
    settings = TaskArithmeticSettings(**limits)
    assert settings.limits(NAME, ("encoder", 3)) is inside
    assert settings.limited is bool(limits)


def test_tensors_outside_of_layers_are_no_part_of_limits_to_layers() -> None:
    for limits in ({"layers": "0-99"}, {"stack": "encoder"}):
        assert not TaskArithmeticSettings(**limits).limits("encoder.conv1.weight", None)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"layers": "4-"}, "^layers must be layers such as '4-11' or '0,3', counted from 0, got '4-'$"),
        ({"layers": "9-4"}, "^layers '9-4' has the range 9-4, which ends before it begins$"),
        ({"layers": -1}, "^layers must be layers"),
        ({"layers": True}, "^layers must be layers"),
        ({"only": 3}, "^only must be a pattern"),
        ({"only": [""]}, "^only must be a pattern"),
        ({"exclude": ["a"] * 101}, "^exclude has 101 patterns, at most 100"),
        ({"stack": ""}, "^stack must be the name"),
        ({"on_mismatch": "drop"}, "^on_mismatch must be one of first, error, skip-model"),
    ],
)
def test_limits_that_are_none_are_refused(limits: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        TaskArithmeticSettings(**limits)
