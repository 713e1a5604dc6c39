"""Files just under the limits on size and structure, each made to take as much memory as it can. Too large to keep."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator

from hsa.header import MAX_HEADER, MAX_MARKS
from hsa.pickled import MAX_PICKLE

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
    for name, text in texts():
        yield name, _within(start + text[1 : MAX_HEADER - len(start)])


def pickles() -> Iterator[tuple[str, bytes]]:
    """Descriptions of tensors in their language, by what they are full of."""
    room = MAX_PICKLE - 200
    make = b"\x80\x02"
    yield "lists", make + b"]" * room + b"."
    yield "marks", make + b"(" * room + b"."
    yield "ordered dicts", make + b"ccollections\nOrderedDict\nq\0" + b"h\0)R" * (room // 4) + b"."
    yield "one number", make + b"\x8b" + (room).to_bytes(4, "little") + b"\x7f" * room + b"."
    yield "length", make + b"X" + b"\xff\xff\xff\x7f" + b"x" * 100 + b"."
    rebuilt = (
        b"ctorch._utils\n_rebuild_tensor_v2\nq\0((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0"
        b"0X\x03\0\0\0cpuK\x04tQK\0K\x04\x85K\x01\x85\x89ccollections\nOrderedDict\n)Rtq\x01"
    )
    yield "tensors", make + rebuilt + b"h\0h\x01R" * ((room - len(rebuilt)) // 5) + b"."
    large = rebuilt.replace(b"K\x04\x85", b"\x8a\x06\0\0\0\0\0\x10\x85")
    yield "a large tensor", make + large + b"h\0h\x01R."


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
