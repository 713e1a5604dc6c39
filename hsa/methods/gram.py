"""Gram matrices: the products of every two sources of a tensor, in float64 and in one order.

The products of float32 elements are exact in float64. They are added as `hsa.methods.sums` says, so that a matrix does
not depend on how a tensor is cut: each row in blocks of 1,024 elements from its own start. Products down a column are
added in pairs of neighbouring rows, then pairs of pairs, as if the rows were filled with zeros up to a power of two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hsa.methods.sums import halved
from hsa.methods.tensors import UNIT

if TYPE_CHECKING:
    from hsa.system.dtypes import Array, Float32

Gram = tuple[tuple[float, ...], ...]
"""The products of every two vectors [N][N]."""

CHUNK = 1 << 18
"""Elements of all products that are formed at a time: what is summed while it lies in the cache. On a core with 1 MiB
of second-level cache, 2**16 to 2**19 take the same time within a tenth for two to five vectors."""


class RowRun(NamedTuple):
    """Sums over neighbouring rows, of which there is a power of two, and the first is a multiple of their number: the
    sums of every two vectors, float64 [pairs, columns]."""

    first: int
    length: int
    sums: Array


def pairs_of(count: int) -> list[tuple[int, int]]:
    """Every two of so many vectors, each with itself too, in the order in which their products are kept.

    Example:
        >>> pairs_of(2)
        [(0, 0), (0, 1), (1, 1)]
    """
    return [(one, two) for one in range(count) for two in range(one, count)]


def gram_of(entries: Sequence[float], count: int) -> Gram:
    """The matrix of so many vectors from its entries in the order of `pairs_of`.

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
        blocks = [vector[:, : whole * UNIT].reshape(rows, whole, UNIT) for vector in vectors]
        _sum_blocks(blocks, UNIT, sums[:, :, :whole])
    if rest:
        width = 1 << (rest - 1).bit_length()  # zeros beyond would add nothing
        _sum_blocks([vector[:, None, whole * UNIT :] for vector in vectors], width, sums[:, :, whole:])
    return sums


def _sum_blocks(vectors: Sequence[Float32], width: int, out: Array) -> None:
    """The products over the last axis of float32 [rows, blocks, length], filled with zeros to `width`."""
    rows, blocks, _ = vectors[0].shape
    at_once = max(1, CHUNK // (len(out) * width))
    for row in range(0, rows, max(1, at_once // blocks)):
        part_rows = slice(row, row + max(1, at_once // blocks))
        for block in range(0, blocks, at_once):
            place = part_rows, slice(block, block + at_once)
            out[:, place[0], place[1]] = _block_products([vector[place] for vector in vectors], width)


def _block_products(vectors: Sequence[Float32], width: int) -> Array:
    """The products over the last axis of float32 [rows, blocks, length], float64 [pairs, rows, blocks]."""
    import numpy as np

    rows, blocks, length = vectors[0].shape
    count = rows * blocks
    make = np.empty if length == width else np.zeros
    wide = make((len(vectors), count, width))
    for each, vector in zip(wide, vectors, strict=True):
        each.reshape(rows, blocks, width)[:, :, :length] = vector
    pairs = pairs_of(len(vectors))
    if width == 1:
        single: Array = np.stack([wide[i] * wide[j] for i, j in pairs])
        return single.reshape(len(pairs), rows, blocks)
    # The first halving adds the two products that it multiplies, which are exact, in one step.
    halves = wide.reshape(len(vectors), count, 2, width // 2)
    products: Array = np.empty((len(pairs), count, width // 2))
    for (i, j), out in zip(pairs, products, strict=True):
        np.einsum("bhe,bhe->be", halves[i], halves[j], out=out)
    return halved(products.reshape(-1, width // 2)).reshape(len(pairs), rows, blocks)


def totals(parts: Array) -> Array:
    """The sums of blocks' sums, float64 [..., blocks], one added after another."""
    import numpy as np

    result: Array = np.zeros(parts.shape[:-1])
    for block in range(parts.shape[-1]):
        result += parts[..., block]
    return result


def column_products(vectors: Sequence[Float32], first: int) -> list[RowRun]:
    """The products of every two vectors, float32 [rows, columns], down each column; `first` is the number of the first
    row in its tensor. `merged_runs` puts the runs of a tensor together."""
    runs, row, rows = [], 0, len(vectors[0])
    while row < rows:
        length = _largest_run(first + row, rows - row)
        runs.append(RowRun(first + row, length, _pair_sums([vector[row : row + length] for vector in vectors])))
        row += length
    return runs


def _largest_run(first: int, rows: int) -> int:
    """The most rows that a run may have which begins at `first`."""
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
