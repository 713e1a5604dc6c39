"""Compute scores, geometry and energies from open sources, one tensor at a time in reused buffers.

Scores come from the CPU backend, so they equal those of a merge bit for bit. Quantities that a merge does not compute
(cosines, norms, energies) are summed in float64, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hsa.backends.array_block import TILE
from hsa.backends.base import NotFinite
from hsa.backends.cpu import CpuBackend
from hsa.errors import NonFiniteError
from hsa.methods.geometry import AnyGeometry, Sums, dot, geometry_of, tile_sums
from hsa.methods.tensors import TensorTask
from hsa.planning.equal_sources import equal_pairs
from hsa.planning.file_layout import SLICE_ELEMENTS
from hsa.planning.tasks import COUNTS, Targets
from hsa.planning.tensor_digests import tensor_digest
from hsa.sources.roles import Role, RolePair
from hsa.sources.source_set import Sources
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import ARITHMETIC, STORAGE, Array, size, widen

Step = Callable[[int], None]
"""A callback that is called with the bytes read since its last call."""


@dataclass(frozen=True)
class TargetMeasures:
    """The measures of one target: squared scores, geometry, whether each model's task vector is nonzero, the digest of
    its bytes by role, and the pairs of sources with the same values."""

    squared: tuple[float, ...]
    geometry: AnyGeometry
    moved: tuple[bool, ...]
    digests: Mapping[Role, str]
    equal: frozenset[RolePair]


class Buffers:
    """Reusable memory for the bytes of one tensor of each source. It grows to the largest tensor; `nbytes` is its
    size."""

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}

    def take(self, key: str, nbytes: int) -> Array:
        """An uninitialized uint8 array of that length. It reuses the memory of the last array of the same key."""
        array = self._arrays.get(key)
        if array is None or array.size < nbytes:
            self._arrays.pop(key, None)
            array = self._arrays[key] = np.empty(nbytes, np.uint8)
        return array[:nbytes]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())


def measure(sources: Sources, targets: Targets, buffers: Buffers, step: Step) -> Iterator[TargetMeasures]:
    """Read, score and measure each target in order. Raises NonFiniteError, SourceChanged, MachineError."""
    worker = CpuBackend().worker(targets.method, targets.settings)
    for task in targets.tasks:
        raw: dict[Role, Array] = {}
        digests: dict[Role, str] = {}
        for role, ref in task.sources.items():
            raw[role] = buffers.take(role, ref.nbytes)
            sources.of(role).read_into(ref, raw[role].data)
            digests[role] = tensor_digest(task, role, raw[role])
            step(ref.nbytes)
        try:
            scored = worker.measure(task, raw)
        except NotFinite as error:
            raise _not_finite(error, task, sources) from None
        yield TargetMeasures(scored.squared, geometry(task, raw), scored.differ, digests, equal_pairs(task, raw))


def geometry(task: TensorTask, raw: Mapping[Role, Array]) -> AnyGeometry:
    """Norms and products of a target's task vectors. `raw` holds the tensors' bytes, uint8."""
    codes = {role: ref.code for role, ref in task.sources.items()}
    views = {role: raw[role].view(STORAGE[code]).reshape(task.matrix) for role, code in codes.items()}
    heads: list[list[Sums]] = []
    for head in range(task.partition.groups):
        heads.append([])
        for block in task.blocks(head, TILE):
            b, *models = (_float64(code, views[role][block]) for role, code in codes.items())
            heads[-1].append(tile_sums(b, *(np.subtract(model, b, out=model) for model in models)))
    return geometry_of(heads, len(codes) - 1)


@dataclass
class OtherTensors:
    """Squared L2 norms of a task vector outside the targets, by stack and kind, and the skipped tensors, which have no
    norm."""

    groups: dict[str, float]
    skipped: list[str]


def measure_other_tensors(
    sources: Sources, inside: Container[str], buffers: Buffers, step: Step
) -> dict[Role, OtherTensors]:
    """Stream every tensor whose canonical name is not in `inside`, in slices. Base is read once for all fine-tunes.

    Raises SourceChanged, MachineError.
    """
    by_role: dict[Role, OtherTensors] = {role: OtherTensors({}, []) for role in sources.models}
    names = dict.fromkeys(name for role in by_role for name in sources.of(role).tensors if name not in inside)
    for name in names:
        base = sources.base_checkpoint.tensors.get(name)
        fits: list[Role] = []
        for role, result in by_role.items():
            ref = sources.of(role).tensors.get(name)
            if ref is None:
                continue
            if base is None or ref.shape != base.shape or not {ref.code, base.code} <= set(ARITHMETIC):
                result.skipped.append(name)
            else:
                fits.append(role)
        if base is None or not fits:
            continue
        squares = _squared_norms(sources, name, base, fits, buffers, step)
        group = " ".join(sources.architecture.group_of(name))
        for role in fits:
            if math.isfinite(squares[role]):
                by_role[role].groups[group] = by_role[role].groups.get(group, 0.0) + squares[role]
            else:
                by_role[role].skipped.append(name)
    return by_role


def bytes_of_other_tensors(sources: Sources, targets: Sequence[TensorTask]) -> int:
    """The approximate number of bytes that `measure_other_tensors` reads, for a progress bar."""
    inside = {task.name for task in targets}
    return sum(ref.nbytes for source in sources for name, ref in source.tensors.items() if name not in inside)


def _squared_norms(
    sources: Sources, name: str, base: TensorRef, roles: Sequence[Role], buffers: Buffers, step: Step
) -> dict[Role, float]:
    """The squared norm of each task vector of one tensor; NaN or Inf if the tensor holds any."""
    parts: dict[Role, list[float]] = {role: [] for role in roles}
    total = math.prod(base.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, total, SLICE_ELEMENTS):
            count = min(SLICE_ELEMENTS, total - first)
            b = _read(sources, "base", base, first, count, buffers, step)
            for role in roles:
                tv = _read(sources, role, sources.of(role).tensors[name], first, count, buffers, step)
                np.subtract(tv, b, out=tv)
                parts[role].append(_square(tv))
    return {role: math.fsum(part) if all(map(math.isfinite, part)) else math.nan for role, part in parts.items()}


def _read(sources: Sources, role: Role, ref: TensorRef, first: int, count: int, buffers: Buffers, step: Step) -> Array:
    """Read elements of a tensor as float64."""
    raw = buffers.take(role, count * size(ref.code))
    sources.of(role).read_into(ref, raw.data, first * size(ref.code))
    step(raw.size)
    return _float64(ref.code, raw.view(STORAGE[ref.code]))


def _float64(code: str, raw: Array) -> Array:
    """The elements widened exactly, in new memory."""
    wide: Array = widen(code, raw, np.empty(raw.shape, np.float32)).astype(np.float64)
    return wide


def _square(values: Array) -> float:
    row = values[np.newaxis]
    return dot(row, row)


def _not_finite(error: NotFinite, task: TensorTask, sources: Sources) -> NonFiniteError:
    head = "" if error.group is None else f", head {error.group}"
    if error.role is not None:
        ref = task.sources[error.role]
        where = f"{sources.of(error.role).file_of(ref)}: tensor {ref.name}{head} holds NaN or Inf"
        return NonFiniteError(f"{where}; no merge with it is possible, use a sound checkpoint")
    ref = task.sources[task.anchor]
    return NonFiniteError(
        f"{sources.anchor_checkpoint.file_of(ref)}: tensor {ref.name}{head}: its task vectors overflow float32; "
        f"do the {COUNTS[len(sources.roles)]} belong together?"
    )
