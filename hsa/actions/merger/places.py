"""The places of tensors in a model: found again by name, from the model down, without looking at other tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, is_, is_not
from typing import Any

import torch

from hsa.actions.merger.loaded_models import Model

_CHILDREN = attrgetter("_modules")

Places = Callable[[Any], "list[torch.Tensor] | None"]
"""Returns the tensors of a model in these places; None if one of the places is empty."""


def places_of(model: Model, tensors: Sequence[torch.Tensor]) -> Places:
    """The places of tensors that a model holds."""
    if isinstance(model, Mapping):
        keys = {id(tensor): key for key, tensor in model.items()}
        return _Keys([keys[id(tensor)] for tensor in tensors], len(model))
    return _Parts(model, tensors)


class _Keys:
    """Places in a state dict with this number of tensors."""

    def __init__(self, keys: Sequence[str], count: int) -> None:
        self._keys, self._count = keys, count

    def __call__(self, model: Any) -> list[torch.Tensor] | None:
        if len(model) != self._count:
            return None
        try:
            return [model[key] for key in self._keys]
        except KeyError:
            return None


class _Parts:
    """Places in a module: the modules on the path from the model down, each with its parent and its name there, and for
    each tensor its module and name. If a module was replaced by another, its place no longer matches.

    Modules are only referenced weakly, so that a model can be freed. All lookups of one kind are made in one call.
    """

    def __init__(self, model: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> None:
        names = {id(tensor): name for name, tensor in _named(model)}
        numbers = {"": 0}
        self._modules: list[weakref.ref[torch.nn.Module]] = [weakref.ref(model)]
        self._parents: list[int] = []
        self._names: list[str] = []
        self._owners: list[int] = []
        self._parts: list[str] = []
        self._kinds: list[str] = []
        for tensor in tensors:
            path, _, part = names[id(tensor)].rpartition(".")
            self._owners.append(self._number(numbers, model, path))
            self._parts.append(part)
            self._kinds.append("_parameters" if part in model.get_submodule(path)._parameters else "_buffers")

    def _number(self, numbers: dict[str, int], model: torch.nn.Module, path: str) -> int:
        """The number of a module, which follows that of its parent."""
        if path not in numbers:
            above, _, name = path.rpartition(".")
            self._parents.append(self._number(numbers, model, above))
            self._names.append(name)
            numbers[path] = len(self._modules)
            self._modules.append(weakref.ref(model.get_submodule(path)))
        return numbers[path]

    def __call__(self, model: Any) -> list[torch.Tensor] | None:
        modules: list[Any] = [module() for module in self._modules]
        if modules[0] is not model:
            return None
        try:
            children = map(_CHILDREN, map(modules.__getitem__, self._parents))
            if any(map(is_not, map(dict.get, children, self._names), modules[1:])):
                return None
            held = map(getattr, map(modules.__getitem__, self._owners), self._kinds)
            tensors: list[Any] = list(map(dict.get, held, self._parts))
        except (AttributeError, TypeError):  # a module that was freed, or that is not torch's
            return None
        return None if any(map(is_, tensors, repeat(None))) else tensors


def _named(model: torch.nn.Module) -> Any:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
