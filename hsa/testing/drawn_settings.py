"""Settings of a merge method, drawn at random from what it declares: every choice, the ends of ranges, and between; by
layer, by a part of names, by tensor and by model."""

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
"""The part of a name by which a drawn list with filters tells tensors apart."""

LARGE = 1000.0
"""Ends of ranges beyond this, such as float32's, are not drawn: sums would overflow."""

_LAYER = re.compile(r"(?P<stack>.*?)layers\.(?P<layer>\d+)\.")

_COMMON = frozenset(each.name for each in declared(ModelSettings))


def draw_settings(
    method: AnyMethod,
    models: int,
    draw: random.Random,
    choices: Mapping[str, Sequence[Any]] | None = None,
    merged: Sequence[str] = (),
) -> Drawn:
    """Settings by name for a merge of so many models; about every third keeps its default.

    `choices` are values to draw a setting from in place of its declared range. `merged` are the tensors that the merge
    computes, by canonical name; where they are given, a number for each of them is drawn too.

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
    """The drawn settings for one tensor: a number each, or one for each model where the setting is given by model.

    Args:
        method, drawn: as `draw_settings` took and gave them.
        name: the tensor's canonical name.
        models: how many models there are.
        depth: how far down its layers the tensor lies, see `depth_of`.
        numbers: the places of the models that the tensor is merged of, where it is not merged of all.
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
    """How far down the layers of its stack a tensor lies, from 0 to 1, among tensors of these canonical names: 1 in a
    stack of one layer, 0 outside of layers.

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
    """A number, or where the setting may vary, a list with a filter, a list over layers or a number for each tensor. A
    bare list of numbers means something else where a list is `by_model`."""
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
    """Whether a list begins with an entry for a part of names; one by model may begin with numbers by tensor."""
    return isinstance(value, list) and isinstance(value[0], Mapping) and "filter" in value[0]


def _at(value: Any, name: str, depth: float) -> Any:
    """A value for the tensor of that name, so far down its layers."""
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
