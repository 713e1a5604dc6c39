"""What a merge method is to its callers: the sources it takes, and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hsa.errors import RequestError

BASE = "base"


@dataclass(frozen=True)
class ModelRole:
    """A model that a method tells apart by name, such as HSA's primary: the role, and one sentence for help."""

    name: str
    help: str


@dataclass(frozen=True)
class Contract:
    """The sources that a method takes.

    Args:
        base: whether it needs the base model, can use it, or has no use for it.
        least, most: how many models it merges, base not counted.
        named: models with roles of their own, in order; the others are `model1`, `model2` and so on, by their place.

    The first model is the anchor: its names, config, small files, shards and element types are the output's.
    """

    base: Literal["required", "optional", "none"] = "optional"
    least: int = 2
    most: int = 8
    named: tuple[ModelRole, ...] = ()

    def roles(self, count: int) -> tuple[str, ...]:
        """The roles of so many models, in the order in which they are given.

        Example:
            >>> Contract(named=(ModelRole("primary", "The anchor."),)).roles(3)
            ('primary', 'model2', 'model3')
        """
        return tuple(self.named[n].name if n < len(self.named) else f"model{n + 1}" for n in range(count))

    def check(self, method: str, *, base: bool, models: int) -> None:
        """RequestError unless this is a base, or none, and a number of models that the method takes."""
        if self.base == "required" and not base:
            raise RequestError(f"method {method} needs base, the model that the others were trained from; give it")
        if self.base == "none" and base:
            raise RequestError(f"method {method} takes no base; leave it out, or give it as one of the models")
        if not self.least <= models <= self.most:
            span = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
            raise RequestError(f"method {method} merges {span} models, got {models}")


@dataclass(frozen=True)
class Method:
    """A merge method: its name, its title, the sources it takes, and the class of its settings."""

    name: str
    title: str
    contract: Contract
    Settings: type[Any]
