"""A spot check that a loaded model's other tensors are primary's, by a few elements of each.

`hsa.Merger` writes only the targets of a model, so the result is the merge only if the rest of the model is primary's.
The first `ELEMENTS` elements of the middle row of every tensor are compared: about 1100 small reads of primary for
large-v3. A model that differs only elsewhere is not noticed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from hsa.actions.merger.loaded_models import LoadedTensor, has_addresses
from hsa.sources.checkpoint import Checkpoint
from hsa.system.dtypes import NAMES, size

ELEMENTS = 32
"""The number of elements compared in each tensor. Fine-tuning moves nearly every element of a tensor that it trains."""


@dataclass(frozen=True)
class Sample:
    """The shape of a tensor, and elements of its middle row on the CPU, one-dimensional."""

    shape: tuple[int, ...]
    values: torch.Tensor


@dataclass(frozen=True)
class SpotDifference:
    """How a model's other tensors differ from primary's: the first tensor's name and its difference, how many tensors
    differ, and how many were compared."""

    name: str
    how: str
    count: int
    compared: int


def sample_checkpoint(checkpoint: Checkpoint, targets: Collection[str]) -> dict[str, Sample]:
    """Samples of the tensors that are not targets, by canonical name, in the order of the files. Raises SourceError."""
    samples = {}
    for name, ref in sorted(checkpoint.tensors.items(), key=lambda item: (item[1].shard, item[1].offset)):
        if name in targets or ref.code not in NAMES or 0 in ref.shape:
            continue
        row = 0
        for length in ref.shape[:-1]:
            row = row * length + length // 2
        width = ref.shape[-1] if ref.shape else 1
        buffer = bytearray(min(ELEMENTS, width) * size(ref.code))
        checkpoint.read_into(ref, memoryview(buffer), row * width * size(ref.code))
        samples[name] = Sample(ref.shape, torch.frombuffer(buffer, dtype=getattr(torch, NAMES[ref.code])))
    return samples


def sample_model(entries: Iterable[LoadedTensor], targets: Collection[str]) -> dict[str, Sample]:
    """Samples of a loaded model's tensors that are not targets, without integers and tensors that have no data in
    memory."""
    shapes: dict[str, tuple[int, ...]] = {}
    rows_by_kind: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}
    for _, name, tensor in entries:
        if name in targets or name in shapes or not has_addresses(tensor):
            continue
        if tensor.is_floating_point() and tensor.numel():
            shapes[name] = tuple(tensor.shape)
            row = tensor.detach()[tuple(length // 2 for length in tensor.shape[:-1])]
            rows_by_kind.setdefault((tensor.device, tensor.dtype), {})[name] = row.reshape(-1)[:ELEMENTS]
    samples = {}
    for rows in rows_by_kind.values():  # one copy from a device, not one for each tensor
        values_of_rows = torch.cat(list(rows.values())).cpu()
        values = torch.split(values_of_rows, [len(row) for row in rows.values()])
        samples.update({name: Sample(shapes[name], part) for name, part in zip(rows, values, strict=True)})
    return samples


@torch.no_grad()
def differing_tensors(primary: Mapping[str, Sample], model: Mapping[str, Sample]) -> SpotDifference | None:
    """How the model differs from primary, whose values are rounded to the model's dtypes; None where it does not."""
    common = [name for name in primary if name in model]
    differing = [(name, how) for name in common if (how := _difference(primary[name], model[name])) is not None]
    return SpotDifference(*differing[0], len(differing), len(common)) if differing else None


def _difference(primary: Sample, model: Sample) -> str | None:
    if primary.shape != model.shape:
        return f"has shape {list(model.shape)}, primary's {list(primary.shape)}"
    ours, theirs = primary.values.to(model.values.dtype), model.values
    return (
        None
        if torch.equal(ours, theirs) or bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())
        else "differs"
    )
