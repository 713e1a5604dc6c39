"""Sums that decide something: in float64, in one order, whatever the blocks and slices and threads of a run are.

A tensor is summed in flat blocks of 1,024 elements from its first element on. Inside a block the halves are added,
then the halves of what is left, down to one number; the last block is filled with zeros. The blocks' sums are added one
after another. A GPU can add in that order as well as a CPU, and nothing depends on the width of its registers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hsa.methods.tensors import UNIT

if TYPE_CHECKING:
    from hsa.system.dtypes import Array


def block_sums(values: Array) -> Array:
    """The sums of flat blocks of 1,024 elements. `values`: float64 of any shape, in C order; it is overwritten.

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
        sums[:whole] = halved(flat[: whole * UNIT].reshape(whole, UNIT))
    if whole < sums.size:
        last = np.zeros((1, UNIT))
        last[0, : flat.size - whole * UNIT] = flat[whole * UNIT :]
        sums[whole:] = halved(last)
    return sums


def halved(blocks: Array) -> Array:
    """The sum of each row by halves, whose length is a power of two. `blocks`: float64 [rows, length]; overwritten."""
    import numpy as np

    width = blocks.shape[1]
    while width > 1:
        width //= 2
        np.add(blocks[:, :width], blocks[:, width : 2 * width], out=blocks[:, :width])
    return blocks[:, 0]


def total(parts: Iterable[Array]) -> float:
    """The sum of blocks' sums, which come in the order of the tensor: one added after another.

    Example:
        >>> import numpy as np
        >>> total([np.array([1.0, 2.0]), np.array([3.0])])
        6.0
    """
    import numpy as np

    every = np.concatenate([np.zeros(1), *parts])
    return float(np.add.accumulate(every)[-1])
