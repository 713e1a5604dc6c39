"""Find the target tensors of a model that a merge is written into, and check the model when it is first seen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from hsa.actions.merger.already_merged import WrittenTensors
from hsa.actions.merger.loaded_models import (
    LoadedTensor,
    Model,
    entries_of,
    targets_of,
    tensor_instead_of,
    without_tied_output,
)
from hsa.actions.merger.places import places_of
from hsa.actions.merger.shared_memory import first_shared, repeats_elements, spans
from hsa.architectures.base import Architecture, Preset
from hsa.errors import MismatchError, RequestError
from hsa.methods.tensors import TensorTask

MAX_LAYOUTS = 4
"""The number of models whose checks are cached: a search writes to the same model again and again."""

_KIND = attrgetter("__class__", "dtype", "shape", "device")

_STORAGE_USES = getattr(torch._C, "_storage_Use_Count", None)
"""Counts the tensors that share a storage; torch has it since 2.1."""


@dataclass(frozen=True)
class _ModelLayout:
    """A model as it was checked: the addresses of all its tensors, and the kinds and positions of its targets."""

    addresses: tuple[int, ...]
    kinds: tuple[tuple[Any, ...], ...]
    positions: tuple[int, ...]
    record: WrittenTensors


@dataclass(frozen=True)
class _KnownModel:
    """A model whose targets are found by name: its id, the places of the targets, their last state, and the record."""

    model: int
    places: Callable[[Any], list[torch.Tensor] | None]
    state: tuple[Any, ...]
    record: WrittenTensors


class WritableTargets:
    """Finds the tensors to write in a model or state dict.

    All tensors of a model are checked when it is first seen, and again when an address of any of its tensors, or a
    dtype, shape or stride of a target, has changed. Looking at 1,259 tensors takes milliseconds. It is skipped while
    the targets are the same tensors in the same places, and neither Python nor torch counts another reference to one of
    them or to its memory, because then nothing new can share it.
    """

    def __init__(self, tasks: Sequence[TensorTask], architecture: Architecture, preset: Preset | None) -> None:
        self._tasks, self._architecture, self._preset = tasks, architecture, preset
        self._layouts: tuple[_ModelLayout, ...] = ()
        self._known: tuple[_KnownModel, ...] = ()

    def find(
        self, model: Model, on_new_model: Callable[[Sequence[LoadedTensor]], None]
    ) -> tuple[list[torch.Tensor], WrittenTensors]:
        """The model's own tensor for every target, and the record to update once they are written.

        `on_new_model` gets the entries of a model that is new, after its checks. Raises RequestError, MismatchError.
        """
        known = next((known for known in self._known if known.model == id(model)), None)
        found = None if known is None else known.places(model)
        if known is not None and found is not None and _state(found) == known.state:
            return found, known.record
        del found  # it refers to each tensor, and references are counted below
        targets, record = self._find_among_all(model, on_new_model)
        if _STORAGE_USES is not None:
            known = _KnownModel(id(model), places_of(model, targets), _state(targets), record)
            others = [other for other in self._known if other.model != id(model)]
            self._known = (known, *others[: MAX_LAYOUTS - 1])
        return targets, record

    def _find_among_all(
        self, model: Model, on_new_model: Callable[[Sequence[LoadedTensor]], None]
    ) -> tuple[list[torch.Tensor], WrittenTensors]:
        """Like `find`, but by the addresses of all tensors of the model."""
        tensors = list(_tensors_of(model)) if isinstance(model, (torch.nn.Module, Mapping)) else []
        addresses = tuple(map(_address, tensors))
        for layout in self._layouts:
            if layout.addresses == addresses:
                targets = [tensors[position] for position in layout.positions]
                if tuple(map(_kind, targets)) == layout.kinds:
                    return targets, layout.record
        entries = entries_of("model", model, self._architecture)
        if self._preset is None:
            entries = without_tied_output(entries, self._architecture)
        targets = self._check_model(model, entries)
        position_of = {id(tensor): position for position, tensor in enumerate(tensors)}
        if any(id(tensor) not in position_of for tensor in targets):
            raise RequestError(
                f"model: a {type(model).__name__} makes its tensors when it is asked for them, so that nothing written "
                f"into them would stay; give a dict of tensors"
            )
        on_new_model(entries)
        positions = tuple(position_of[id(tensor)] for tensor in targets)
        layout = _ModelLayout(addresses, tuple(map(_kind, targets)), positions, WrittenTensors(targets))
        self._layouts = (layout, *self._layouts[: MAX_LAYOUTS - 1])
        return targets, layout.record

    def _check_model(self, model: Model, entries: Sequence[LoadedTensor]) -> list[torch.Tensor]:
        model_targets = targets_of("model", model, entries, self._architecture, self._preset)
        targets = {}
        for task in self._tasks:
            name = task.stored.name
            entry = model_targets.get(task.name)
            if entry is None:
                other = tensor_instead_of(entries, task.name)
                instead = "" if other is None else f" of that name, and {other:.300}; give the plain model, with {name}"
                raise MismatchError(
                    f"target tensor {name} of shape {list(task.shape)}: the model holds nothing{instead}"
                )
            tensor = entry.tensor
            if tuple(tensor.shape) != task.shape:
                empty = "; DeepSpeed ZeRO-3 and FSDP leave parameters empty: gather them first"
                raise MismatchError(
                    f"target tensor {name} of shape {list(task.shape)}: the model holds {list(tensor.shape)}"
                    f"{'' if tensor.numel() else empty}"
                )
            if repeats_elements(tensor):
                raise RequestError(
                    f"model: target tensor {entry.stored}: several elements lie in one place (strides "
                    f"{list(tensor.stride())}), as expand() makes them; give the model a copy of its own (contiguous())"
                )
            targets[entry.name] = entry
        require_own_memory(targets, entries)
        return [entry.tensor for entry in targets.values()]


def require_own_memory(targets: Mapping[str, LoadedTensor], entries: Sequence[LoadedTensor]) -> None:
    """Raise RequestError if a target of a model shares memory with another of the model's tensors.

    `targets` has canonical names as keys, `entries` is everything that the model holds.
    """
    others = [entry for entry in entries if entry.name not in targets]
    shared = first_shared(
        [*spans("target", targets.values()), *spans("other", others)], {"target": ("target", "other")}
    )
    if shared is not None:
        raise RequestError(
            f"model: {shared[0]} and {shared[1]} share memory, so that a merge of one would change the other; give the "
            f"target a copy of its own"
        )


def _tensors_of(model: Model) -> Iterator[Any]:
    """Every tensor that a model holds, some twice, in an order that depends only on the model."""
    if isinstance(model, Mapping):
        yield from model.values()
        return
    ids: set[int] = set()
    modules: list[torch.nn.Module | None] = [model]
    while modules:
        module = modules.pop()
        if module is not None and id(module) not in ids:
            ids.add(id(module))
            modules.extend(module._modules.values())
            yield from module._parameters.values()
            yield from module._buffers.values()


def _address(tensor: Any) -> int:
    """Where a tensor's elements begin; -1 for what has no address."""
    try:
        return int(tensor.data_ptr())
    except (AttributeError, RuntimeError):  # not a tensor, or a tensor class that computes its elements
        return -1


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _state(targets: list[torch.Tensor]) -> tuple[Any, ...]:
    """The kinds and addresses of tensors, and the number of references to each and to its memory."""
    references = list(map(sys.getrefcount, targets))
    addresses = list(map(torch.Tensor.data_ptr, targets))
    uses = [_STORAGE_USES(tensor.untyped_storage()._cdata) for tensor in targets]  # type: ignore[misc]
    return references, addresses, uses, list(map(_KIND, targets)), list(map(torch.Tensor.stride, targets))
