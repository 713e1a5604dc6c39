"""What a family of models is: the names of its tensors, its heads, its presets and its small files.

A file with a family of your own imports from here; docs/add-an-architecture.md shows one.
"""

from hsa.architectures.base import (
    KINDS,
    PRESETS,
    Architecture,
    ExpectedTensor,
    Features,
    ModelClass,
    ModelCounts,
    Partition,
    Preset,
    TensorInfo,
    TensorPlace,
    Tie,
)

__all__ = [
    "KINDS",
    "PRESETS",
    "Architecture",
    "ExpectedTensor",
    "Features",
    "ModelClass",
    "ModelCounts",
    "Partition",
    "Preset",
    "TensorInfo",
    "TensorPlace",
    "Tie",
]
