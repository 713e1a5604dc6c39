"""Find weights that are stored quantised: integers or tiny floats whose scales are in other tensors.

Merging them directly would mix the scales of one model with the weights of another. They are recognised by their
element types and by companion tensors. Source: the layouts that bitsandbytes, GPTQ, AWQ, compressed-tensors, FP8 and
MXFP4 checkpoints have on the Hub, as transformers 5 reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hsa.architectures.base import TensorInfo
from hsa.sources.checkpoint import Checkpoint

_PACKED = (
    *("I8", "U8", "I16", "U16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2"),
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("int8", "uint8", "int32", "float8_e4m3fn", "float8_e5m2"),
)
"""Element types of quantised weights, in files and of torch. Counters and positions are I64."""

_COMPANIONS = (
    *("scales", "scale", "zero_point", "qzeros", "zeros", "SCB", "weight_format", "g_idx"),
    *("weight_scale", "weight_scales", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_shape"),
    *("weight_g_idx", "weight_global_scale", "input_scale", "input_global_scale", "quant_state", "quant_map", "absmax"),
)
"""Names of companion tensors in the module of a quantised weight."""

_OF_WEIGHT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")
"""Names of bitsandbytes' companion tensors, below the weight's own name."""

_QUANTIZED_NAMES = ("qweight", "weight_packed", "W_q")


def quantized(checkpoint: Checkpoint) -> dict[str, str]:
    """Return a checkpoint's quantised weights by canonical name, each with a word on its storage for messages.

    Example:
        >>> # a weight of 8 bits, with the scales that bitsandbytes keeps
        >>> quantized(checkpoint)  # doctest: +SKIP
        {'layers.0.mlp.up_proj.weight': 'I8, with layers.0.mlp.up_proj.SCB'}
    """
    configured = isinstance(checkpoint.config.get("quantization_config"), Mapping)
    return dict(_found(checkpoint.tensors, configured=configured))


def _found(tensors: Mapping[str, TensorInfo], *, configured: bool) -> Iterator[tuple[str, str]]:
    for name, ref in tensors.items():
        module, _, leaf = name.rpartition(".")
        if ref.code not in _PACKED or leaf in _COMPANIONS or leaf in _OF_WEIGHT:
            continue
        beside = [f"{module}.{each}" for each in _COMPANIONS]
        beside += [f"{name}.{each}" for each in _OF_WEIGHT]
        beside += [f"{name}_scale", f"{name}_scales", f"{name}_scale_inv", f"{name.removesuffix('_blocks')}_scales"]
        companion = next((each for each in beside if each != name and each in tensors), None)
        if companion is not None:
            yield name, f"{ref.code}, with {companion}"
        elif leaf in _QUANTIZED_NAMES or ref.code.lower().startswith("f"):
            yield name, ref.code
        elif configured and len(ref.shape) > 1:
            yield name, f"{ref.code}, with quantization_config in config.json"
