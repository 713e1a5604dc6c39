"""Which tensors of this process still hold what a merge wrote, so that a merge is not taken for a source unnoticed.

A tensor counts as long as its version is the one after the writing: torch raises it with every change in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.utils.weak import WeakIdKeyDictionary


class WrittenTensors:
    """The tensors that one `Merger` writes in one model, and their versions after the last time."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._versions: list[int | None] = [None] * len(tensors)
        for number, tensor in enumerate(tensors):
            _RECORDS[tensor] = (self, number)

    def renew(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note that these tensors were written just now, in the order of the first time."""
        self._versions = [_version(tensor) for tensor in tensors]

    def holds(self, number: int, tensor: torch.Tensor) -> bool:
        version = self._versions[number]
        return version is not None and version == _version(tensor)


def holds_a_merge(tensor: torch.Tensor) -> bool:
    """Whether a merge was written into this very tensor, and nothing since."""
    record, number = _RECORDS.get(tensor, (None, 0))  # type: ignore[no-untyped-call]
    return record is not None and record.holds(number, tensor)


def forget(tensors: Iterable[torch.Tensor]) -> None:
    """Take what these tensors hold for values like any others."""
    for tensor in tensors:
        _RECORDS.pop(tensor, None)  # type: ignore[no-untyped-call]


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


_RECORDS = WeakIdKeyDictionary()
