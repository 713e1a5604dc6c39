"""The names that a pickle of tensors may use, and a description of the value each would build. Nothing is called.

All arguments of calls that build plain tensors are checked. Other values that `torch.load` with `weights_only` would
build (`torch.Size`, sets, sparse tensors) become an `OpaqueValue`: messages can name it, and nothing else can be done
with it.

Source: torch/_weights_only_unpickler.py, torch/_utils.py, torch/_tensor.py.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hsa.sources.safetensors import MAX_RANK

STORAGES: Mapping[str, str] = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}
"""Element type of a storage by its class in `torch`. A storage without one counts bytes."""

_UNTYPED = "torch.storage.UntypedStorage"
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR, _TENSOR_CLASS = "torch._utils._rebuild_tensor_v2", "torch.Tensor"
_TENSOR_OF_DTYPE = "torch._utils._rebuild_tensor_v3"
_TENSOR_ON_META = "torch._utils._rebuild_meta_tensor_no_storage"
_PARAMETER = "torch._utils._rebuild_parameter"
_PARAMETER_WITH_ATTRIBUTES = "torch._utils._rebuild_parameter_with_state"
_TENSOR_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"

_DTYPE = re.compile(r"torch\.(bool|bfloat16|(float|u?int|complex|q?u?int|bits)[0-9][a-z0-9_]*)")

OPAQUE: Mapping[str, str] = {
    "torch._utils._rebuild_tensor": "a tensor of torch before 0.4",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a subclass of torch.Tensor",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor without a storage",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor without a storage",
    "torch.serialization._get_layout": "layout",
    "torch.Size": "Size",
    "torch.device": "device",
    "collections.Counter": "Counter",
    "_codecs.encode": "bytes",
    "builtins.bytearray": "bytearray",
    "builtins.set": "set",
    "builtins.complex": "complex",
}
"""Other functions that weights_only calls, beside constructors of plain tensors, and the kind of value that each
returns. No such value can be merged."""


@dataclass(frozen=True)
class Storage:
    """The bytes of tensors: the record `data/<key>` of the archive. It has `count` elements, or `count` bytes if it has
    no dtype."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as a pickle describes it; `offset` and `strides` count elements. Without a storage it has no data.

    `kind` is the class that torch would make: `Tensor` or `Parameter`. If `viewed`, its numbers are those of the
    storage, conjugated or negated.
    """

    dtype: str
    storage: Storage | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    viewed: bool = False
    kind: str = "Tensor"

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether its elements are stored one after the other, in row-major order."""
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length != 1 and stride != expected:
                return 0 in self.shape
            expected *= length
        return not self.viewed


@dataclass(frozen=True)
class OpaqueValue:
    """A value that is neither a tensor nor a plain value that appears only once. Only a word for it is kept."""

    kind: str


@dataclass(frozen=True)
class Global:
    """The name of a known class or function."""

    name: str


class Malformed(Exception):
    """The instruction that is being read is malformed; the text says how."""


def class_name(value: Any) -> str:
    """Name a pickle's value for messages: the class that Python or torch would make of it."""
    if isinstance(value, (PickledTensor, OpaqueValue)):
        return value.kind
    return value.name.rpartition(".")[2] if isinstance(value, Global) else type(value).__name__


def is_allowed(name: str) -> bool:
    """Whether a pickle may name this class or function, `module.name`."""
    if name in CALLS or name in OPAQUE or name in ARGUMENTS or _DTYPE.fullmatch(name):
        return True
    return name.startswith("torch.") and name.removeprefix("torch.") in STORAGES


def call(function: Any, arguments: Any) -> Any:
    """Describe the result of a call. Raises Malformed for an invalid call, or for other arguments than torch gives."""
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise Malformed(f"it calls {class_name(function)}")
    if function.name in OPAQUE:
        return OpaqueValue(OPAQUE[function.name])
    if function.name not in CALLS:
        raise Malformed(f"it calls {function.name}")
    return CALLS[function.name](*arguments)


def persistent_storage(identity: Any) -> Storage:
    """Return the storage of a persistent id, `("storage", class, key, location, number of elements)`. Raises
    Malformed."""
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise Malformed("it refers to something that is no storage")
    _, kind, key, location, count = identity
    dtype = _storage_dtype(kind)
    if dtype is None or not isinstance(key, str) or not isinstance(location, str) or not _is_count(count):
        raise Malformed("a storage is described by other things than its class, key, place and size")
    return Storage(dtype, key, count)


# Calls ---------------------------------------------------------------------------------------------------------------


def _ordered_dict(*arguments: Any) -> OrderedDict[Any, Any]:
    _require(not arguments, "an OrderedDict is made from something")
    return OrderedDict()


def _tensor(*arguments: Any) -> PickledTensor:
    """Describe `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`, optionally followed by flags
    of a view. The element type is the storage's."""
    _require(len(arguments) in (6, 7) and isinstance(arguments[0], Storage), _NO_TENSOR)
    return _checked_tensor(arguments[0].dtype, *arguments)


def _tensor_of_dtype(*arguments: Any) -> PickledTensor:
    """As `_tensor`, with an explicit element type before the flags."""
    _require(len(arguments) in (7, 8) and isinstance(arguments[0], Storage), _NO_TENSOR)
    return _checked_tensor(_dtype(arguments[6]), *arguments[:6], *arguments[7:])


def _tensor_on_meta(*arguments: Any) -> PickledTensor:
    _require(len(arguments) == 4, _NO_TENSOR)
    dtype, size, stride, requires_grad = arguments
    return _checked_tensor(_dtype(dtype), None, 0, size, stride, requires_grad, OrderedDict())


def _parameter(*arguments: Any) -> PickledTensor:
    """Describe `_rebuild_parameter(data, requires_grad, hooks)`. Attributes after these are ignored."""
    _require(len(arguments) in (3, 4) and isinstance(arguments[0], PickledTensor), _NO_TENSOR)
    data, requires_grad, hooks = arguments[:3]
    _require(isinstance(requires_grad, bool) and isinstance(hooks, OrderedDict) and not hooks, _NO_TENSOR)
    return PickledTensor(data.dtype, data.storage, data.offset, data.shape, data.strides, data.viewed, "Parameter")


def _tensor_with_attributes(*arguments: Any) -> PickledTensor | OpaqueValue:
    """Describe `_rebuild_from_type_v2(function, type, arguments, attributes)`. Buffers have attributes, which are
    ignored."""
    _require(len(arguments) == 4 and isinstance(arguments[2], tuple), _NO_TENSOR)
    function, tensor_class, tensor_arguments, _ = arguments
    if function != Global(_TENSOR) or tensor_class != Global(_TENSOR_CLASS):
        return OpaqueValue("a subclass of torch.Tensor")
    return _tensor(*tensor_arguments)


def _checked_tensor(
    dtype: str,
    storage: Storage | None,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    flags: Any = None,
) -> PickledTensor:
    _require(all(isinstance(numbers, tuple) and len(numbers) <= MAX_RANK for numbers in (size, stride)), _NO_TENSOR)
    _require(len(size) == len(stride) and all(map(_is_count, (offset, *size, *stride))), _NO_TENSOR)
    _require(math.prod(size) < 1 << 60, "a tensor is larger than any file")
    _require(isinstance(requires_grad, bool) and isinstance(hooks, OrderedDict) and not hooks, _NO_TENSOR)
    _require(flags is None or isinstance(flags, dict), _NO_TENSOR)
    return PickledTensor(dtype, storage, offset, size, stride, viewed=bool(flags))


_NO_TENSOR = "a tensor is described by other things than its storage, offset, size, strides and dtype"

CALLS: Mapping[str, Callable[..., Any]] = {
    _ORDERED_DICT: _ordered_dict,
    _TENSOR: _tensor,
    _TENSOR_OF_DTYPE: _tensor_of_dtype,
    _TENSOR_ON_META: _tensor_on_meta,
    _PARAMETER: _parameter,
    _PARAMETER_WITH_ATTRIBUTES: _parameter,
    _TENSOR_WITH_ATTRIBUTES: _tensor_with_attributes,
}
ARGUMENTS = {
    _UNTYPED,
    _TENSOR_CLASS,
    "torch.per_tensor_affine",
    "torch.per_tensor_symmetric",
    "torch.per_channel_affine",
    "torch.per_channel_symmetric",
    "torch.per_channel_affine_float_qparams",
}
"""Names that are passed to a call and never called."""


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Malformed(otherwise)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60


def _dtype(value: Any) -> str:
    _require(isinstance(value, Global) and _DTYPE.fullmatch(value.name) is not None, _NO_TENSOR)
    return str(value.name.removeprefix("torch."))


def _storage_dtype(kind: Any) -> str | None:
    if not isinstance(kind, Global):
        return None
    return "uint8" if kind.name == _UNTYPED else STORAGES.get(kind.name.removeprefix("torch."))
