"""Pickles that are small and cost much: `python tests/fuzz/bombs.py` writes those of tests/corpus, name by name.

Assembled by hand, for no pickler writes such. Each says what it does to a reader that builds what a pickle asks for.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

CORPUS = Path(__file__).resolve().parents[1] / "corpus"

PROTO, STOP, MARK, TUPLE, REDUCE, SETITEM, BUILD = b"\x80\x02", b".", b"(", b"t", b"R", b"s", b"b"
EMPTY_TUPLE, EMPTY_LIST, EMPTY_DICT, EMPTY_SET = b")", b"]", b"}", b"\x8f"
TUPLE1, TUPLE2, TUPLE3, APPEND, SETITEMS, PERSID = b"\x85", b"\x86", b"\x87", b"a", b"u", b"Q"
NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"

ORDERED_DICT = b"ccollections\nOrderedDict\n"
HOOKS = ORDERED_DICT + EMPTY_TUPLE + REDUCE
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """A whole number: as pickle writes it where it has up to 255 bytes, as LONG4 beyond."""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return (b"\x8a" + bytes([len(raw)]) if len(raw) < 256 else b"\x8b" + struct.pack("<I", len(raw))) + raw


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def items(*values: bytes) -> bytes:
    """A tuple of any length."""
    return MARK + b"".join(values) + TUPLE


def mapping(*pairs: bytes) -> bytes:
    """A dict of keys and values in turn."""
    return EMPTY_DICT + MARK + b"".join(pairs) + SETITEMS


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + items(*arguments) + REDUCE


def storage(kind: bytes = b"ctorch\nFloatStorage\n", key: bytes = text("0"), count: bytes = number(4)) -> bytes:
    return items(text("storage"), kind, key, text("cpu"), count) + PERSID


def tensor(
    size: bytes = items(number(4)),
    stride: bytes = items(number(1)),
    *,
    offset: bytes = number(0),
    held: bytes = storage(),
    grad: bytes = FALSE,
    hooks: bytes = HOOKS,
) -> bytes:
    return REBUILD + items(held, offset, size, stride, grad, hooks) + REDUCE


def shared(kind: str, levels: int = 40) -> bytes:
    """A container that holds another twice, and so on down: it has 2**levels items for what walks it."""
    made = {"tuple": EMPTY_TUPLE, "list": EMPTY_LIST, "dict": EMPTY_DICT, "frozenset": EMPTY_TUPLE}[kind]
    for level in range(levels):
        made += put(level)
        if kind == "tuple":
            made += get(level) + TUPLE2
        elif kind == "list":
            made += b"0" + EMPTY_LIST + MARK + get(level) * 2 + b"e"
        elif kind == "dict":
            made += b"0" + mapping(text("a"), get(level), text("b"), get(level))
        else:
            made += b"0" + call("builtins", "frozenset", EMPTY_LIST + get(level) + APPEND)
    return made


def unpopped(kind: str, levels: int = 40) -> bytes:
    """The same without POP, which torch's own reader does not know: the levels are left below it."""
    made = {"tuple": EMPTY_TUPLE, "list": EMPTY_LIST, "dict": EMPTY_DICT}[kind] + put(0)
    for level in range(levels):
        if kind == "tuple":
            made += get(level) + get(level) + TUPLE2 + put(level + 1)
        elif kind == "list":
            made += EMPTY_LIST + MARK + get(level) * 2 + b"e" + put(level + 1)
        else:
            made += mapping(text("a"), get(level), text("b"), get(level)) + put(level + 1)
    return made


def pickles() -> Iterator[tuple[str, bytes]]:
    """State dicts, by what is wrong with them."""
    for kind in ("tuple", "list", "dict"):
        yield f"shared-{kind}s-as-a-value", PROTO + unpopped(kind) + mapping(text("w"), get(40)) + STOP
        yield f"shared-{kind}s-as-the-whole", PROTO + unpopped(kind) + get(40) + STOP
        yield (
            f"shared-{kind}s-as-an-attribute",
            (PROTO + unpopped(kind) + HOOKS + mapping(text("_metadata"), get(40)) + BUILD + STOP),
        )
        yield f"shared-{kind}s-as-a-size", PROTO + unpopped(kind) + mapping(text("w"), tensor(size=get(40))) + STOP
        yield f"shared-{kind}s-with-pop", PROTO + mapping(text("w"), shared(kind)) + STOP
    yield "shared-frozensets", PROTO + mapping(text("w"), shared("frozenset")) + STOP
    yield (
        "shared-sets",
        PROTO
        + EMPTY_SET
        + put(0)
        + b"".join(EMPTY_SET + MARK + get(level) + b"\x90" + put(level + 1) for level in range(40))
        + STOP,
    )
    yield "shared-tuples-as-a-key", PROTO + unpopped("tuple") + mapping(get(40), tensor()) + STOP
    yield (
        "shared-tuples-as-a-storage-key",
        PROTO + unpopped("tuple") + mapping(text("w"), tensor(held=storage(key=get(40)))) + STOP,
    )
    yield "shared-tuples-as-an-argument", PROTO + unpopped("tuple") + call("torch", "Size", get(40)) + STOP
    yield "nested-tuples-as-a-key", PROTO + mapping(EMPTY_TUPLE + TUPLE1 * 15_000, tensor()) + STOP
    yield "a-tensor-as-a-key", PROTO + mapping(tensor(), tensor()) + STOP
    yield "a-list-as-a-key", PROTO + mapping(EMPTY_LIST, tensor()) + STOP
    yield "a-number-of-many-digits-as-a-key", PROTO + mapping(number(1 << 60_000), tensor()) + STOP
    yield "a-number-of-600-digits-as-a-value", PROTO + mapping(text("w"), number(1 << 2000)) + STOP
    yield "a-number-of-many-digits-as-a-value", PROTO + mapping(text("w"), number(1 << 100_000)) + STOP
    yield "a-text-number-of-many-digits", PROTO + mapping(text("w"), b"I" + b"9" * 15_000 + b"\n") + STOP
    yield "a-long-text-number", PROTO + mapping(text("w"), b"L" + b"9" * 15_000 + b"L\n") + STOP
    yield "a-list-that-holds-itself", PROTO + EMPTY_LIST + put(0) + get(0) + APPEND + STOP
    yield "a-dict-that-holds-itself", PROTO + EMPTY_DICT + put(0) + text("w") + get(0) + SETITEM + STOP
    yield "a-tuple-that-holds-itself", PROTO + EMPTY_LIST + put(0) + get(0) + TUPLE1 + APPEND + get(0) + TUPLE1 + STOP
    yield "an-attribute-that-holds-itself", (PROTO + HOOKS + put(0) + mapping(text("_metadata"), get(0)) + BUILD + STOP)
    yield (
        "attributes-that-hide-methods",
        (
            PROTO
            + HOOKS
            + text("w")
            + tensor()
            + SETITEM
            + mapping(text("items"), NONE, text("get"), NONE)
            + BUILD
            + STOP
        ),
    )
    yield (
        "a-bytearray-of-2-gib",
        PROTO + mapping(text("w"), call("builtins", "bytearray", number((1 << 31) - 1))) + STOP,
    )
    yield (
        "many-bytearrays",
        PROTO + EMPTY_LIST + MARK + call("builtins", "bytearray", number(1 << 29)) * 40 + b"e" + STOP,
    )
    yield (
        "a-slow-codec",
        PROTO + mapping(text("w"), call("_codecs", "encode", text("\u00e9\u4e00" * 3000), text("punycode"))) + STOP,
    )
    yield "a-counter-of-a-text", PROTO + mapping(text("w"), call("collections", "Counter", text("ab" * 5000))) + STOP
    yield "a-set-of-a-list", PROTO + mapping(text("w"), call("builtins", "set", EMPTY_LIST + text("a") + APPEND)) + STOP
    yield (
        "a-tensor-by-its-class",
        PROTO + mapping(text("w"), call("torch", "Tensor", number(1 << 30), number(1 << 10))) + STOP,
    )
    yield (
        "an-ordered-dict-of-a-list",
        PROTO + call("collections", "OrderedDict", EMPTY_LIST + items(text("w"), tensor()) + APPEND) + STOP,
    )
    yield (
        "a-size-of-huge-numbers",
        PROTO + mapping(text("w"), call("torch", "Size", items(number(1 << 62), number(1 << 62)))) + STOP,
    )
    yield "dtypes-for-numbers", PROTO + mapping(text("w"), tensor(offset=b"ctorch\nfloat32\n")) + STOP
    yield "a-dtype-for-a-storage", PROTO + mapping(text("w"), tensor(held=storage(kind=b"ctorch\nfloat32\n"))) + STOP
    yield "a-storage-of-everything", PROTO + mapping(text("w"), tensor(held=storage(count=number(1 << 62)))) + STOP
    yield "a-storage-of-less-than-nothing", PROTO + mapping(text("w"), tensor(held=storage(count=number(-4)))) + STOP
    yield "a-storage-by-a-path", PROTO + mapping(text("w"), tensor(held=storage(key=text("../data.pkl")))) + STOP
    yield (
        "sizes-beyond-any-file",
        PROTO + mapping(text("w"), tensor(items(*[number(1 << 40)] * 3), items(*[number(1)] * 3))) + STOP,
    )
    yield "sizes-below-nothing", PROTO + mapping(text("w"), tensor(items(number(-4)))) + STOP
    yield (
        "sizes-that-multiply-to-zero",
        PROTO + mapping(text("w"), tensor(items(number(1 << 58), number(0)), items(number(1), number(1)))) + STOP,
    )
    yield "strides-beyond-any-file", PROTO + mapping(text("w"), tensor(items(number(4)), items(number(1 << 59)))) + STOP
    yield "an-offset-below-nothing", PROTO + mapping(text("w"), tensor(offset=number(-1 << 40))) + STOP
    yield (
        "thousands-of-dimensions",
        PROTO + mapping(text("w"), tensor(items(*[b"K\1"] * 4000), items(*[b"K\1"] * 4000))) + STOP,
    )
    yield "true-for-a-size", PROTO + mapping(text("w"), tensor(items(TRUE), items(TRUE))) + STOP
    yield (
        "hooks-that-are-there",
        PROTO + mapping(text("w"), tensor(hooks=HOOKS + text("a") + tensor() + SETITEM)) + STOP,
    )
    yield (
        "parameters-of-parameters",
        PROTO + mapping(text("w"), PARAMETER * 300 + tensor() + (FALSE + HOOKS + TUPLE3 + REDUCE) * 300) + STOP,
    )
    yield "marks", PROTO + MARK * 19_000 + STOP
    yield "lists-in-lists", PROTO + EMPTY_LIST * 9_000 + APPEND * 8_999 + STOP
    yield "dicts-in-dicts", PROTO + (EMPTY_DICT + text("w")) * 2_000 + NONE + SETITEM * 2_000 + STOP
    yield "values-twice", PROTO + EMPTY_LIST + b"2" * 9_000 + APPEND * 9_000 + STOP
    yield "a-value-below-the-mark", PROTO + text("a") + MARK + APPEND + STOP
    yield "nothing-at-the-end", PROTO + STOP
    yield "no-end", PROTO + EMPTY_DICT
    yield "a-memo-index-beyond-any-memo", PROTO + EMPTY_DICT + put((1 << 32) - 1) + get((1 << 32) - 1) + STOP
    yield "a-text-memo-index", PROTO + EMPTY_DICT + b"p" + b"9" * 15_000 + b"\n" + STOP
    yield "a-memo-that-was-never-set", PROTO + get(7) + STOP
    yield "memo-indexes-from-anywhere", PROTO + EMPTY_DICT + b"".join(put(n << 18) for n in range(3_000)) + STOP
    yield (
        "keys-with-one-hash",
        PROTO + mapping(*(part for n in range(1, 1_000) for part in (number(n * ((1 << 61) - 1)), NONE))) + STOP,
    )
    yield (
        "keys-with-close-hashes",
        PROTO + mapping(*(part for n in range(1_000) for part in (number(n << 40), NONE))) + STOP,
    )
    yield "a-name-twice", PROTO + mapping(text("w"), tensor(), text("w"), tensor()) + STOP
    yield "a-frame-that-lies", b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + EMPTY_DICT + STOP
    yield "bytes-of-an-exbibyte", PROTO + b"\x8e" + struct.pack("<Q", 1 << 60) + b"x" + STOP
    yield "a-text-of-an-exbibyte", PROTO + b"\x8d" + struct.pack("<Q", 1 << 60) + b"x" + STOP
    yield "a-text-of-4-gib", PROTO + b"X\xff\xff\xff\xff" + b"x" + STOP
    yield "bytes-of-4-gib", PROTO + b"B\xff\xff\xff\xff" + b"x" + STOP
    yield "a-bytearray-of-an-exbibyte", b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"x" + STOP
    yield "a-buffer-from-outside", b"\x80\x05\x97" + STOP
    yield "a-number-that-ends-too-soon", PROTO + b"\x8a\xff\x01" + STOP
    yield "a-number-of-2-gib", PROTO + b"\x8b\xff\xff\xff\x7f\x01" + STOP
    yield "half-characters", PROTO + mapping(text(b"\xed\xa0\x80w"), tensor()) + STOP
    yield "a-text-that-is-none", PROTO + mapping(text(b"\xff\xfe"), tensor()) + STOP
    yield "a-long-name", PROTO + mapping(text("w" * 15_000), NONE) + STOP
    yield "a-long-class-name", PROTO + b"c" + b"a" * 15_000 + b"\nb\n" + STOP
    yield "a-class-name-without-an-end", PROTO + b"ctorch\n" + b"a" * 15_000
    yield "an-extension", PROTO + b"\x82\x01" + STOP
    yield "an-instance", PROTO + MARK + b"ibuiltins\nlist\n" + STOP
    yield "an-object", PROTO + MARK + b"cbuiltins\nset\n" + b"o" + STOP
    yield "a-new-object", PROTO + b"cbuiltins\nset\n" + EMPTY_TUPLE + b"\x81" + STOP
    yield "a-persistent-text", PROTO + b"P0\n" + STOP
    yield "a-persistent-number", PROTO + number(0) + PERSID + STOP
    yield "a-call-of-a-tensor", PROTO + mapping(text("w"), tensor() + EMPTY_TUPLE + REDUCE) + STOP
    yield "a-call-with-a-list", PROTO + mapping(text("w"), ORDERED_DICT + EMPTY_LIST + REDUCE) + STOP


SOUND_DIMS = dict.fromkeys(("n_audio_layer", "n_audio_head", "n_text_layer", "n_text_head"), 1) | dict.fromkeys(
    ("n_audio_state", "n_mels", "n_audio_ctx", "n_text_ctx", "n_vocab"), 8
)


def openai(dims: bytes, weights: bytes, start: bytes = b"") -> bytes:
    """A file of OpenAI's; `start` are values that lie below it on the stack."""
    return PROTO + start + mapping(text("dims"), dims, text("model_state_dict"), weights) + STOP


def dimensions() -> Iterator[tuple[str, bytes]]:
    """Files of OpenAI's, by what is wrong with their dimensions or the names of their tensors."""
    weights = mapping(text("decoder.ln.weight"), tensor())
    dims = mapping(*(part for name, size in SOUND_DIMS.items() for part in (text(name), number(size))))
    for kind in ("tuple", "list", "dict"):
        bomb, made = get(40), unpopped(kind)
        yield f"shared-{kind}s-as-dims", openai(bomb, weights, made)
        yield f"shared-{kind}s-as-a-dimension", openai(mapping(text("n_audio_state"), bomb), weights, made)
        yield f"shared-{kind}s-as-weights", openai(dims, bomb, made)
        yield f"shared-{kind}s-as-a-tensor", openai(dims, mapping(text("encoder.conv1.bias"), bomb), made)
        yield f"shared-{kind}s-beside-it", openai(dims, mapping(text("x"), bomb), made)
    yield "shared-tuples-as-the-name-of-a-dimension", openai(mapping(get(40), number(8)), weights, unpopped("tuple"))
    yield "shared-tuples-as-the-name-of-a-tensor", openai(dims, mapping(get(40), tensor()), unpopped("tuple"))
    for digits, value in (("600", 1 << 2000), ("many", 1 << 100_000)):
        yield f"a-dimension-of-{digits}-digits", openai(mapping(text("n_audio_state"), number(value)), weights)
        yield f"the-name-of-a-tensor-of-{digits}-digits", openai(dims, mapping(number(value), tensor()))
    yield "a-dimension-that-is-a-tensor", openai(mapping(text("n_audio_state"), tensor()), weights)
    many = mapping(*(part for name in SOUND_DIMS for part in (text(name), number(1 << 40))))
    yield "more-layers-than-any-model", openai(many, mapping())
    yield "dims-twice", PROTO + mapping(text("dims"), EMPTY_DICT, text("dims"), EMPTY_DICT) + STOP


def write(corpus: Path) -> None:
    for target, made in (("pickle", pickles()), ("openai", dimensions()), ("adapter_pickle", pickles())):
        for name, data in made:
            if target != "adapter_pickle" or name.startswith("shared-tuples"):
                (corpus / target).mkdir(parents=True, exist_ok=True)
                (corpus / target / name).write_bytes(data)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else CORPUS)
