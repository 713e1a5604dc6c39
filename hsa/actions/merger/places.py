"""Where tensors lie in a model: found again by their names, from the model down, without a look at other tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hsa.actions.merger.loaded_models import Model

Places = Callable[[Any], "list[torch.Tensor] | None"]
"""Gives the tensors of a model in their places; None where there is nothing in one of them."""


def places_of(model: Model, tensors: Sequence[torch.Tensor]) -> Places:
    """The places of tensors that a model holds."""
    if isinstance(model, Mapping):
        keys = {id(tensor): key for key, tensor in model.items()}
        return _Keys([keys[id(tensor)] for tensor in tensors], len(model))
    return _Parts(model, tensors)


class _Keys:
    """Places in a state dict of so many tensors."""

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
    """Places in a module: those of the modules on the way, each by its number of the parent and its name there, and of
    the tensors, by the numbers of their modules."""

    def __init__(self, model: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> None:
        names = {id(tensor): name for name, tensor in _named(model)}
        self._steps: list[tuple[int, str]] = []
        self._numbers = {"": 0}
        self._tensors: list[tuple[int, str, str]] = []
        for tensor in tensors:
            path, _, part = names[id(tensor)].rpartition(".")
            number = self._number(path)
            kind = "_parameters" if part in model.get_submodule(path)._parameters else "_buffers"
            self._tensors.append((number, kind, part))

    def _number(self, path: str) -> int:
        """The number of a module, which follows that of its parent."""
        if path not in self._numbers:
            above, _, name = path.rpartition(".")
            self._steps.append((self._number(above), name))
            self._numbers[path] = len(self._steps)
        return self._numbers[path]

    def __call__(self, model: Any) -> list[torch.Tensor] | None:
        modules = [model]
        try:
            for parent, name in self._steps:
                modules.append(modules[parent]._modules[name])
            return [getattr(modules[number], kind)[part] for number, kind, part in self._tensors]
        except (AttributeError, KeyError):
            return None


def _named(model: torch.nn.Module) -> Any:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
