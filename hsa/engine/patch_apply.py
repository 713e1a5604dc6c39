"""Putting the rows of a patch into primary's tensors, for the pipeline that copies everything else."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from hsa.engine.compute import Computation
from hsa.errors import NonFiniteError
from hsa.outputs.patch_reader import not_finite_rows
from hsa.planning.file_layout import Computed, Patched
from hsa.sources.checkpoint import Checkpoint
from hsa.system.digests import digest_of
from hsa.system.dtypes import STORAGE, Array, all_finite, first_not_finite
from hsa.system.fsio import SourceFile


class PatchApplier:
    """What the threads of a run share: primary, the patch, and the digest of the rows of each tensor by its name."""

    group_bytes = 0

    def __init__(self, primary: Checkpoint, patch: SourceFile) -> None:
        self.primary, self.patch = primary, patch
        self.digests: dict[str, str] = {}
        self._lock = threading.Lock()

    def thread(self) -> PatchApplier:
        return self

    def compute(self, contents: Sequence[Computed]) -> list[Computation]:
        """Put the rows of a patch into one tensor.

        Raises PatchError or NonFiniteError where rows of the patch or of primary hold NaN or Inf; SourceChanged,
        MachineError.
        """
        (content,) = contents
        assert isinstance(content, Patched)
        data = np.empty(content.nbytes, np.uint8)
        self.primary.read_into(content.tensor, data.data)
        digest, ranges = self._put_rows(content, data) if content.head_axis == 0 else self._put_columns(content, data)
        self._check_finite(content, data)
        with self._lock:
            self.digests[content.tensor.name] = digest
        return [Computation(data, ranges)]

    def _check_finite(self, content: Patched, data: Array) -> None:
        ref = content.tensor
        values = data.view(STORAGE[ref.code])
        if all_finite(ref.code, values):
            return
        place = np.unravel_index(first_not_finite(ref.code, values), ref.shape)[content.head_axis]
        head = int(place) // content.head_dim
        if head in content.selected:
            raise not_finite_rows(self.patch, ref.name, head)
        raise NonFiniteError(
            f"{self.primary.file_of(ref)}: tensor {ref.name}, head {head} holds NaN or Inf; no merge with it is "
            f"possible, use a sound checkpoint"
        )

    def give_back(self, buffer: Array) -> None:
        """Nothing is kept for another tensor."""

    def _put_rows(self, content: Patched, data: Array) -> tuple[str, tuple[tuple[int, int], ...]]:
        from blake3 import blake3

        hasher, place, ranges = blake3(), content.start, []
        for first, last in _selected_runs(content.selected):
            start, stop = first * content.width, (last + 1) * content.width
            self.patch.read_into(data[start:stop].data, place)
            hasher.update(data[start:stop].data)
            place += stop - start
            ranges.append((start, stop))
        return hasher.hexdigest(), tuple(ranges)

    def _put_columns(self, content: Patched, data: Array) -> tuple[str, tuple[tuple[int, int], ...]]:
        rows = content.tensor.shape[0]
        columns = np.empty((rows, len(content.selected), content.width), np.uint8)
        flat = columns.reshape(-1)
        self.patch.read_into(flat.data, content.start)
        data.reshape(rows, -1, content.width)[:, list(content.selected)] = columns
        return digest_of(flat.data), ((0, content.nbytes),) if content.selected else ()


def _selected_runs(heads: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbouring heads."""
    if not heads:
        return []
    starts = [heads[0]] + [after for before, after in pairwise(heads) if after != before + 1]
    stops = [before for before, after in pairwise(heads) if after != before + 1] + [heads[-1]]
    return list(zip(starts, stops, strict=True))
