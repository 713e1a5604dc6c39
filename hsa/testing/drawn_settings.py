"""Random settings of a merge method, drawn from its declared choices and ranges: choices, the ends of ranges and values
between them. Values may vary by layer, by a part of names, by tensor and by model."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hsa.methods.model_method import ModelSettings
from hsa.methods.registry import AnyMethod
from hsa.methods.settings import Declared, declared

Drawn = dict[str, Any]

FILTER = "fc"
"""The part of a name that drawn lists with filters match."""

LARGE = 1000.0
"""Ends of ranges beyond this, such as the largest float32, are not drawn, because sums would overflow."""

_LAYER = re.compile(r"(?P<stack>.*?)layers\.(?P<layer>\d+)\.")

_COMMON = frozenset(each.name for each in declared(ModelSettings))


def draw_settings(
    method: AnyMethod,
    models: int,
    draw: random.Random,
    choices: Mapping[str, Sequence[Any]] | None = None,
    merged: Sequence[str] = (),
) -> Drawn:
    """Draw settings by name for a merge of `models` models; about a third of them keep their defaults.

    `choices` are values to draw a setting from instead of its declared range. `merged` are the canonical names of the
    tensors that the merge computes. If they are given, settings with one number for each tensor are drawn too.

    Example:
        >>> draw_settings(method_named("ties"), 2, random.Random(3))  # doctest: +SKIP
        {'density': [0.7, 0.0], 'lam': [{'filter': 'fc', 'value': 0.6}, 2.0], 'rescale': 'l1'}
    """
    drawn: Drawn = {}
    for each in declared(method.Settings):
        if choices and each.name in choices:
            drawn[each.name] = draw.choice(choices[each.name])
        elif each.name not in _COMMON and (each.about.required or draw.random() < 0.65):
            drawn[each.name] = _value(each, models, draw, merged)
    return drawn


def resolved(
    method: AnyMethod, drawn: Drawn, name: str, models: int, *, depth: float = 0.0, numbers: Sequence[int] | None = None
) -> Drawn:
    """The drawn settings for one tensor: a number for each setting, or a list with one number for each model.

    Args:
        method, drawn: the argument and the result of `draw_settings`.
        name: the tensor's canonical name.
        models: the number of models.
        depth: the tensor's relative depth, see `depth_of`.
        numbers: the indices of the models that the tensor is merged from, if not from all.
    """
    found: Drawn = {}
    for each in declared(method.Settings):
        if each.name in drawn and each.name not in _COMMON:
            value = drawn[each.name]
            if each.about.per_model:
                by_model = value if _is_by_model(value) else [value] * _entries(each, models)
                some = numbers is not None and each.about.entries == "model"
                chosen = [by_model[number] for number in numbers or ()] if some else by_model
                found[each.name] = [_at(entry, name, depth) for entry in chosen]
            else:
                found[each.name] = _at(value, name, depth)
    return found


def depth_of(name: str, names: Sequence[str]) -> float:
    """The relative depth of a tensor in the layers of its stack, from 0 to 1, among tensors with these canonical names.

    It is 1 in a stack of one layer, and 0 outside of layers.

    Example:
        >>> depth_of("layers.1.fc.bias", ["layers.0.fc.bias", "layers.1.fc.bias", "layers.2.fc.bias"])
        0.5
    """
    place = _LAYER.match(name)
    if place is None:
        return 0.0
    others = [other for other in map(_LAYER.match, names) if other is not None and other["stack"] == place["stack"]]
    last = max(int(other["layer"]) for other in others)
    return int(place["layer"]) / last if last else 1.0


def _entries(each: Declared, models: int) -> int:
    """The length of a list with a value for each model, or for each but the first."""
    return models if each.about.entries == "model" else models - 1


def _value(each: Declared, models: int, draw: random.Random, merged: Sequence[str]) -> Any:
    about = each.about
    if about.choices:
        return draw.choice(about.choices)
    if isinstance(each.default, bool):
        return draw.random() < 0.5
    if about.whole:
        low = int(about.low or 0)
        return draw.choice([low, draw.randint(low, min(int(about.high or 1 << 40), 1 << 40))])
    if about.per_model and draw.random() < 0.6:
        return [_scheduled(each, draw, merged) for _ in range(_entries(each, models))]
    return _scheduled(each, draw, merged, by_model=each.about.per_model)


def _scheduled(each: Declared, draw: random.Random, merged: Sequence[str], *, by_model: bool = False) -> Any:
    """A number, or if the setting may vary, a list with a filter, a list over layers or a number for each tensor.

    With `by_model`, no list over layers is drawn, because a plain list of numbers would be one for each model.
    """
    form = draw.random() if each.about.varies else 1.0
    if form < 0.2:
        return [{"filter": FILTER, "value": _over_layers(each, draw)}, _number(each, draw)]
    if form < 0.35 and not by_model:
        return _over_layers(each, draw)
    if form < 0.45 and merged:
        return {name: _number(each, draw) for name in merged}
    return _number(each, draw)


def _over_layers(each: Declared, draw: random.Random) -> Any:
    """A number, or a list over layers."""
    count = draw.choice((1, 1, 2, 3))
    return [_number(each, draw) for _ in range(count)] if count > 1 else _number(each, draw)


def _number(each: Declared, draw: random.Random) -> float:
    about = each.about
    low, high = about.low or 0.0, LARGE if about.high is None else about.high
    ends = [end for end in (low, high) if abs(end) < LARGE]
    if each.default is not None:
        ends.append(float(each.default))
    if draw.random() < 0.35:
        return draw.choice(ends)
    if about.search:
        return round(draw.uniform(*about.search), 3)
    if high < LARGE:
        return round(draw.uniform(low, high), 3)
    return max(float(low), float(10.0 ** draw.uniform(-6, 0)))


def _is_by_model(value: Any) -> bool:
    return isinstance(value, list) and not _is_filtered(value)


def _is_filtered(value: Any) -> bool:
    """Whether a value is a list that begins with a filter; a list by model may begin with a mapping by tensor."""
    return isinstance(value, list) and isinstance(value[0], Mapping) and "filter" in value[0]


def _at(value: Any, name: str, depth: float) -> Any:
    """A setting's value for the tensor of that name, at a relative depth."""
    if isinstance(value, Mapping):
        return value[name]
    if _is_filtered(value):
        return _at(value[0]["value"] if FILTER in name else value[1], name, depth)
    if not isinstance(value, list):
        return value
    position = depth * (len(value) - 1)
    before = min(int(position), len(value) - 1)
    after = min(before + 1, len(value) - 1)
    share = position - before
    return (1.0 - share) * value[before] + share * value[after]
