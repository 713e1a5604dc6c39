"""The definition of a model family: the names of its tensors, its heads, its presets and its small files.

To define a family of your own in a file, import from here; docs/contributing/add-an-architecture.md shows an example.
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
