"""The description of tensors in a file of `torch.save`, read from its pickle without unpickling it.

A pickle is a program for a small stack machine. The one here knows the instructions that `torch.save` writes for
tensors and plain containers (pickle protocol 2). It imports nothing and calls nothing: the name of a function is a
word, and a call of one that builds tensors becomes a `Tensor`, which says where its bytes lie. So no pickle can run
code, and what it takes to read one is bounded by its length:

- at most `MAX_OPCODES` instructions, each in bounded time;
- no value grows: a container lies in one place alone. Where the memo gives it a second time, as shared or recursive
  structures do, an `Other` takes its place. Nothing that walks the result can walk more than was read;
- keys of dictionaries are texts and small whole numbers, whose hashes cost what their bytes in the file do.

What `torch.load` with `weights_only` would build beside tensors (`torch.Size`, sets, sparse tensors) is an `Other` too:
the reader can say what it found, and nothing can be done with it.

Source: pickletools of the standard library; torch/_weights_only_unpickler.py, torch/_utils.py, torch/serialization.py.
"""

from __future__ import annotations

import math
import re
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hsa.errors import SourceError, shown
from hsa.header import MAX_RANK

REMEDY = "save the model as safetensors (save_pretrained does) and give that"

MAX_OPCODES = 1 << 18
"""Instructions of a pickle: five times what large-v3 takes. A pickle of one mebibyte could have a million."""

MAX_DEPTH = 64
"""Containers that are begun and not ended."""

_LONGEST = 8
"""Bytes of a whole number: sizes of files have no more."""

_LONGEST_NAME = 1000
"""Bytes of the name of a class or function."""

_MALFORMED = (IndexError, KeyError, struct.error, UnicodeDecodeError)
"""What reading beyond the pickle's end, its stack or its memo raises, or a text that is none."""

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

_OTHERS: Mapping[str, str] = {
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
"""What weights_only calls beside the constructors of plain tensors, and what comes of it: none of it can be merged."""


@dataclass(frozen=True)
class Storage:
    """The bytes of tensors: the record `data/<key>` of the archive, of `count` elements, or bytes where it has no
    dtype."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class Tensor:
    """A tensor as a pickle describes it; `offset` and `strides` count elements. Without a storage it has no data.

    `kind` is the class that torch would make: `Tensor` or `Parameter`. `viewed` says that its numbers are those of the
    storage conjugated or negated.
    """

    dtype: str
    storage: Storage | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    viewed: bool = False
    kind: str = "Tensor"

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, the last dimension's closest."""
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length != 1 and stride != expected and 0 not in self.shape:
                return False
            expected *= length
        return not self.viewed


@dataclass(frozen=True)
class Other:
    """A value that is neither a tensor nor a plain one that lies in one place: a word for it is all that is kept."""

    kind: str


@dataclass(frozen=True)
class _Global:
    """The name of a class or function, of those that are known."""

    name: str


class _Malformed(Exception):
    """What is wrong with the instruction that is being read."""


class _Foreign(Exception):
    """A name that no description of tensors needs."""


def kind_of(value: Any) -> str:
    """What a value of a pickle is, for messages: the name of the class that Python or torch would make of it."""
    if isinstance(value, (Tensor, Other)):
        return value.kind
    return value.name.rpartition(".")[2] if isinstance(value, _Global) else type(value).__name__


def read(data: bytes, where: str) -> Any:
    """The value that a pickle describes: of dicts, lists, tuples, texts, numbers, `Tensor` and `Other`.

    `data` is the record `data.pkl` of an archive of `torch.save`; bytes after the pickle's end are left aside. Raises
    SourceError, which begins with `where`, for a pickle that names anything but tensors and plain containers, that is
    malformed, or that has more than `MAX_OPCODES` instructions.

    Example:
        >>> read(b"\\x80\\x02}X\\x01\\0\\0\\0aK\\x03s.", "here")
        {'a': 3}
    """
    machine = _Machine(data)
    try:
        return machine.run()
    except _Foreign as error:
        raise SourceError(
            f"{where} holds more than tensors and plain containers (it names {error}), so that loading it could run "
            f"code; refused: {REMEDY}"
        ) from error
    except (_Malformed, *_MALFORMED) as error:
        reason = str(error) if isinstance(error, _Malformed) else "it is damaged"
        raise SourceError(
            f"{where} cannot be loaded as weights (byte {machine.began} of its pickle: {reason}); copy it again, or "
            f"{REMEDY}"
        ) from error


class _Machine:
    """The stack, the memo, and one method for each instruction."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.began = data, 0, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, methods = self.data, _METHODS
        for _ in range(MAX_OPCODES):
            self.began = self.at
            code = data[self.at]
            self.at += 1
            if code == _STOP:
                return self.pop()
            method = methods.get(code)
            if method is None:
                raise _Malformed(_unknown(code))
            method(self)
        raise _Malformed(f"it has more than {MAX_OPCODES} instructions, five times those of whisper-large-v3")

    def take(self, count: int) -> bytes:
        """The next bytes, as many as are asked for."""
        found = self.data[self.at : self.at + count]
        if len(found) < count:
            raise _Malformed(f"it ends {count - len(found)} bytes too soon")
        self.at += count
        return found

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + _LONGEST_NAME)
        if end < 0:
            raise _Malformed("a name has no end")
        return self.take(end + 1 - self.at)[:-1].decode("utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        """The topmost value above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _Malformed("it takes a value where none is left")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    # Instructions ------------------------------------------------------------------------------------------------

    def protocol(self) -> None:
        self.number("<B")

    def mark(self) -> None:
        if len(self.marks) >= MAX_DEPTH:
            raise _Malformed(f"it is nested more than {MAX_DEPTH} deep")
        self.marks.append(len(self.stack))

    def text(self) -> None:
        self.push(self.take(self.number("<I")).decode("utf-8"))

    def short_text(self) -> None:
        self.push(self.take(self.number("<B")).decode("utf-8"))

    def long(self) -> None:
        count = self.number("<B")
        if count > _LONGEST:
            raise _Malformed(f"a whole number of {count} bytes, at most {_LONGEST} are read")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def tuple_(self) -> None:
        self.push(tuple(self.since_mark()))

    def tuple_of(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def put(self, form: str) -> None:
        self.memo[self.number(form)] = self.top()

    def get(self, form: str) -> None:
        value = self.memo[self.number(form)]
        shared = isinstance(value, (dict, list)) or (isinstance(value, tuple) and value)
        self.push(Other(type(value).__name__) if shared else value)

    def append(self) -> None:
        value = self.pop()
        self.extend([value])

    def appends(self) -> None:
        self.extend(self.since_mark())

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Other):
            raise _Malformed(f"it appends to {kind_of(target)}, expected a list")

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.update([key, value])

    def set_items(self) -> None:
        self.update(self.since_mark())

    def update(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Other):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise _Malformed(f"it sets items of {kind_of(target)}, expected keys and values of a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise _Malformed(f"a key is {kind_of(key)}, expected a text or a whole number")
            if key in target:
                raise _Malformed(f"the key {shown(key)} is set twice")
            target[key] = value

    def global_(self) -> None:
        module, name = self.line(), self.line()
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        storage = module == "torch" and name in STORAGES
        if not (storage or full in _CALLS or full in _OTHERS or full in _WORDS or _DTYPE.fullmatch(full)):
            raise _Foreign(f"{full.removeprefix('builtins.'):.200}")
        self.push(_Global(full))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise _Malformed(f"it calls {kind_of(function)}")
        if function.name in _OTHERS:
            self.push(Other(_OTHERS[function.name]))
        elif function.name in _CALLS:
            self.push(_CALLS[function.name](*arguments))
        else:
            raise _Malformed(f"it calls {function.name}")

    def build(self) -> None:
        """Attributes of an OrderedDict (`_metadata` of a state dict), which are left aside."""
        state, target = self.pop(), self.top()
        if isinstance(target, Other):
            return
        if not isinstance(target, OrderedDict) or not isinstance(state, (dict, Other)):
            raise _Malformed(f"it sets attributes of {kind_of(target)}")

    def persistent(self) -> None:
        """The storage that its class, key, place and number of elements say."""
        given = self.pop()
        if not isinstance(given, tuple) or len(given) != 5 or given[0] != "storage":
            raise _Malformed("it refers to something that is no storage")
        _, kind, key, location, count = given
        dtype = _storage_dtype(kind)
        if dtype is None or not isinstance(key, str) or not isinstance(location, str) or not _is_count(count):
            raise _Malformed("a storage is described by other things than its class, key, place and size")
        self.push(Storage(dtype, key, count))


# Calls ---------------------------------------------------------------------------------------------------------------


def _ordered_dict(*arguments: Any) -> OrderedDict[Any, Any]:
    _expect(not arguments, "an OrderedDict is made from something")
    return OrderedDict()


def _tensor(*arguments: Any) -> Tensor:
    """Of a storage, its element type: `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`, with
    flags of a view after that."""
    _expect(len(arguments) in (6, 7) and isinstance(arguments[0], Storage), _NO_TENSOR)
    return _checked(arguments[0].dtype, *arguments)


def _tensor_of_dtype(*arguments: Any) -> Tensor:
    """The same with an element type of its own before the flags."""
    _expect(len(arguments) in (7, 8) and isinstance(arguments[0], Storage), _NO_TENSOR)
    return _checked(_dtype(arguments[6]), *arguments[:6], *arguments[7:])


def _tensor_on_meta(*arguments: Any) -> Tensor:
    _expect(len(arguments) == 4, _NO_TENSOR)
    dtype, size, stride, requires_grad = arguments
    return _checked(_dtype(dtype), None, 0, size, stride, requires_grad, OrderedDict())


def _parameter(*arguments: Any) -> Tensor:
    """`_rebuild_parameter(data, requires_grad, hooks)`, with attributes after that, which are left aside."""
    _expect(len(arguments) in (3, 4) and isinstance(arguments[0], Tensor), _NO_TENSOR)
    data, requires_grad, hooks = arguments[:3]
    _expect(isinstance(requires_grad, bool) and isinstance(hooks, OrderedDict) and not hooks, _NO_TENSOR)
    return Tensor(data.dtype, data.storage, data.offset, data.shape, data.strides, data.viewed, "Parameter")


def _tensor_with_attributes(*arguments: Any) -> Tensor | Other:
    """`_rebuild_from_type_v2(function, type, arguments, attributes)`: buffers have some; they are left aside."""
    _expect(len(arguments) == 4 and isinstance(arguments[2], tuple), _NO_TENSOR)
    function, kind, inner, _ = arguments
    if function != _Global(_TENSOR) or kind != _Global(_TENSOR_CLASS):
        return Other("a subclass of torch.Tensor")
    return _tensor(*inner)


def _checked(
    dtype: str,
    storage: Storage | None,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    flags: Any = None,
) -> Tensor:
    _expect(all(isinstance(numbers, tuple) and len(numbers) <= MAX_RANK for numbers in (size, stride)), _NO_TENSOR)
    _expect(len(size) == len(stride) and all(map(_is_count, (offset, *size, *stride))), _NO_TENSOR)
    _expect(math.prod(size) < 1 << 60, "a tensor is larger than any file")
    _expect(isinstance(requires_grad, bool) and isinstance(hooks, OrderedDict) and not hooks, _NO_TENSOR)
    _expect(flags is None or isinstance(flags, dict), _NO_TENSOR)
    return Tensor(dtype, storage, offset, size, stride, viewed=bool(flags))


_NO_TENSOR = "a tensor is described by other things than its storage, offset, size, strides and dtype"

_CALLS: Mapping[str, Callable[..., Any]] = {
    _ORDERED_DICT: _ordered_dict,
    _TENSOR: _tensor,
    _TENSOR_OF_DTYPE: _tensor_of_dtype,
    _TENSOR_ON_META: _tensor_on_meta,
    _PARAMETER: _parameter,
    _PARAMETER_WITH_ATTRIBUTES: _parameter,
    _TENSOR_WITH_ATTRIBUTES: _tensor_with_attributes,
}
_WORDS = {
    _UNTYPED,
    _TENSOR_CLASS,
    "torch.per_tensor_affine",
    "torch.per_tensor_symmetric",
    "torch.per_channel_affine",
    "torch.per_channel_symmetric",
    "torch.per_channel_affine_float_qparams",
}
"""Names that are given to a call and never called."""


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Malformed(otherwise)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60


def _dtype(value: Any) -> str:
    _expect(isinstance(value, _Global) and _DTYPE.fullmatch(value.name) is not None, _NO_TENSOR)
    return str(value.name.removeprefix("torch."))


def _storage_dtype(kind: Any) -> str | None:
    if not isinstance(kind, _Global):
        return None
    return "uint8" if kind.name == _UNTYPED else STORAGES.get(kind.name.removeprefix("torch."))


def _unknown(code: int) -> str:
    from pickletools import opcodes

    known = next((opcode for opcode in opcodes if ord(opcode.code) == code), None)
    if known is None:
        return f"{code:#04x} is no instruction of a pickle"
    return (
        f"the instruction {known.name} of pickle protocol {known.proto}, which torch.save does not write for weights "
        f"with its own protocol 2"
    )


_STOP = ord(".")
_METHODS: Mapping[int, Callable[[_Machine], None]] = {
    0x80: _Machine.protocol,
    ord("("): _Machine.mark,
    ord("N"): lambda machine: machine.push(None),
    0x88: lambda machine: machine.push(True),
    0x89: lambda machine: machine.push(False),
    ord("K"): lambda machine: machine.push(machine.number("<B")),
    ord("M"): lambda machine: machine.push(machine.number("<H")),
    ord("J"): lambda machine: machine.push(machine.number("<i")),
    ord("G"): lambda machine: machine.push(machine.number(">d")),
    0x8A: _Machine.long,
    ord("X"): _Machine.text,
    ord("U"): _Machine.short_text,
    ord(")"): lambda machine: machine.push(()),
    ord("]"): lambda machine: machine.push([]),
    ord("}"): lambda machine: machine.push({}),
    0x8F: lambda machine: machine.push(Other("set")),
    ord("t"): _Machine.tuple_,
    0x85: lambda machine: machine.tuple_of(1),
    0x86: lambda machine: machine.tuple_of(2),
    0x87: lambda machine: machine.tuple_of(3),
    ord("q"): lambda machine: machine.put("<B"),
    ord("r"): lambda machine: machine.put("<I"),
    ord("h"): lambda machine: machine.get("<B"),
    ord("j"): lambda machine: machine.get("<I"),
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    ord("c"): _Machine.global_,
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
}
"""The instructions that torch.save writes, and EMPTY_SET, by their bytes."""
