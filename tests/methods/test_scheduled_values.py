"""Values of settings by layer, by a part of the name, by stack, and for each model."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hsa.errors import RequestError
from hsa.methods.task_arithmetic import TaskArithmeticSettings
from hsa.methods.tensors import LayerSpan
from hsa.methods.values import Where, at

LAYERS = 5


def layer(number: int, rest: str = "fc1.weight", stack: str = "encoder", count: int = LAYERS) -> Where:
    depth = number / (count - 1) if count > 1 else 1.0
    name = f"{stack}.layers.{number}.{rest}"
    return Where(name, depth, f"model.{name}", LayerSpan(stack, number, count))


CONV = Where("encoder.conv1.weight", 0.0, "model.encoder.conv1.weight")
NORM = Where("encoder.layer_norm.weight", 0.0, "model.encoder.layer_norm.weight", None, True)


@pytest.mark.parametrize(
    ("value", "where", "expected"),
    [
        (0.5, NORM, 0.5),
        ((0.2, 0.6), layer(0), 0.2),
        ((0.2, 0.6), layer(4), 0.6),
        ((0.0, 0.5, 1.0), layer(1), 0.25),
        ((0.0, 1.0), layer(0, count=1), 1.0),
        ((0.2, 0.6), CONV, 0.2),
        ((0.2, 0.6), NORM, 0.2),
        ((7.0,), layer(3), 7.0),
        (({"filter": "fc1", "value": 1.0}, 2.0), layer(2), 1.0),
        (({"filter": "fc1", "value": 1.0}, 2.0), layer(2, "fc2.bias"), 2.0),
        (({"filter": "model.encoder", "value": 1.0}, 2.0), layer(2), 1.0),
        (({"filter": "encoder.layers.?.fc*", "value": 1.0}, 2.0), layer(2), 1.0),
        (({"filter": "fc1", "value": (0.0, 1.0)}, 2.0), layer(3), 0.75),
        (({"stack": "decoder", "value": 1.0}, 2.0), layer(2), 2.0),
        (({"stack": "encoder", "value": 1.0}, 2.0), layer(2), 1.0),
        (({"stack": "encoder", "value": 1.0}, 2.0), CONV, 1.0),
        (({"stack": "encoder", "value": 1.0}, 2.0), layer(2, "encoder_attn.bias", stack="decoder"), 2.0),
        (({"layers": (1, 3), "value": (0.0, 1.0)}, 2.0), layer(2), 0.5),
        (({"layers": (1, 3), "value": (0.0, 1.0)}, 2.0), layer(4), 2.0),
        (({"layers": (3, None), "value": (0.0, 1.0)}, 2.0), layer(4), 1.0),
        (({"layers": (4, 4), "value": (0.0, 1.0)}, 2.0), layer(4), 1.0),
        (({"layers": (0, 1), "value": (0.0, 1.0)}, 2.0), CONV, 0.0),
        (({"layers": (0, 1), "value": (0.0, 1.0)}, 2.0), NORM, 2.0),
        (({"layers": (2, None), "value": (0.0, 1.0)}, 2.0), NORM, 0.0),
        (({"layers": (2, None), "value": (0.0, 1.0)}, 2.0), CONV, 2.0),
        (({"stack": "encoder", "layers": (0, 1), "filter": "fc2", "value": 1.0}, 2.0), layer(1), 2.0),
    ],
)
def test_a_value_for_a_tensor(value: Any, where: Where, expected: float) -> None:
    assert at("density", value, where) == pytest.approx(expected, abs=1e-15)


def test_no_value_for_a_tensor_is_an_error_that_names_it() -> None:
    with pytest.raises(RequestError, match=r"density has no value for tensor encoder\.conv1\.weight"):
        at("density", ({"layers": (1, 2), "value": 1.0},), CONV)


BAD = {
    "an unknown key": ([{"filtre": "a", "value": 1}], "an entry with the key 'filtre'; expected filter"),
    "a number as filter": ([{"filter": 3, "value": 1}], "an entry with the filter 3; expected a text"),
    "a number as stack": ([{"stack": 3, "value": 1}], "an entry with the stack 3; expected a text"),
    "one layer": ([{"layers": [3], "value": 1}], "an entry with the layers"),
    "layers backwards": ([{"layers": [3, 1], "value": 1}], "an entry with the layers"),
    "layers below zero": ([{"layers": [-1, 1], "value": 1}], "an entry with the layers"),
    "a flag as layer": ([{"layers": [False, 1], "value": 1}], "an entry with the layers"),
    "a value among filters": ([0.5, {"filter": "a", "value": 1}], "before its last entry"),
}


@pytest.mark.parametrize(("value", "message"), BAD.values(), ids=BAD)
def test_a_value_that_cannot_be(value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        TaskArithmeticSettings(lam=value)
    assert str(error.value).startswith("lam has ")


def test_values_are_the_same_after_they_were_recorded() -> None:
    value = [{"stack": "encoder", "layers": [0, None], "filter": "fc1", "value": [0, 1]}, 0.5]
    settings = TaskArithmeticSettings(lam=value, weights=[value, [0, 2]])
    assert TaskArithmeticSettings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings
