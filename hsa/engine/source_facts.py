"""Facts about a tensor's sources, collected while its slices are read: their digests, and which hold equal values."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from hsa.methods.tensors import TensorTask
from hsa.planning.equal_sources import all_equal, equal_pairs
from hsa.planning.file_layout import Computed
from hsa.planning.tensor_digests import digest_of_parts
from hsa.sources.roles import Role, RolePair
from hsa.system.dtypes import Array, size


class SourceFacts:
    """Facts about the sources of one tensor; threads may add its slices in any order."""

    def __init__(self, task: TensorTask) -> None:
        self._task = task
        self._digests = {role: digest_of_parts(task, role) for role in task.sources}
        self._equal: frozenset[RolePair] | None = None
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    def add(self, piece: Computed, buffers: Mapping[Role, Array]) -> None:
        """Digest and compare a slice of every source (uint8). A slice that was already added is ignored."""
        with self._lock:
            if piece.first in self._seen:
                return
            self._seen.add(piece.first)
        for role, buffer in buffers.items():
            self._digests[role].add(piece.first * size(self._task.sources[role].code), buffer.data)
        pairs = equal_pairs(self._task, buffers)
        with self._lock:
            self._equal = pairs if self._equal is None else self._equal & pairs

    @property
    def equal(self) -> frozenset[RolePair]:
        """The pairs of sources that hold equal values in all slices so far."""
        with self._lock:
            return self._equal or frozenset()

    @property
    def all_equal(self) -> bool:
        """Whether all sources hold equal values in all slices so far."""
        return all_equal(self._task, self.equal)

    def digests(self) -> dict[Role, str]:
        """The digest of the tensor by role, once all slices have been added."""
        return {role: digest.hexdigest() for role, digest in self._digests.items()}
