"""Values of settings that are more than one number: by layer, by a pattern of names, and for each model.

A *scheduled* value is one of

- a number, for all tensors;
- a mapping from tensor names, with or without the leading `model.`, to numbers, which names every merged tensor;
- a list of numbers over the layers: the first is that of the first layer, the last that of the last, and between them
  the values are interpolated. Tensors before the layers take the first, those after them the last;
- a list of `{"filter": PART, "value": VALUE}`, of which the first whose part stands in the tensor's name gives the
  value; a part with `*`, `?` or `[` is a shell pattern of the whole name. A bare value as the last entry serves all
  others.

A value *for each model* is one scheduled value for all models, or a list of them, one a model. Lists over layers are
then written inside such a list. The forms are those of mergekit's configuration files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from hsa.errors import RequestError, shown

Value = Any
"""A scheduled value."""


class Where(NamedTuple):
    """Where a tensor stands: its canonical name, and how far down its stack of layers, from 0.0 to 1.0."""

    name: str
    depth: float


def is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def is_filter(entry: object) -> bool:
    """Whether an entry of a list says for which tensors it is."""
    return isinstance(entry, Mapping) and "value" in entry


def is_filtered(value: object) -> bool:
    """Whether a value is a list with filters."""
    return isinstance(value, Sequence) and is_list(value) and any(map(is_filter, value))


def frozen(value: Value) -> Value:
    """The value with tuples for its lists, which nobody can change."""
    return tuple(map(frozen, value)) if is_list(value) else value


def plain(value: Value) -> Any:
    """The value as JSON holds it: numbers as floats, mappings of tensors in the order of their names."""
    if is_list(value):
        return [plain(each) for each in value]
    if is_filter(value):
        return {"filter": value.get("filter"), "value": plain(value["value"])}
    if isinstance(value, Mapping):
        return {name: float(number) for name, number in sorted(value.items())}
    return float(value)


def tensors_of(value: Value) -> Iterator[Mapping[str, float]]:
    """The mappings from tensor names that a value holds."""
    if is_list(value):
        for each in value:
            yield from tensors_of(each)
    elif is_filter(value):
        yield from tensors_of(value["value"])
    elif isinstance(value, Mapping):
        yield value


def check(name: str, value: Value, check_number: Callable[[str, Any], None]) -> None:
    """RequestError unless it is a scheduled value; `check_number` checks one number, given what to call it."""
    if is_filter(value):
        raise RequestError(f"{name} is one entry with a filter; give a list of them, [{shown(value)}]")
    if isinstance(value, Mapping):
        _check_tensors(name, value, check_number)
    elif not is_list(value):
        check_number(name, value)
    elif not value:
        raise RequestError(f"{name} is an empty list; give a number, or a number for each layer")
    elif is_filtered(value):
        for entry in value[:-1]:
            if not is_filter(entry):
                raise RequestError(
                    f"{name} has {shown(entry)} before its last entry; only the last may be a value for all other "
                    f"tensors"
                )
        for entry in value:
            if is_filter(entry):
                _check_filter(name, entry, check_number)
            else:
                check(name, entry, check_number)
    else:
        for number, entry in enumerate(value, 1):
            check_number(f"entry {number} of {name}", entry)


def _check_filter(name: str, entry: Mapping[Any, Any], check_number: Callable[[str, Any], None]) -> None:
    unknown = sorted(map(str, entry.keys() - {"filter", "value"}))
    part = entry.get("filter")
    if unknown or not (part is None or isinstance(part, str)):
        what = f"the key {shown(unknown[0])}" if unknown else f"the filter {shown(part)}"
        raise RequestError(f"{name} has an entry with {what}; expected a filter, a part of tensor names, and a value")
    check(name if part is None else f"{name} of {shown(part)}", entry["value"], check_number)


def _check_tensors(name: str, values: Mapping[Any, Any], check_number: Callable[[str, Any], None]) -> None:
    for tensor, number in values.items():
        if not isinstance(tensor, str):
            raise RequestError(f"{name} per tensor must be given by tensor names, got the key {shown(tensor)}")
        check_number(f"{name} of {shown(tensor)}", number)
        if tensor.startswith("model.") and tensor.removeprefix("model.") in values:
            raise RequestError(
                f"{name} is given for {shown(tensor)} and for {shown(tensor.removeprefix('model.'))}, which are one "
                f"tensor; give one of them"
            )


def at(name: str, value: Value, where: Where) -> float:
    """A scheduled value for one tensor; `name` is what messages call the setting. RequestError where it has none.

    Example:
        >>> at("density", (0.0, 1.0), Where("encoder.layers.1.fc1.weight", 0.25))
        0.25
        >>> at("t", ({"filter": "fc1", "value": 0.4}, 0.6), Where("encoder.layers.1.fc1.weight", 0.25))
        0.4
    """
    if not is_list(value) and not isinstance(value, Mapping):
        return float(value)
    if isinstance(value, Mapping):
        return _of_tensor(name, value, where.name)
    if not is_filtered(value):
        return _of_depth(value, where.depth)
    for entry in value:
        if not is_filter(entry):
            return at(name, entry, where)
        if matches(entry.get("filter"), where.name):
            return at(name, entry["value"], where)
    raise RequestError(
        f"{name} has no value for tensor {where.name}: none of its filters is part of the name; add a value for all "
        f"others as its last entry"
    )


def matches(part: str | None, name: str) -> bool:
    """Whether a filter is for the tensor of that name."""
    if part is None:
        return True
    return fnmatchcase(name, part) if any(letter in part for letter in "*?[") else part in name


def _of_tensor(name: str, values: Mapping[str, float], tensor: str) -> float:
    for key in (tensor, f"model.{tensor}"):
        if key in values:
            return float(values[key])
    raise RequestError(f"{name} is given per tensor but has no value for target tensor {tensor}")


def _of_depth(values: Sequence[float], depth: float) -> float:
    position = depth * (len(values) - 1)
    before = min(int(position), len(values) - 1)
    after = min(before + 1, len(values) - 1)
    share = position - before
    return (1.0 - share) * values[before] + share * values[after]
