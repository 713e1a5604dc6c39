"""Find tensors that share memory with one another, or whose own elements do."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from hsa.actions.merger.loaded_models import LoadedTensor, has_addresses
from hsa.system.dtypes import Array


@dataclass(frozen=True)
class Span:
    """A named tensor of a group, and its range of addresses on its device: from its first byte to one past its last."""

    device: str
    start: int
    stop: int
    group: str
    name: str
    tensor: torch.Tensor


def spans(group: str, entries: Iterable[LoadedTensor]) -> Iterator[Span]:
    """The spans of tensors that have elements at addresses; others are left out."""
    for name, _, tensor in entries:
        if has_addresses(tensor) and tensor.numel():
            last = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            yield Span(str(tensor.device), start, start + (last + 1) * tensor.element_size(), group, name, tensor)


def first_shared(all_spans: Iterable[Span], apart: Mapping[str, Collection[str]]) -> tuple[str, str] | None:
    """The names of two tensors that share memory though their groups must not; None if there are none.

    `apart` maps a group to the groups that it must not share memory with. Tensors whose elements are interleaved, such
    as column blocks of one matrix, share none.
    """
    pairs = {pair for one, others in apart.items() for other in others for pair in ((one, other), (other, one))}
    earlier: list[Span] = []
    for span in sorted(all_spans, key=lambda span: (span.device, span.start)):
        earlier = [other for other in earlier if other.device == span.device and other.stop > span.start]
        for other in earlier:
            if (other.group, span.group) in pairs and _have_common_elements(other, span):
                return other.name, span.name
        earlier.append(span)
    return None


def repeats_elements(tensor: torch.Tensor) -> bool:
    """Whether several elements may have the same address, as after `expand`: writing one writes the others."""
    reach = 0
    for step, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1 and step <= reach:
            return True
        reach += step * (length - 1)
    return False


def _have_common_elements(one: Span, other: Span) -> bool:
    """Whether overlapping spans have common elements: exact for elements of the same size and alignment, else True."""
    size = one.tensor.element_size()
    if other.tensor.element_size() != size or (one.start - other.start) % size:
        return True
    if _dense(one) and _dense(other):
        return True
    return bool(np.isin(_places(one, size), _places(other, size)).any())


def _dense(span: Span) -> bool:
    return span.stop - span.start == span.tensor.numel() * span.tensor.element_size()


def _places(span: Span, size: int) -> Array:
    """The address of every element, counted in elements from address 0: int64, of the tensor's shape."""
    places: Array = np.array(span.start // size, np.int64)
    for length, step in zip(span.tensor.shape, span.tensor.stride(), strict=True):
        places = places[..., None] + np.arange(length, dtype=np.int64) * step
    return places
