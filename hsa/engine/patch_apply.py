"""Write the rows of a patch into the anchor's tensors; the pipeline copies everything else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hsa.backends.base import runs
from hsa.engine.compute import Computation
from hsa.errors import NonFiniteError
from hsa.methods.tensors import TensorTask
from hsa.outputs.patch_reader import not_finite_rows
from hsa.planning.file_layout import Computed
from hsa.sources.checkpoint import Checkpoint
from hsa.system.digests import digest_of
from hsa.system.dtypes import STORAGE, Array, all_finite, first_not_finite, size
from hsa.system.fsio import SourceFile


@dataclass(frozen=True)
class PatchRows:
    """The rows (columns) of a tensor's touched groups in a patch: one group after another from byte `start` on."""

    groups: tuple[int, ...]
    start: int


class PatchApplier:
    """The state shared by the threads of a run: the anchor, the patch, its rows by canonical name, and their digests by
    the tensor's name in the patch."""

    group_bytes = 0

    def __init__(self, anchor: Checkpoint, patch: SourceFile, rows: Mapping[str, PatchRows]) -> None:
        self.anchor, self.patch, self.rows = anchor, patch, rows
        self.digests: dict[str, str] = {}
        self._lock = threading.Lock()

    def thread(self) -> PatchApplier:
        return self

    def reserve(self, contents: Sequence[Computed]) -> Callable[[], None]:
        """Reserve nothing: a thread holds only one tensor."""
        return lambda: None

    def compute(self, contents: Sequence[Computed]) -> list[Computation]:
        """Put the rows of a patch into one tensor.

        Raises PatchError or NonFiniteError where rows of the patch or of the anchor hold NaN or Inf; SourceChanged,
        MachineError.
        """
        (content,) = contents
        task = content.task
        data = np.empty(content.nbytes, np.uint8)
        self.anchor.read_into(task.sources[task.anchor], data.data)
        put = self._put_rows if task.partition.axis == 0 else self._put_columns
        digest, ranges = put(task, data)
        self._check_finite(task, data)
        with self._lock:
            self.digests[task.stored.name] = digest
        return [Computation(data, ranges)]

    def _check_finite(self, task: TensorTask, data: Array) -> None:
        ref = task.sources[task.anchor]
        values = data.view(STORAGE[ref.code])
        if all_finite(ref.code, values):
            return
        place = np.unravel_index(first_not_finite(ref.code, values), ref.shape)[task.partition.axis]
        head = int(place) // task.group_size
        if head in self.rows[task.name].groups:
            raise not_finite_rows(self.patch, ref.name, head)
        raise NonFiniteError(
            f"{self.anchor.file_of(ref)}: tensor {ref.name}, head {head} holds NaN or Inf; no merge with it is "
            f"possible, use a sound checkpoint"
        )

    def give_back(self, buffer: Array) -> None:
        """Do nothing: buffers are not reused for other tensors."""

    def _put_rows(self, task: TensorTask, data: Array) -> tuple[str, tuple[tuple[int, int], ...]]:
        from blake3 import blake3

        rows, step = self.rows[task.name], data.nbytes // task.partition.groups
        hasher, place, ranges = blake3(), rows.start, []
        for first, last in runs(rows.groups):
            start, stop = first * step, (last + 1) * step
            self.patch.read_into(data[start:stop].data, place)
            hasher.update(data[start:stop].data)
            place += stop - start
            ranges.append((start, stop))
        return hasher.hexdigest(), tuple(ranges)

    def _put_columns(self, task: TensorTask, data: Array) -> tuple[str, tuple[tuple[int, int], ...]]:
        rows, width = self.rows[task.name], task.group_size * size(task.out_code)
        columns = np.empty((task.matrix[0], len(rows.groups), width), np.uint8)
        flat = columns.reshape(-1)
        self.patch.read_into(flat.data, rows.start)
        data.reshape(task.matrix[0], -1, width)[:, list(rows.groups)] = columns
        return digest_of(flat.data), ((0, data.nbytes),) if rows.groups else ()
