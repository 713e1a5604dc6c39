"""Tensors of checkpoints that several `Merger`s of the same sources share, each in memory once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hsa.sources.checkpoint import Checkpoint
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import ARITHMETIC, Array


class SharedTensors:
    """The bytes of checkpoints' tensors, uint8, read once and then shared. Nobody may write to them.

    A checkpoint is identified by its files as they were when it was opened, whatever its role: a file that has changed
    since counts as another one.

    Example:
        >>> shared = SharedTensors()
        >>> mergers = [hsa.Merger.sharing(shared, method=each, models=models) for each in ("linear", "karcher")]
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Array] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tensors take."""
        return sum(data.nbytes for data in self._kept.values())

    def read(self, checkpoint: Checkpoint, name: str, ref: TensorRef) -> Array:
        """The bytes of a tensor by its canonical name. Raises what reading raises."""
        key = (_files_of(checkpoint), name)
        if key not in self._kept:
            data = np.empty(ref.nbytes, np.uint8)
            checkpoint.read_into(ref, data.data)
            self._kept[key] = data
        return self._kept[key]

    def read_all(self, checkpoint: Checkpoint) -> Mapping[str, Array]:
        """The bytes of every tensor that a merge can compute with, by canonical name."""
        return {
            name: self.read(checkpoint, name, ref) for name, ref in checkpoint.tensors.items() if ref.code in ARITHMETIC
        }


def _files_of(checkpoint: Checkpoint) -> tuple[object, ...]:
    base = getattr(checkpoint, "base", None)  # an adapter's tensors are base's with the adapter applied
    files = [(shard.source.path, shard.source.fingerprint) for shard in checkpoint.shards]
    return (checkpoint.path, *files, *(() if base is None else _files_of(base)))
