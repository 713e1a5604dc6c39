"""Detect that a loaded model was already merged, so that merged values are not mistaken for a source's.

There are two signs of it, at different costs:

- Versions: a tensor counts as merged while its version is the one right after the write; torch increments the version
  with every in-place change. This costs nothing, so `hsa.Merger` records it at each `apply_`. Copies of a tensor do not
  have it.
- Values: some of the merged values, stored on the modules. They survive a copy or cast of the model, but checking them
  reads every target, so `hsa_merge_`, which merges a model once, stores them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from hsa.actions.merger.loaded_models import LoadedTensor

_MARK = "_hsa_merged"
"""Attribute of a module whose weight or bias was merged: some of the merged values, by the parameter's name."""

_MARKED_ELEMENTS = 256
"""The number of elements stored of each tensor, spread over all of its heads."""


class WrittenTensors:
    """The tensors that one `Merger` writes in one model, and their versions after the last write."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._versions: list[int | None] = [None] * len(tensors)
        for number, tensor in enumerate(tensors):
            _RECORDS[tensor] = (self, number)

    def update(self, tensors: Sequence[torch.Tensor]) -> None:
        """Record the versions of these tensors, which were just written, in the order given to the constructor."""
        self._versions = [_version(tensor) for tensor in tensors]

    def holds(self, number: int, tensor: torch.Tensor) -> bool:
        version = self._versions[number]
        return version is not None and version == _version(tensor)


def holds_a_merge(tensor: torch.Tensor) -> bool:
    """Whether a merge was written into this very tensor, and nothing since."""
    record, number = _RECORDS.get(tensor, (None, 0))  # type: ignore[no-untyped-call]
    return record is not None and record.holds(number, tensor)


def forget(tensors: Iterable[torch.Tensor]) -> None:
    """Treat the values in these tensors as not merged."""
    for tensor in tensors:
        _RECORDS.pop(tensor, None)  # type: ignore[no-untyped-call]


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


_RECORDS = WeakIdKeyDictionary()


def mark_modules(
    model: torch.nn.Module, targets: Mapping[str, LoadedTensor], original_values: Mapping[str, torch.Tensor]
) -> None:
    """Store some merged values of each target on its module; none if they equal the `original_values` by name."""
    for stored, _, tensor in targets.values():
        module, _, part = stored.rpartition(".")
        values, owner = some_values(tensor), model.get_submodule(module)
        marks: dict[str, Any] = {**getattr(owner, _MARK, {}), part: values}
        if torch.equal(values, original_values[stored]):
            del marks[part]
        setattr(owner, _MARK, marks)


def find_marked(model: torch.nn.Module, targets: Mapping[str, LoadedTensor]) -> str | None:
    """The name of the first target that still holds the values that `mark_modules` stored; None if there is none."""
    for stored, _, tensor in targets.values():
        module, _, part = stored.rpartition(".")
        merged = getattr(model.get_submodule(module), _MARK, {}).get(part)
        if merged is None or merged.numel() != some_values(tensor).numel():
            continue
        if torch.equal(merged.to(tensor.dtype), some_values(tensor)):
            return stored
    return None


def some_values(tensor: torch.Tensor) -> torch.Tensor:
    """Copies of elements from all over a tensor, on the CPU."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // _MARKED_ELEMENTS)].to("cpu", copy=True)
