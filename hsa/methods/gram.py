"""Gram matrices: the products of every two sources of a tensor, in float64 and in a fixed order.

The products of float32 elements are exact in float64. They are added in the order of `hsa.methods.sums`, so a matrix
does not depend on how a tensor is cut. Each row is summed in blocks of 1,024 elements from its own start. Products down
a column are added in pairs of neighbouring rows, then in pairs of pairs, as if the rows were padded with zeros to a
power of two.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hsa.methods.sums import LANES, halved
from hsa.methods.tensors import UNIT

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32

Gram = tuple[tuple[float, ...], ...]
"""The products of every two vectors [N][N]."""

CHUNK = 1 << 18
"""The number of elements of all vectors that are widened at a time: 2 MiB of a thread's memory. Half as many take a
fifth more time, because of numpy's call overhead. Twice as many save a tenth."""


class _Memory(threading.local):
    """A thread's buffers for widened vectors and their products. Allocating fresh memory would cost more than the
    sums."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def array(self, use: str, shape: tuple[int, ...]) -> Array:
        """Uninitialised float64 memory of a shape. Calls for the same use return the same memory."""
        import numpy as np

        size = math.prod(shape)
        buffer = self._buffers.get(use)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[use] = np.empty(size)
        return buffer[:size].reshape(shape)


_memory = _Memory()


class RowRun(NamedTuple):
    """The sums over a run of neighbouring rows: the products of every two vectors, float64 [pairs, columns]. The number
    of rows is a power of two, and the first row's number is a multiple of it."""

    first: int
    length: int
    sums: Array


def pairs_of(count: int) -> list[tuple[int, int]]:
    """Every pair of `count` vectors, also each with itself, in the order in which their products are stored.

    Example:
        >>> pairs_of(2)
        [(0, 0), (0, 1), (1, 1)]
    """
    return [(one, two) for one in range(count) for two in range(one, count)]


def gram_of(entries: Sequence[float], count: int) -> Gram:
    """The matrix of `count` vectors from its entries in the order of `pairs_of`.

    Example:
        >>> gram_of([4.0, 2.0, 9.0], 2)
        ((4.0, 2.0), (2.0, 9.0))
    """
    by_pair = dict(zip(pairs_of(count), entries, strict=True))
    return tuple(tuple(by_pair[min(i, j), max(i, j)] for j in range(count)) for i in range(count))


def row_products(vectors: Sequence[Float32]) -> Array:
    """The products of every two vectors, row by row.

    Args:
        vectors: float32 [rows, columns] each.

    Returns:
        float64 [pairs, rows, blocks]: the sums of each row's blocks of 1,024 elements.

    Example:
        >>> import numpy as np
        >>> ones = np.ones((1, 1500), np.float32)
        >>> row_products([ones, 2 * ones])[1].tolist()
        [[2048.0, 952.0]]
    """
    import numpy as np

    rows, columns = vectors[0].shape
    whole, rest = divmod(columns, UNIT)
    sums: Array = np.empty((len(pairs_of(len(vectors))), rows, whole + (rest > 0)))
    if whole:
        _sum_blocks([vector[:, : whole * UNIT].reshape(rows, whole, UNIT) for vector in vectors], sums[:, :, :whole])
    if rest:
        _sum_blocks([vector[:, None, whole * UNIT :] for vector in vectors], sums[:, :, whole:])
    return sums


def _sum_blocks(vectors: Sequence[Float32], out: Array) -> None:
    """The products over the last axis of float32 [rows, blocks, length], into float64 [pairs, rows, blocks]."""
    rows, blocks, length = vectors[0].shape
    at_once = max(1, CHUNK // (len(vectors) * length))
    for row in range(0, rows, max(1, at_once // blocks)):
        part_rows = slice(row, row + max(1, at_once // blocks))
        for block in range(0, blocks, at_once):
            place = part_rows, slice(block, block + at_once)
            out[:, place[0], place[1]] = _block_products([vector[place] for vector in vectors])


def _block_products(vectors: Sequence[Float32]) -> Array:
    """The products over the last axis of float32 [rows, blocks, length], float64 [pairs, rows, blocks]."""
    import numpy as np

    rows, blocks, length = vectors[0].shape
    pairs = pairs_of(len(vectors))
    lanes = min(LANES, 1 << (length - 1).bit_length())  # zeros in the others would add nothing
    whole, rest = divmod(length, lanes)
    wide = _memory.array("vectors", (len(vectors), whole + (rest > 0), rows, blocks, lanes))
    for each, vector in zip(wide, vectors, strict=True):
        parts = vector[:, :, : whole * lanes].reshape(rows, blocks, whole, lanes)
        each[:whole] = parts.transpose(2, 0, 1, 3)
        if rest:
            each[whole, :, :, :rest] = vector[:, :, whole * lanes :]
            each[whole, :, :, rest:] = 0.0
    # Products are exact, and each sum adds the numbers of a lane one after another.
    columns = wide.reshape(*wide.shape[:2], -1)
    products = _memory.array("products", (len(pairs), columns.shape[2]))
    for (i, j), out in zip(pairs, products, strict=True):
        np.einsum("ne,ne->e", columns[i], columns[j], out=out)
    return halved(np.ascontiguousarray(products.reshape(-1, lanes).T)).reshape(len(pairs), rows, blocks)


def totals(parts: Array) -> Array:
    """The sums of the blocks' sums, float64 [..., blocks], added one after another."""
    import numpy as np

    result: Array = np.zeros(parts.shape[:-1])
    for block in range(parts.shape[-1]):
        result += parts[..., block]
    return result


def column_products(vectors: Sequence[Float32], first: int) -> list[RowRun]:
    """The products of every two vectors, float32 [rows, columns], down each column. `first` is the number of the first
    row in its tensor. `merged_runs` combines the runs of a tensor."""
    runs, row, rows = [], 0, len(vectors[0])
    while row < rows:
        length = _largest_run(first + row, rows - row)
        runs.append(RowRun(first + row, length, _pair_sums([vector[row : row + length] for vector in vectors])))
        row += length
    return runs


def _largest_run(first: int, rows: int) -> int:
    """The largest number of rows of a run that begins at row `first`."""
    most = 1 << (rows.bit_length() - 1)
    return min(most, first & -first) if first else most


def _pair_sums(vectors: Sequence[Float32]) -> Array:
    import numpy as np

    wide = [vector.astype(np.float64) for vector in vectors]
    sums = []
    for one, two in pairs_of(len(wide)):
        products = wide[one] * wide[two]
        while len(products) > 1:
            products = products[0::2] + products[1::2]
        sums.append(products[0])
    merged: Array = np.stack(sums)
    return merged


def merged_runs(runs: Iterable[RowRun]) -> Array:
    """The sums over all rows of a tensor, float64 [pairs, columns], from its runs in order; there is at least one."""
    open_runs: list[RowRun] = []
    for run in runs:
        open_runs.append(run)
        while len(open_runs) > 1 and _are_siblings(*open_runs[-2:]):
            two, one = open_runs.pop(), open_runs.pop()
            open_runs.append(RowRun(one.first, 2 * one.length, one.sums + two.sums))
    result = open_runs.pop().sums
    while open_runs:
        result = open_runs.pop().sums + result
    return result


def _are_siblings(one: RowRun, two: RowRun) -> bool:
    return one.length == two.length and one.first % (2 * one.length) == 0
