"""Read the description of tensors in a file of `torch.save` from its pickle, without unpickling it.

A pickle is a program for a small stack machine. The machine in this module knows the instructions that `torch.save`
writes for tensors and plain containers (pickle protocol 2). It imports nothing and calls nothing: a function's name is
only a word, and a call of one that builds tensors becomes a `Tensor`, which says where its bytes are. So no pickle can
run code, and the cost of reading one is bounded by its length:

- at most `MAX_OPCODES` instructions, each in bounded time;
- no value grows: each container appears in only one place. Where the memo returns it a second time, as in shared or
  recursive structures, an `OpaqueValue` takes its place. So nothing that walks the result can walk more than was read;
- keys of dictionaries are texts and small integers, so hashing a key costs no more than its bytes in the file.

Source: pickletools of the standard library; torch/_weights_only_unpickler.py, torch/serialization.py.
"""

from __future__ import annotations

import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from hsa.errors import SourceError, shown
from hsa.sources.pickle_names import Global, Malformed, OpaqueValue, call, class_name, is_allowed, persistent_storage

REMEDY = "save the model as safetensors (save_pretrained does) and give that"

MAX_OPCODES = 1 << 18
"""The most instructions of a pickle: five times what large-v3 takes. A pickle of one mebibyte could have a million."""

MAX_DEPTH = 64
"""The most containers that are begun and not ended."""

_LONGEST = 8
"""The most bytes of an integer: file sizes have no more."""

_LONGEST_NAME = 1000
"""The most bytes in the name of a class or function."""

_DAMAGED = (IndexError, KeyError, struct.error, UnicodeDecodeError)
"""Raised by reads beyond the end of the pickle, its stack or its memo, and by invalid text."""


class _ForeignGlobal(Exception):
    """A name that no description of tensors needs."""


def read(data: bytes, where: str) -> tuple[Any, int]:
    """Return the value that a pickle describes, and the number of its instructions.

    The value consists of dicts, lists, tuples, texts, numbers, `PickledTensor` and `OpaqueValue`. `data` is the record
    `data.pkl` of a `torch.save` archive; bytes after the pickle's end are ignored.

    Raises SourceError if the pickle names anything but tensors and plain containers, is malformed, or has more than
    `MAX_OPCODES` instructions. The message begins with `where`.

    Example:
        >>> read(b"\\x80\\x02}X\\x01\\0\\0\\0aK\\x03s.", "here")
        ({'a': 3}, 6)
    """
    machine = _Machine(data)
    try:
        return machine.run()
    except _ForeignGlobal as error:
        raise SourceError(
            f"{where} holds more than tensors and plain containers (it names {error}), so that loading it could run "
            f"code; refused: {REMEDY}"
        ) from error
    except (Malformed, *_DAMAGED) as error:
        reason = str(error) if isinstance(error, Malformed) else "it is damaged"
        raise SourceError(
            f"{where} cannot be loaded as weights (byte {machine.opcode_start} of its pickle: {reason}); copy it "
            f"again, or {REMEDY}"
        ) from error


class _Machine:
    """The stack, the memo, and one method for each instruction."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position, self.opcode_start = data, 0, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> tuple[Any, int]:
        data, methods = self.data, _METHODS
        for count in range(1, MAX_OPCODES + 1):
            self.opcode_start = self.position
            code = data[self.position]
            self.position += 1
            if code == _STOP:
                return self.pop(), count
            method = methods.get(code)
            if method is None:
                raise Malformed(_describe_unknown(code))
            method(self)
        raise Malformed(f"it has more than {MAX_OPCODES} instructions, five times those of whisper-large-v3")

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        data = self.data[self.position : self.position + count]
        if len(data) < count:
            raise Malformed(f"it ends {count - len(data)} bytes too soon")
        self.position += count
        return data

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.position)
        self.position += struct.calcsize(form)
        return value

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + _LONGEST_NAME)
        if end < 0:
            raise Malformed("a name has no end")
        return self.take(end + 1 - self.position)[:-1].decode("utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        """Pop the topmost value above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Malformed("it takes a value where none is left")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    # Instructions ------------------------------------------------------------------------------------------------

    def protocol(self) -> None:
        self.number("<B")

    def mark(self) -> None:
        if len(self.marks) >= MAX_DEPTH:
            raise Malformed(f"it is nested more than {MAX_DEPTH} deep")
        self.marks.append(len(self.stack))

    def text(self) -> None:
        self.push(self.take(self.number("<I")).decode("utf-8"))

    def short_text(self) -> None:
        self.push(self.take(self.number("<B")).decode("utf-8"))

    def long(self) -> None:
        count = self.number("<B")
        if count > _LONGEST:
            raise Malformed(f"a whole number of {count} bytes, at most {_LONGEST} are read")
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
        self.push(OpaqueValue(f"a shared {type(value).__name__}") if shared else value)

    def append(self) -> None:
        value = self.pop()
        self.extend([value])

    def appends(self) -> None:
        self.extend(self.since_mark())

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, OpaqueValue):
            raise Malformed(f"it appends to {class_name(target)}, expected a list")

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.update([key, value])

    def set_items(self) -> None:
        self.update(self.since_mark())

    def update(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, OpaqueValue):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise Malformed(f"it sets items of {class_name(target)}, expected keys and values of a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise Malformed(f"a key is {class_name(key)}, expected a text or a whole number")
            if key in target:
                raise Malformed(f"the key {shown(key)} is set twice")
            target[key] = value

    def global_(self) -> None:
        module, name = self.line(), self.line()
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if not is_allowed(full):
            raise _ForeignGlobal(f"{full.removeprefix('builtins.'):.200}")
        self.push(Global(full))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.push(call(function, arguments))

    def build(self) -> None:
        """Ignore the attributes of an OrderedDict (`_metadata` of a state dict)."""
        state, target = self.pop(), self.top()
        if isinstance(target, OpaqueValue):
            return
        if not isinstance(target, OrderedDict) or not isinstance(state, (dict, OpaqueValue)):
            raise Malformed(f"it sets attributes of {class_name(target)}")

    def persistent(self) -> None:
        """Push the storage that a persistent id describes by class, key, place and number of elements."""
        self.push(persistent_storage(self.pop()))


def _describe_unknown(code: int) -> str:
    from pickletools import opcodes

    opcode = next((opcode for opcode in opcodes if ord(opcode.code) == code), None)
    if opcode is None:
        return f"{code:#04x} is no instruction of a pickle"
    return (
        f"the instruction {opcode.name} of pickle protocol {opcode.proto}, which torch.save does not write for weights "
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
    0x8F: lambda machine: machine.push(OpaqueValue("set")),
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
