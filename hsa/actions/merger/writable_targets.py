"""Find the target tensors of a model that a merge is written into, and check the model when it is first met."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hsa.actions.merger.already_merged import WrittenTensors
from hsa.actions.merger.loaded_models import LoadedTensor, Model, entries_of, targets_of, tensor_instead_of
from hsa.actions.merger.shared_memory import first_shared, repeats_elements, spans
from hsa.architectures.base import Architecture, Preset
from hsa.errors import MismatchError, RequestError
from hsa.methods.tensors import TensorTask

MAX_LAYOUTS = 4
"""Models whose checks are remembered: a search writes to one again and again."""


@dataclass(frozen=True)
class _ModelLayout:
    """A model as it was checked: the addresses of all its tensors, and its targets: what they are and where."""

    addresses: tuple[int, ...]
    kinds: tuple[tuple[Any, ...], ...]
    positions: tuple[int, ...]
    record: WrittenTensors


class WritableTargets:
    """Finds the tensors to write in a model or state dict.

    A model is checked whole when it is first met, and again when an address of any of its tensors, or a dtype, shape or
    stride of a target, has changed. Otherwise its targets are found by their positions, in a fraction of a millisecond.
    """

    def __init__(self, tasks: Sequence[TensorTask], architecture: Architecture, preset: Preset) -> None:
        self._tasks, self._architecture, self._preset = tasks, architecture, preset
        self._layouts: tuple[_ModelLayout, ...] = ()

    def find(
        self, model: Model, on_new_model: Callable[[Sequence[LoadedTensor]], None]
    ) -> tuple[list[torch.Tensor], WrittenTensors]:
        """The model's own tensor for every target, and the record to renew when they are written.

        `on_new_model` gets the entries of a model that is new, after its checks. Raises RequestError, MismatchError.
        """
        tensors = list(_tensors_of(model)) if isinstance(model, (torch.nn.Module, Mapping)) else []
        addresses = tuple(map(_address, tensors))
        for layout in self._layouts:
            if layout.addresses == addresses:
                targets = [tensors[position] for position in layout.positions]
                if tuple(map(_kind, targets)) == layout.kinds:
                    return targets, layout.record
        entries = entries_of("model", model, self._architecture)
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
    """Raise RequestError where a target of a model shares memory with another tensor of it.

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
    """Every tensor that a model holds, some twice, in an order that depends on nothing else."""
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
    except (AttributeError, RuntimeError):  # no tensor, or a class of tensors that computes its elements
        return -1


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.device
