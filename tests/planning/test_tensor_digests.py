"""The digest of a source's tensor in records, which follows from the tensor alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from blake3 import blake3

from hsa.architectures.base import Partition, TensorInfo
from hsa.methods.tensors import Layout, TensorTask
from hsa.planning.tensor_digests import digest_by_ranges, digest_of_parts, tensor_digest
from hsa.system.dtypes import Array


@dataclasses.dataclass(frozen=True)
class Ref(TensorInfo):
    """A tensor of a source that lies nowhere."""

    nbytes: int = 0


def task_of(elements: int, code: str, layout: Layout) -> tuple[TensorTask, Array]:
    width = {"F32": 4, "F16": 2, "BF16": 2}[code]
    data = np.random.default_rng(elements).integers(0, 256, elements * width, np.uint8)
    ref = Ref("a", code, (elements,), data.nbytes)
    task = TensorTask("a", None, 0, (elements,), Partition(), {"model1": ref}, "model1", code, "a", layout=layout)
    return task, data


@pytest.mark.parametrize("layout", ["flat", "rows", "columns", "whole", "heads"])
@pytest.mark.parametrize("code", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("elements", [1, 262_144, 262_145, 700_001])
def test_the_digest_of_a_tensor(elements: int, code: str, layout: Layout) -> None:
    """A tensor in chunks of 2^18 elements, which no constant of the engine changes; targets of HSA as one."""
    task, data = task_of(elements, code, layout)
    step = 262_144 * data.nbytes // elements
    chunks = [blake3(data[start : start + step].tobytes()).hexdigest() for start in range(0, data.nbytes, step)]
    one = layout == "heads" or len(chunks) == 1
    expected = blake3(data.tobytes() if one else "\n".join(chunks).encode()).hexdigest()
    assert tensor_digest(task, "model1", data) == expected
    ranges: list[tuple[int, int]] = []

    def of_range(start: int, count: int) -> str:
        ranges.append((start, count))
        return str(blake3(data[start : start + count].tobytes()).hexdigest())

    assert digest_by_ranges(task, "model1", of_range) == expected
    assert sum(count for _, count in ranges) == data.nbytes
    parts = digest_of_parts(task, "model1")
    cuts = [0, data.nbytes // 3, data.nbytes]
    for start, stop in zip(cuts[::-1][1:], cuts[::-1], strict=False):
        parts.add(start, data[start:stop])
    assert parts.hexdigest() == expected
