"""What the benchmarks share: model shapes, element types, the parameters of a merge, and which cases a run covers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hsa.testing.whisper_checkpoints import SHAPES, tensor_shapes

K, LAM, ALPHA = 0.6, 0.5, 0.2
"""The defaults of `hsa merge`, which all programs are given."""

SIZES = ("tiny", "small", "medium", "large-v3-turbo", "large-v3")
ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
SHARD_BYTES = 5 * 10**9
"""Bytes of a shard at most, as transformers and the hub split checkpoints."""


def model_bytes(shape: str, dtype: str) -> int:
    """Bytes of one model's tensors."""
    return ITEM_SIZE[dtype] * sum(math.prod(dims) for dims in tensor_shapes(SHAPES[shape]).values())


@dataclass(frozen=True)
class MergeCase:
    """Checkpoints to merge: `rounds` for programs that are quick, `slow_rounds` for those that hold full models."""

    shape: str
    dtype: str
    rounds: int = 5
    slow_rounds: int = 1
    cold_rounds: int = 2

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.dtype}"

    @property
    def model_bytes(self) -> int:
        return model_bytes(self.shape, self.dtype)


QUICK = (
    MergeCase("tiny", "float32", rounds=5, slow_rounds=3),
    MergeCase("small", "float32", rounds=5, slow_rounds=3),
    MergeCase("large-v3", "float32"),
)
"""The cases of `make bench`: under 30 minutes on two cores."""

FULL = tuple(MergeCase(shape, dtype, rounds=5, slow_rounds=3) for shape in SIZES for dtype in ("float16", "float32"))
"""The cases of `make bench-full`, however long they take."""

CAVEATS = """Few clips of synthetic voices that training and test share: intervals hold for such speech and no other.
The best row may be best by chance: measure on your own recordings which merge serves them."""
"""What a reader of word error rates must know."""
