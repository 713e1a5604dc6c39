"""Refuse merges of quantised weights."""

from __future__ import annotations

from collections.abc import Callable

from hsa.architectures.base import TensorInfo
from hsa.errors import SourceError
from hsa.option_names import option
from hsa.sources.quantized import quantized
from hsa.sources.source_set import Sources

WHOLE = "F32"
"""The element type that a weight would have if it were not quantised."""


def refuse_quantized(sources: Sources, method: str, is_merged: Callable[[TensorInfo], bool]) -> None:
    """Raise SourceError for a quantised weight that a method would merge if it were not quantised. The error names it.

    `is_merged` says whether the method merges a tensor with such a description.
    """
    for source in sources:
        for name, how in quantized(source).items():
            ref = source.tensors[name]
            if is_merged(TensorInfo(name, WHOLE, ref.shape)):
                raise SourceError(
                    f"{source.file_of(ref)}: tensor {ref.name} is quantised ({how}), and method {method} would merge "
                    f"it; give the checkpoint as it was before it was quantised, or leave such tensors out "
                    f"({option('exclude')})"
                )
