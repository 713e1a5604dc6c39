"""Settings of a method, each declared once: a field of a frozen dataclass, with its limits, its help and its uses.

The command line's options, Python's keywords, keys of recipes, axes of sweeps, ranges of searches, the table on the
card and the pages of the documentation are made from these fields; no other module lists them.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, cast, get_type_hints

from hsa.arguments import check_flags
from hsa.errors import RequestError, shown
from hsa.option_names import LETTERS, as_keys, option, spelled

OutputDtype = Literal["auto", "float32", "float16", "bfloat16"]
PerTensor = float | Mapping[str, float]
"""A number, or one for each target tensor by its name, with or without the leading `model.`."""

MAX_FLOAT32 = (2.0 - 2.0**-23) * 2.0**127
"""The largest float32: the arithmetic of a merge is float32's."""

DEFAULT_METHOD = "hsa"
"""The method of a merge that names none."""

_METADATA = "hsa.setting"

Group = Literal["common", "sources", "numerics", "output", "machine"]
"""The heading under which help shows an option."""


@dataclass(frozen=True)
class Setting:
    """What is known of one setting beside its name and default.

    Args:
        help: one sentence for the command line, the reference and the card.
        python: the same for Python's reference, where the command line's option says the opposite or has other values.
        low, high: limits of a number, both included.
        whole: it is a whole number, or None for "not given".
        choices: it is one of these texts.
        per_tensor: it may also be a mapping from the names of target tensors to numbers.
        patchable: a patch can hold a merge with any value of it, and so can a sweep.
        structural: the plan of a merge hangs on it (which tensors are merged, what is written), so that candidates
            which share a plan share it.
        axis: a sweep may take several values of it.
        summary: the line that says how a merge was made names it, as it does every axis.
        search: the range that a search draws from; None for what is not searched.
        group: where help shows the option.
        metavar: what help calls the value.
        default_text: what help shows as the default, where that is not the default's own text.
    """

    help: str
    python: str | None = None
    low: float | None = None
    high: float | None = None
    whole: bool = False
    choices: tuple[str, ...] = ()
    per_tensor: bool = False
    patchable: bool = True
    structural: bool = False
    axis: bool = False
    summary: bool = False
    search: tuple[float, float] | None = None
    group: Group = "common"
    metavar: str | None = None
    default_text: str | None = None


def setting(default: Any, help: str, *, kw_only: Any = dataclasses.MISSING, **about: Any) -> Any:
    """A field of a Settings class; `about` are the fields of `Setting`.

    Example:
        >>> @dataclass(frozen=True)
        ... class ShareSettings(Settings):
        ...     share: float = setting(0.5, "Share of the first model, 0 to 1.", low=0.0, high=1.0, axis=True)
        >>> ShareSettings(share=0.25).as_dict()
        {'share': 0.25, 'dtype': 'auto'}
    """
    return field(default=default, kw_only=kw_only, metadata={_METADATA: Setting(help, **about)})


@dataclass(frozen=True)
class Declared:
    """A setting with its name in Python, its type and its default."""

    name: str
    type: Any
    default: Any
    about: Setting

    @property
    def key(self) -> str:
        """Its name in records, recipes and on the command line, where `lambda` is no keyword."""
        return LETTERS.get(self.name, self.name)


def declared(owner: type[Any]) -> tuple[Declared, ...]:
    """The settings that a dataclass declares, in the order of its fields, those for keywords alone last."""
    hashable: Any = owner
    return _declared(hashable)


@cache
def _declared(owner: Any) -> tuple[Declared, ...]:
    types = get_type_hints(owner)
    fields = [each for each in dataclasses.fields(owner) if _METADATA in each.metadata]
    ordered = sorted(fields, key=lambda each: bool(each.kw_only))
    return tuple(Declared(each.name, types[each.name], each.default, each.metadata[_METADATA]) for each in ordered)


S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """The settings of one merge, checked when they are made. A method's own class adds its fields.

    Raises RequestError where a value is out of range or not finite.
    """

    method: ClassVar[str]
    """The name of the method whose settings these are."""

    dtype: OutputDtype = setting(
        "auto",
        "Output: auto, float32, float16 or bfloat16.",
        choices=("auto", "float32", "float16", "bfloat16"),
        patchable=False,
        structural=True,
        group="numerics",
        metavar="DTYPE",
        kw_only=True,
    )

    def __post_init__(self) -> None:
        for each in declared(type(self)):
            check_value(each, getattr(self, each.name))

    def as_dict(self) -> dict[str, Any]:
        """The settings under their names in records and recipes."""
        return {each.key: _plain(each, getattr(self, each.name)) for each in declared(type(self))}

    @classmethod
    def from_dict(cls: type[S], parameters: Mapping[str, Any]) -> S:
        """The settings whose `as_dict` gave these parameters; others among them are left aside.

        A parameter that is missing has its default, so that records of earlier versions of a method can be read. Raises
        RequestError where one is out of range.
        """
        given = {each.name: parameters[each.key] for each in declared(cls) if each.key in parameters}
        with spelled(as_keys(parameters)):
            return cls(**given)

    def of(self, name: str, tensor: str) -> float:
        """The value of a setting for the target tensor of that canonical name (no leading `model.`)."""
        value: PerTensor = getattr(self, name)
        if not isinstance(value, Mapping):
            return float(value)
        for key in (tensor, f"model.{tensor}"):
            if key in value:
                return float(value[key])
        raise RequestError(f"{option(name)} is given per tensor but has no value for target tensor {tensor}")

    def per_tensor(self) -> Iterator[tuple[str, Mapping[str, float]]]:
        """The settings that are given per tensor, by name."""
        for each in declared(type(self)):
            value = getattr(self, each.name)
            if isinstance(value, Mapping):
                yield each.name, value

    def structure(self) -> tuple[Any, ...]:
        """What of the settings a plan hangs on; settings with equal structure share a plan."""
        return tuple(getattr(self, each.name) for each in declared(type(self)) if each.about.structural)


def check_value(each: Declared, value: Any) -> None:
    """RequestError unless a value is one that the setting may have."""
    about, name = each.about, option(each.name)
    if about.choices:
        check_choice(name, value, about.choices)
    elif isinstance(each.default, bool):
        check_flags(**{each.name: value})
    elif about.whole:
        _check_whole(name, value, about)
    elif about.per_tensor and isinstance(value, Mapping):
        _check_per_tensor(name, value, about)
    elif about.low is not None:
        check_number(name, value, about.low, math.inf if about.high is None else about.high)


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """RequestError unless a value is a number within limits, both included; `name` is what the message calls it."""
    limits = (
        f"in [{low:g}, {high:g}]" if high < MAX_FLOAT32 else "finite" if low < 0 else f"finite and at least {low:g}"
    )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise RequestError(f"{name} must be a number {limits}, got {shown(value)}")
    value = cast(float, value)
    if not -sys.float_info.max <= value <= sys.float_info.max or not low <= value <= high:
        beyond = "; float32 ends at 3.4e38" if high == MAX_FLOAT32 else ""
        raise RequestError(f"{name} must be {limits}, got {shown(value)}{beyond}")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """RequestError unless a value is one of these texts."""
    if not isinstance(value, str) or value not in allowed:
        raise RequestError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")


def _check_whole(name: str, value: Any, about: Setting) -> None:
    if value is None:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    low, high = int(about.low or 0), int(about.high or sys.maxsize)
    if not (whole and low <= value <= high):
        raise RequestError(f"{name} must be a whole number from {low} to {high}, got {shown(value)}")


def _check_per_tensor(name: str, value: Mapping[Any, Any], about: Setting) -> None:
    for tensor, number in value.items():
        if not isinstance(tensor, str):
            raise RequestError(f"{name} per tensor must be given by tensor names, got the key {shown(tensor)}")
        high = math.inf if about.high is None else about.high
        check_number(f"{name} of {shown(tensor)}", number, about.low or 0.0, high)
        if tensor.startswith("model.") and tensor.removeprefix("model.") in value:
            raise RequestError(
                f"{name} is given for {shown(tensor)} and for {shown(tensor.removeprefix('model.'))}, which are one "
                f"tensor; give one of them"
            )


def _plain(each: Declared, value: Any) -> Any:
    """A value as records hold it: numbers as floats, mappings in the order of their names."""
    if isinstance(value, Mapping):
        return {name: float(number) for name, number in sorted(value.items())}
    if each.about.choices or each.about.whole or value is None:
        return value
    return value if isinstance(value, (bool, str)) else float(value)
