"""Blocks of tensors that are numpy arrays in memory, and the scratch memory that a worker computes them in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from hsa.backends.kept_values import KeptValues
from hsa.methods.base import BASE, Block
from hsa.methods.tensors import TensorTask
from hsa.system.dtypes import Array, Arrays, Float32, widen

TILE = 1 << 17
"""The most elements of a block; a head of any Whisper size is one block. The scratch memory of several MiB exceeds a
core's L2 cache, but threads switch the GIL a quarter as often as with blocks that fit. On two cores, a merge of
large-v3 tensors takes two thirds of the time."""

MAX_VIEWS = 64
"""The most views of scratch memory that are cached."""

Place = tuple[slice, slice]


class Scratch:
    """Buffers by their use, each allocated when it is first requested, and again for a larger block.

    Views are cached by shape; a tensor has two or three shapes.
    """

    def __init__(self) -> None:
        self._buffers: dict[object, Array] = {}
        self._views: dict[tuple[object, tuple[int, int]], Array] = {}

    def get(self, use: object, shape: tuple[int, int], dtype: Any = np.float32) -> Array:
        """Memory of a shape; requests with the same `use` share it."""
        view = self._views.get((use, shape))
        return self._make(use, shape, dtype) if view is None else view

    def _make(self, use: object, shape: tuple[int, int], dtype: Any) -> Array:
        elements = shape[0] * shape[1]
        buffer = self._buffers.get(use)
        if buffer is None or buffer.size < elements:
            self._views.clear()  # they would keep the smaller buffer alive
            buffer = self._buffers[use] = np.empty(max(elements, TILE), dtype)
        if len(self._views) >= MAX_VIEWS:
            self._views.clear()
        view = self._views[use, shape] = buffer[:elements].reshape(shape)
        return view


class ArrayBlock(Block):
    """A block of arrays in memory.

    `views` are the tensors of all sources as matrices, in their own element types. `shared` says that several decisions
    use the block's task vectors. `values` caches computed values; None for no cache.
    """

    def __init__(
        self,
        scratch: Scratch,
        task: TensorTask,
        views: Mapping[str, Array],
        origin: int = 0,
        *,
        shared: bool = False,
        values: KeptValues | None = None,
    ) -> None:
        self._scratch, self.task, self._views, self._origin = scratch, task, views, origin
        self._columns = next(iter(views.values())).shape[1]
        self.group = self.first = 0
        self.shape: tuple[int, int] = (0, 0)
        self._place: Place = (slice(0), slice(0))
        self._computed: dict[object, Float32] = {}
        self._room = "room" if shared else "task vector"
        self._values = values

    def move(self, group: int, place: Place) -> ArrayBlock:
        """Move the block to a place in a group; what was computed for the previous place is forgotten."""
        rows, columns = place
        self.group, self._place = group, place
        self.first = self._origin + rows.start * self._columns + columns.start
        self.shape = (rows.stop - rows.start, columns.stop - columns.start)
        self._computed.clear()
        return self

    def raw(self, role: str) -> Array:
        """The source's elements as they are stored."""
        part: Array = self._views[role][self._place]
        return part

    def weights(self, role: str) -> Float32:
        weights = self._computed.get(role)
        if weights is None:
            code, raw = self.task.sources[role].code, self.raw(role)
            weights = raw if code == "F32" else widen(code, raw, self._scratch.get(("weights", role), self.shape))
            self._computed[role] = weights
        return weights

    def task_vector(self, role: str) -> Float32:
        key = ("task vector", role)
        vector = self._computed.get(key)
        if vector is None:
            out = self._scratch.get(key, self.shape)
            weights = self._computed.get(role)
            if weights is None:  # widened in the vector's own memory, to need no other
                weights = widen(self.task.sources[role].code, self.raw(role), out)
            vector = self._computed[key] = np.subtract(weights, self.weights(BASE), out=out)
        return vector

    def room(self, role: str) -> Float32:
        return self._scratch.get((self._room, role), self.shape)

    def kept(self, key: Hashable, make: Callable[[], Arrays]) -> Arrays:
        if self._values is None:
            return make()
        return self._values.of((self.task.name, self.group, self.first, key), make)

    def spare(self) -> Float32:
        """The room of the first model that has one, used for a result that is written last."""
        return self.room(self.models[0])

    def wide(self) -> Array:
        return self._scratch.get("wide", self.shape, np.float64)
