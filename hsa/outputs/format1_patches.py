"""Patches of format 1, which hsa 0.1.0 wrote: their decisions are stored in two tensors beside the rows.

hsa.selected   uint8 [heads of all targets]         1 where a head is selected
hsa.scores     float64 [heads of all targets]       squared saliency scores
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hsa.architectures.base import Partition
from hsa.architectures.registry import named
from hsa.errors import shown
from hsa.methods.hsa_decision import HsaDecision
from hsa.methods.hsa_formula import rounded_pair
from hsa.methods.selection import MAX_SCORE, select, selection_of
from hsa.methods.tensors import TensorRecord
from hsa.outputs import format1
from hsa.outputs.provenance import parse_record as parse_whole_record
from hsa.outputs.record import Record
from hsa.sources.safetensors import TensorEntry

SCORES, SELECTED = "hsa.scores", "hsa.selected"

Read = Callable[[TensorEntry], bytes]
"""Returns the bytes of a tensor of the file."""


def record_document(record: Record) -> dict[str, Any]:
    """The part of a patch's document that describes its record."""
    targets = {
        target.name: [target.partition.groups, target.decision.keep, target.decision.coefficient]
        for target in record.targets
    }
    return {**record.as_dict(), "targets": targets}


def extra_tensors(targets: Sequence[TensorRecord]) -> list[tuple[str, str, tuple[int, ...]]]:
    """The name, dtype and shape of the tensors that store the decisions."""
    total = sum(target.partition.groups for target in targets)
    return [(SCORES, "U8", (total, 8)), (SELECTED, "U8", (total,))]


def parse_record(document: Mapping[str, Any], entries: Mapping[str, TensorEntry], read: Read) -> Record:
    """Parse the record in the document of a patch, with the decisions stored in its tensors.

    Raises KeyError, TypeError, ValueError or AttributeError if an entry is missing or invalid.
    """
    record = parse_whole_record({**document, "targets": {}})
    targets = document["targets"]
    if not isinstance(targets, dict) or not targets or not isinstance(document["files"], dict):
        raise TypeError("targets and files must be objects, and targets not empty")
    planned = [_target(name, entry, entries.get(name)) for name, entry in targets.items()]
    scores, flags = read(entries[SCORES]), read(entries[SELECTED])
    values = np.frombuffer(scores, dtype="<f8").tolist()
    total = sum(target.partition.groups for target in planned)
    if not len(values) == len(flags) == total:
        raise ValueError(f"{SCORES} and {SELECTED} must have an element for each of {total} heads")
    if not all(value >= 0 and math.sqrt(value) < MAX_SCORE for value in values) or not set(flags) <= {0, 1}:
        raise ValueError(
            f"{SCORES} must hold numbers of at least 0 whose roots are below {MAX_SCORE:g}, and {SELECTED} 0 and 1"
        )
    decided, first = [], 0
    for target in planned:
        span = slice(first, first + target.partition.groups)
        decided.append(_decided(target, tuple(values[span]), flags[span]))
        first = span.stop
    return record.with_targets(decided)


def _decided(target: TensorRecord, squared: tuple[float, ...], flags: bytes) -> TensorRecord:
    """A target with its decision. `target.decision` is the number of heads to merge, and lambda_i."""
    keep, coefficient = target.decision
    selected = tuple(head for head, flag in enumerate(flags) if flag)
    if select(squared, keep).selected != selected:
        raise ValueError(f"the heads selected in {target.name} do not follow from its scores")
    decision = HsaDecision(keep, coefficient, rounded_pair(coefficient), 1.0, selection_of(squared, selected))
    return TensorRecord(
        target.name, target.canonical, target.place, target.shape, target.code, target.partition, decision
    )


def _target(name: str, entry: Any, rows: TensorEntry | None) -> TensorRecord:
    place = named(format1.ARCHITECTURE).place(name)
    if place is None or rows is None:
        raise ValueError(f"{shown(name, 120)} is no attention projection with rows in the file")
    if not isinstance(entry, list) or len(entry) != 3:
        raise ValueError(f"{name}: expected heads, heads to keep and lambda_i, found {shown(entry)}")
    heads, keep, coefficient = entry
    for number in (heads, keep):
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{name}: {shown(number, 40)} is no number of heads")
    if not 1 <= heads <= 1 << 20 or not 0 <= keep <= heads:
        raise ValueError(f"{name}: {shown(keep, 40)} of {shown(heads, 40)} heads")
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not 0 <= coefficient <= 1:
        raise ValueError(f"{name}: lambda_i is {shown(coefficient, 40)}")
    rank = 3 if place.part == "weight" else 2
    if len(rows.shape) != rank:
        raise ValueError(f"{name}: its rows have shape {list(rows.shape)}")
    if place.head_axis == 1:
        shape: tuple[int, ...] = (rows.shape[0], heads * rows.shape[2])
    else:
        shape = (heads * rows.shape[1], *rows.shape[2:])
    partition = Partition(place.head_axis, heads)
    return TensorRecord(name, place.name, place, shape, rows.code, partition, (keep, float(coefficient)))
