"""Checks of an output's tensors against its config and its provenance.

A damaged output raises no exception here: each check yields one line for each fault.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from hsa.architectures.base import PRESETS, TensorPlace
from hsa.errors import HsaError
from hsa.outputs.record import Record
from hsa.outputs.record_checks import listed_treatment, settings_of_record
from hsa.sources import structure
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import ARITHMETIC, STORAGE, all_finite, first_not_finite

STEP = 1 << 20
"""Bytes of an output that each thread holds in memory at a time."""


def structure_faults(checkpoint: Checkpoint) -> Iterator[str]:
    """Differences between the tensors and those that the config promises: names, shapes and element types."""
    for name, stored in itertools.islice(checkpoint.renamed.items(), 1):
        yield f"{len(checkpoint.renamed)} tensors have names that no loader finds, such as {stored:.300} for {name}"
    yield from (fault.what for fault in structure.faults(checkpoint))


def merged_tensors(
    checkpoint: Checkpoint, record: Record | None
) -> Iterator[tuple[TensorRef, TensorPlace | None, int]]:
    """The tensors that a merge made or could have made, each with its place and number of heads.

    These are the tensors that the method lists, or every attention projection if there is no usable record.
    """
    family, settings = checkpoint.architecture, None
    if record is not None:
        with suppress(HsaError):  # the checks of the record have reported it already
            settings = settings_of_record(record)
    heads = family.counts(checkpoint.config, checkpoint.role).heads
    own = getattr(settings, "num_heads", None)
    for name, ref in checkpoint.tensors.items():
        place = family.place(name)
        if record is not None and settings is not None:
            listed = listed_treatment(record.method, settings, name, ref, family) is not None
        else:
            listed = place is not None and PRESETS[-1] in place.presets
        if listed:
            yield ref, place, 1 if place is None else own or heads[place.stack]


def finite_faults(checkpoint: Checkpoint, place: TensorPlace | None, ref: TensorRef, heads: int) -> Iterator[str]:
    """A line if a target tensor holds NaN or Inf, with the head of the first such element, or if its dtype is not one
    that merges compute with."""
    if ref.code not in ARITHMETIC:
        yield f"target tensor {ref.name} has dtype {ref.code}, expected one of {', '.join(ARITHMETIC)}"
        return
    buffer = np.empty(min(STEP, ref.nbytes), dtype=np.uint8)
    for start in range(0, ref.nbytes, STEP):
        piece = buffer[: min(STEP, ref.nbytes - start)]
        checkpoint.read_into(ref, piece.data, start)
        values = piece.view(STORAGE[ref.code])
        if not all_finite(ref.code, values):
            element = start // values.itemsize + first_not_finite(ref.code, values)
            head = "" if place is None else head_text(place, ref.shape, heads, element)
            yield f"target tensor {ref.name}{head} holds NaN or Inf, first in element {element}"
            return


def head_text(projection: TensorPlace, shape: tuple[int, ...], heads: int, element: int) -> str:
    """`, head N` with the head that owns an element; empty if the tensor cannot be split into that many heads."""
    if len(shape) <= projection.head_axis or shape[projection.head_axis] % heads or heads > shape[projection.head_axis]:
        return ""
    index = np.unravel_index(element, shape)[projection.head_axis]
    return f", head {int(index) // (shape[projection.head_axis] // heads)}"
