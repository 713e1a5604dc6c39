"""Files just under the limits on size and structure, each made to take as much memory as it can. Too large to keep."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator

from bombs import (
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    MARK,
    ORDERED_DICT,
    PARAMETER,
    PROTO,
    REBUILD,
    STOP,
    TUPLE,
    TUPLE1,
    items,
    mapping,
    put,
    storage,
    tensor,
    text,
)

from hsa.releases.recipe import MAX_BYTES
from hsa.sources.checkpoint import MAX_TEXT
from hsa.sources.pickle_reader import MAX_OPCODES
from hsa.sources.safetensors import MAX_HEADER
from hsa.sources.small_file_checks import MAX_VOCABULARY_MARKS
from hsa.sources.torch_pickle import MAX_PICKLE
from hsa.system.strict_json import MAX_MARKS
from hsa.system.strict_yaml import MAX_VALUES

ROOM = MAX_PICKLE - 1000
"""Bytes of a description that is full of one thing."""

WIDE = "\U0001f600"
"""One such character makes Python keep four bytes for every character of the text."""


def texts() -> Iterator[tuple[str, bytes]]:
    """JSON objects by what they are full of."""
    half = MAX_MARKS - 50
    yield "lists", _within(b'{"a":[' + b"[]," * (half // 2) + b"[]]}")
    yield "objects", _within(b'{"a":[' + b"{}," * (half // 2) + b"{}]}")
    yield "objects of one", _within(b'{"a":[' + b'{"a":0},' * (half // 2) + b"0]}")
    yield "objects of eleven", _within(b'{"a":[' + (b"{%s}," % _pairs(11)) * (half // 13) + b"0]}")
    yield "names", _within(b"{" + _pairs(half, 40) + b"}")
    yield "names that are wide", _within(b"{" + _pairs(half, 15, WIDE) + b"}")
    yield "texts that are wide", _within(b'{"a":[' + f'"{WIDE}{"x" * 55}",'.encode() * half + b"0]}")
    yield "escaped", _within(b'{"a":"' + b"\\ud83d\\ude00" * ((MAX_HEADER - 50) // 12) + b'"}')
    yield "one name", _within(b'{"' + b"\\u0001" * ((MAX_HEADER - 50) // 6) + b'":1}')
    yield "one wide name", _within(b'{"' + WIDE.encode() + b"x" * (MAX_HEADER - 50) + b'":1}')
    yield "numbers of 4300 digits", _within(b'{"a":[' + (b"9" * 4300 + b",") * ((MAX_HEADER - 50) // 4301) + b"0]}")
    yield "fractions", _within(b'{"a":[' + (b"1." + b"3" * 50 + b",") * half + b"0]}")
    yield "spaces", b"{}" + b" " * (MAX_HEADER - 2)
    yield "nesting", _within(b'{"a":' + b"[" * (half - 2))
    yield "nesting of objects", _within(b'{"a":' * (half - 2))
    yield "one name again", _within(b"{" + b'"a":0,' * half + b'"a":0}')
    yield "one long name again", _within(b'{"%s":0,"%s":0}' % ((b"\\u0001" * (MAX_HEADER // 12 - 20),) * 2))
    yield "metadata", _within(b'{"__metadata__":{' + b",".join(b'"%06d":"%06d"' % (n, n) for n in range(half)) + b"}}")
    yield "tensors", tensors(MAX_MARKS // 7 - 10)
    yield "shapes", _within(b'{"a":{"dtype":"U8","shape":[' + b"1," * half + b'1],"data_offsets":[0,1]}}')


def tensors(count: int) -> bytes:
    """A sound header of so many empty tensors."""
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"{number:06d}":{empty}' for number in range(count)) + "}").encode()


def configs() -> Iterator[tuple[str, bytes]]:
    """Sound configs, with as much beside it as can be."""
    sound = {
        "model_type": "whisper",
        "encoder_layers": 1,
        "decoder_layers": 10_000,
        "encoder_attention_heads": 1,
        "decoder_attention_heads": 1,
    }
    start = json.dumps(sound).encode()[:-1] + b","
    for name, full in texts():
        yield name, _within(start + full[1 : MAX_HEADER - len(start)])


def tokenizers() -> Iterator[tuple[str, bytes]]:
    """Sound files with a vocabulary and as much beside it as can be, by what they are full of."""
    half = MAX_VOCABULARY_MARKS - 50
    start = b'{"model":{"vocab":{"a":0}},"added_tokens":['
    yield "ids", start + b'{"id":1},' * (half // 2) + b"0]}"
    yield "lists", start + b"[]," * (half // 2) + b"0]}"
    yield "texts that are wide", start + f'"{WIDE}{"x" * 8}",'.encode() * half + b"0]}"
    yield "one wide text", start + b'"' + WIDE.encode() + b"x" * (MAX_TEXT - len(start) - 20) + b'"]}'
    yield "names", b'{"model":{"vocab":{' + _pairs(half, 8) + b"}}}"
    yield "names that are wide", b'{"model":{"vocab":{' + _pairs(half // 2, 8, WIDE) + b"}}}"
    yield "pairs", start + b'["ab","cd"],' * (half // 3) + b"0]}"
    yield "nesting", b'{"model":' * (half - 2)


def pickles() -> Iterator[tuple[str, bytes]]:
    """Descriptions of tensors in their language, by what they are full of: as long as they may be, or as many
    instructions."""
    yield "lists", _full(EMPTY_LIST, 1)
    yield "dicts", _full(EMPTY_DICT, 1)
    yield "marks", _full(MARK, 1)
    yield "tuples", _full(MARK + TUPLE, 2)
    yield "tuples in tuples", _full(TUPLE1, 1, EMPTY_TUPLE)
    yield "ordered dicts", _full(b"h\0)R", 3, ORDERED_DICT + b"q\0")
    yield "calls", _full(b"h\0)R", 3, b"ctorch\nSize\nq\0")
    yield "names of classes", _full(b"ctorch\nSize\n", 1)
    yield "long names of classes", _full(b"ctorch\nfloat32" + b"_" * 900 + b"\n", 1)
    yield "one number", PROTO + b"\x8b" + (ROOM).to_bytes(4, "little") + b"\x7f" * ROOM + STOP
    yield "numbers", _full(b"\x8a\x08" + b"\x7f" * 8, 1)
    yield "a length that is a lie", PROTO + b"X" + b"\xff\xff\xff\x7f" + b"x" * 100 + STOP
    yield "one wide text", PROTO + text(WIDE * (ROOM // 4)) + STOP
    yield "memo", PROTO + EMPTY_TUPLE + b"".join(put(number << 4) for number in range(ROOM // 5)) + STOP
    storages = text("storage") + b"q\0ctorch\nFloatStorage\nq\1" + text("cpu") + b"q\2"
    yield "storages", _full(b"(h\0h\1h\2h\2K\1tQ", 8, storages)
    tensors = storage() + b"q\0" + REBUILD + b"q\1" + ORDERED_DICT + b"q\2"
    yield "tensors", _full(b"h\1(h\0K\0))\x89h\2)RtR", 11, tensors)
    parameters = PARAMETER + b"q\0" + ORDERED_DICT + b"q\1" + tensor() + b"q\2"
    yield "parameters", _full(b"h\0h\2\x89h\1)R\x87R", 8, parameters)
    yield "names", PROTO + mapping(*(b"U\x06%06xN" % number for number in range(ROOM // 9))) + STOP
    for name, made in (
        ("names of one tensor", tensor()),
        ("names of one tensor of many dimensions", tensor(items(*[b"K\1"] * 64), items(*[b"K\1"] * 64))),
        ("names of one tensor of no elements", tensor(items(b"K\0", *[b"K\2"] * 63), items(*[b"K\1"] * 64))),
    ):
        many = min(ROOM // 10, (MAX_OPCODES - 400) // 2)
        yield name, PROTO + made + b"q\0" + mapping(*(b"U\x06%06xh\0" % number for number in range(many))) + STOP
    for name, step in (("numbers for keys", 1), ("numbers for keys that collide", 1 << 45)):
        keys = (b"\x8a\x08" + (number * step).to_bytes(8, "little") + b"N" for number in range(ROOM // 11))
        yield name, PROTO + mapping(*keys) + STOP


def _full(unit: bytes, instructions: int, start: bytes = b"") -> bytes:
    """The unit as often as the limits on length and instructions let through."""
    return PROTO + start + unit * min((ROOM - len(start)) // len(unit), (MAX_OPCODES - 60) // instructions) + STOP


def recipes() -> Iterator[tuple[str, bytes]]:
    """Recipes by what they are full of."""
    yield "values", b"merges: [" + b"a," * (MAX_VALUES - 10) + b"]"
    yield "too many values", b"merges: [" + b"a," * (MAX_BYTES // 2 - 10) + b"]"
    yield "lines", b"merges:\n" + b"- a\n" * (MAX_VALUES - 10)
    yield "keys", b"merges: {" + b"".join(b"a%x: b," % number for number in range(MAX_VALUES // 2 - 10)) + b"}"
    yield "escapes", b'title: "' + b"\\x41" * (MAX_BYTES // 4 - 10) + b'"'
    yield "one number to the base of 60", b"title: 1" + b":59" * (MAX_BYTES // 3 - 10)
    yield "one hexadecimal number", b"title: 0x" + b"f" * (MAX_BYTES - 20)


def archives() -> Iterator[tuple[str, bytes]]:
    """Zip archives with as many records, or as large a directory, as can be."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        for number in range((MAX_PICKLE - 100) // 52):
            archive.writestr(f"a{number:05d}", b"")
    yield "records", held.getvalue()
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/version", b"3" * (64 << 20))
    yield "a large version", held.getvalue()


def _pairs(count: int, width: int = 1, start: str = "") -> bytes:
    return ",".join(f'"{start}{number:0{width}d}":0' for number in range(count)).encode()


def _within(text: bytes) -> bytes:
    """The text, cut where it is longer than what is parsed at all: the rest of the limits is the file's own affair."""
    return text[:MAX_HEADER]
