"""One point of a sweep's grid: the settings of its merge, the values of its axes, and its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hsa.methods.registry import method_named, methods
from hsa.methods.settings import DEFAULT_METHOD, Declared, Settings, declared

LONGEST_NAME = 200
"""Maximum letters of a point's name. With the rest of a file name, this stays below the limit of any filesystem."""


@dataclass(frozen=True)
class GridPoint:
    """A point of a grid. Its settings have one value for each axis, none of them per tensor.

    Example:
        >>> GridPoint(HsaSettings(k=0.25)).name
        'encoder-qkv_k0.25_lambda0.5_alpha0.2'
    """

    settings: Any
    """An instance of the method's settings class."""

    @property
    def values(self) -> Mapping[str, Any]:
        """The values of the axes under their names in records, in the order of the name. For a method other than the
        default, its name comes first."""
        method = {} if self.settings.method == DEFAULT_METHOD else {"method": self.settings.method}
        each = {axis.key: getattr(self.settings, axis.name) for axis in axes(type(self.settings))}
        return {**method, **{key: value if isinstance(value, str) else float(value) for key, value in each.items()}}

    @property
    def name(self) -> str:
        """The start of its file names. It is the same in every grid that has this point."""
        return "_".join(
            value if isinstance(value, str) else f"{key}{decimal_text(value)}" for key, value in self.values.items()
        )


def axes(owner: type[Settings]) -> tuple[Declared, ...]:
    """The settings for which a sweep may take several values: text choices first, then numbers."""
    each = (each for each in declared(owner) if each.about.axis)
    return tuple(sorted(each, key=lambda axis: not axis.about.choices))


def name_starts() -> tuple[str, ...]:
    """The possible starts of a point's name: a value of the default method's first axis, or another method's name."""
    first = axes(method_named(DEFAULT_METHOD).Settings)[0]
    return (*first.about.choices, *(f"{name}_" for name in methods() if name != DEFAULT_METHOD))


def decimal_text(value: float) -> str:
    """A number in decimal digits, without an exponent: 0.25, 1."""
    text = format(Decimal(repr(float(value))), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
