"""Sums that decisions depend on: in float64 and in a fixed order, whatever the blocks, slices and threads of a run are.

A tensor is summed in flat blocks of 1,024 elements from its first element on; the last block is padded with zeros. A
block has 64 lanes, and element e is in lane e mod 64. The 16 elements of a lane are added one after another. Then the
two halves of the 64 sums are added, then the two halves of the result, and so on down to one number. The blocks' sums
are added one after another. Every processor, including a GPU, can add in this order at full speed, and the result does
not depend on the width of its registers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hsa.methods.tensors import UNIT

if TYPE_CHECKING:
    from hsa.system.dtypes import Array

LANES = 64
"""The number of sums of a block that are formed in parallel."""


def block_sums(values: Array) -> Array:
    """The sums of flat blocks of 1,024 elements. `values`: float64 of any shape, in C order.

    Returns float64 [ceil(n / 1024)].

    Example:
        >>> import numpy as np
        >>> block_sums(np.ones(1500)).tolist()
        [1024.0, 476.0]
    """
    import numpy as np

    flat = values.reshape(-1)
    whole = flat.size // UNIT
    sums: Array = np.empty(-(-flat.size // UNIT), np.float64)
    if whole:
        sums[:whole] = _sums_of_rows(flat[: whole * UNIT].reshape(whole, UNIT))
    if whole < sums.size:
        last = np.zeros((1, UNIT))
        last[0, : flat.size - whole * UNIT] = flat[whole * UNIT :]
        sums[whole:] = _sums_of_rows(last)
    return sums


def _sums_of_rows(blocks: Array) -> Array:
    """The sum of each row of float64 [rows, 1024]."""
    import numpy as np

    lanes = np.einsum("bne->be", blocks.reshape(len(blocks), -1, LANES))
    return halved(np.ascontiguousarray(lanes.T))


def halved(values: Array) -> Array:
    """The sum over the first axis, by adding halves. Its length is a power of two. `values`: float64; it is
    overwritten."""
    import numpy as np

    length = len(values)
    while length > 1:
        length //= 2
        np.add(values[:length], values[length : 2 * length], out=values[:length])
    summed: Array = values[0]
    return summed


def total(parts: Iterable[Array]) -> float:
    """The sum of the blocks' sums, added one after another in the order of the tensor.

    Example:
        >>> import numpy as np
        >>> total([np.array([1.0, 2.0]), np.array([3.0])])
        6.0
    """
    import numpy as np

    every = np.concatenate([np.zeros(1), *parts])
    return float(np.add.accumulate(every)[-1])
