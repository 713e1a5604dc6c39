"""The header of a safetensors file: what is accepted, what is refused, and that the library judges alike."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import safetensors_bytes
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from hsa.errors import HeaderError, SourceError
from hsa.sources.safetensors import MAX_HEADER, MAX_RANK, TensorEntry, parse, read_header, serialize
from hsa.system.dtypes import BITS
from hsa.system.fsio import SourceFile, Tally
from hsa.system.strict_json import load_json

DATA = bytes(range(64))


def tensor(code: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": code, "shape": shape, "data_offsets": [start, stop]}


def sound() -> dict[str, Any]:
    """Every sort of tensor: matrix, vector, scalar, empty; names out of the order of their places."""
    return {
        "__metadata__": {"format": "pt"},
        "w": tensor("F32", [2, 3], 0, 24),
        "empty": tensor("F16", [0, 7], 24, 24),
        "b": tensor("BF16", [4], 26, 34),
        "scalar": tensor("F16", [], 24, 26),
        "ids": tensor("I64", [3], 34, 58),
        "flags": tensor("U8", [2, 3], 58, 64),
    }


def text_of(document: Any) -> bytes:
    return json.dumps(document).encode()


# What is accepted ------------------------------------------------------------------------------------------


def test_entries_stand_in_the_order_of_their_places() -> None:
    entries, metadata = parse(text_of(sound()), 64, "here")
    assert [entry.name for entry in entries] == ["w", "empty", "scalar", "b", "ids", "flags"]
    assert entries[0] == TensorEntry("w", "F32", (2, 3), 0, 24)
    assert entries[2].shape == ()
    assert metadata == {"format": "pt"}


def test_padding_and_a_file_without_tensors() -> None:
    assert parse(b"{}      ", 0, "here") == ((), {})
    assert parse(text_of(sound()) + b" \n", 64, "here") == parse(text_of(sound()), 64, "here")


@pytest.mark.parametrize("code", sorted(BITS))
def test_every_element_type_has_the_size_that_the_library_gives_it(code: str) -> None:
    size = BITS[code]
    document = {"t": tensor(code, [8], 0, size)}
    ((name, found),) = deserialize(safetensors_bytes(document, DATA[:size]))
    (entry,), _ = parse(text_of(document), size, "here")
    assert (name, found["dtype"], tuple(found["shape"]), found["data"]) == ("t", code, entry.shape, DATA[:size])
    with pytest.raises(SafetensorError):
        deserialize(safetensors_bytes({"t": tensor(code, [8], 0, size - 1)}, DATA[: size - 1]))


def test_serialize_is_read_by_the_library_and_read_back() -> None:
    entries, metadata = parse(text_of(sound()), 64, "here")
    raw = serialize(entries, metadata)
    assert len(raw) % 8 == 0
    assert int.from_bytes(raw[:8], "little") == len(raw) - 8
    assert parse(raw[8:], 64, "here") == (entries, metadata)
    assert {name for name, _ in deserialize(raw + DATA)} == {entry.name for entry in entries}


def test_serialize_keeps_names_of_any_language() -> None:
    entries = (TensorEntry('größe "1"\n', "U8", (2,), 0, 2), TensorEntry("頭", "U8", (1,), 2, 3))
    raw = serialize(entries, {})
    assert parse(raw[8:], 3, "here") == (entries, {})
    assert {name for name, _ in deserialize(raw + b"abc")} == {'größe "1"\n', "頭"}


# What is refused -------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]

MALFORMED: dict[str, tuple[Change, str]] = {
    "overlap": (
        lambda d: d["b"].update(data_offsets=[25, 33]),
        "tensor b starts at data byte 25, expected 26.*overlaps",
    ),
    "same place": (
        lambda d: d["ids"].update(shape=[1], data_offsets=[26, 34]),
        "tensor ids .*26, expected 34.*overlaps",
    ),
    "hole": (lambda d: d.pop("scalar"), "tensor b starts at data byte 26, expected 24.*hole"),
    "does not start at 0": (lambda d: d.pop("w"), "starts at data byte 24, expected 0.*hole"),
    "out of bounds": (lambda d: d["flags"].update(shape=[8], data_offsets=[58, 66]), "end at data byte 66.*holds 64"),
    "extra data": (lambda d: d.pop("flags"), "end at data byte 58.*holds 64"),
    "shape too large": (
        lambda d: d["w"].update(shape=[2, 4]),
        r"tensor w: shape \[2, 4\] of F32 takes 32 bytes.*hold 24",
    ),
    "dtype too large": (lambda d: d["w"].update(dtype="F64"), "tensor w: shape .* of F64 takes 48 bytes.*hold 24"),
    "half a byte": (lambda d: d["flags"].update(dtype="F4", shape=[13]), "tensor flags: shape .* of F4 takes"),
    "unknown dtype": (lambda d: d["w"].update(dtype="F128"), "tensor w: unknown dtype 'F128'"),
    "dtype no string": (lambda d: d["w"].update(dtype=32), "tensor w: unknown dtype 32"),
    "dtype unhashable": (lambda d: d["w"].update(dtype=["F32"]), "tensor w: unknown dtype"),
    "negative size": (lambda d: d["w"].update(shape=[-2, -3]), r"tensor w: shape must be .* found \[-2, -3\]"),
    "float size": (lambda d: d["w"].update(shape=[2.0, 3]), r"tensor w: shape must be .* found \[2.0, 3\]"),
    "bool size": (lambda d: d["w"].update(shape=[True, 6]), r"tensor w: shape must be .* found \[True, 6\]"),
    "string size": (lambda d: d["w"].update(shape=["6"]), "tensor w: shape must be"),
    "null size": (lambda d: d["w"].update(shape=None), "tensor w: shape must be"),
    "shape no list": (lambda d: d["w"].update(shape=6), "tensor w: shape must be"),
    "too many dimensions": (lambda d: d["w"].update(shape=[6] + [1] * MAX_RANK), "tensor w: shape must be"),
    "size beyond 64 bits": (lambda d: d["w"].update(shape=[1 << 64, 0]), "tensor w: shape must be"),
    "product beyond 64 bits": (
        lambda d: d["empty"].update(shape=[1 << 62, 1 << 62, 0]),
        "tensor empty: shape .* larger than any file",
    ),
    "negative offset": (lambda d: d["w"].update(data_offsets=[-24, 0]), "tensor w: data_offsets must be .*-24"),
    "float offset": (lambda d: d["w"].update(data_offsets=[0.0, 24]), "tensor w: data_offsets must be"),
    "bool offset": (lambda d: d["w"].update(data_offsets=[False, 24]), "tensor w: data_offsets must be .*False"),
    "one offset": (lambda d: d["w"].update(data_offsets=[24]), "tensor w: data_offsets must be"),
    "three offsets": (lambda d: d["w"].update(data_offsets=[0, 24, 24]), "tensor w: data_offsets must be"),
    "ends before it starts": (
        lambda d: d["w"].update(data_offsets=[24, 0]),
        r"tensor w: data_offsets \[24, 0\] end before",
    ),
    "no dtype": (lambda d: d["w"].pop("dtype"), "tensor w: expected exactly dtype, shape and data_offsets"),
    "something else": (lambda d: d["w"].update(strides=[3, 1]), "tensor w: expected exactly"),
    "tensor no object": (lambda d: d.update(w=[1]), "tensor w: expected exactly"),
    "metadata no object": (lambda d: d.update(__metadata__=["pt"]), "__metadata__ must map"),
    "metadata no string": (lambda d: d.update(__metadata__={"format": 1}), "__metadata__ must map"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_document(name: str) -> None:
    change, message = MALFORMED[name]
    document = sound()
    change(document)
    with pytest.raises(HeaderError, match=f"^here: .*{message}"):
        parse(text_of(document), 64, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\x80\x02}q\x00.", "not valid JSON.*utf-8"),
        (b'{"\xff": 1}', "not valid JSON.*utf-8"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"{}{}", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON.*NaN"),
        (b'{"a": -Infinity}', "not valid JSON.*Infinity"),
        (b'{"a\nb": 1}', "not valid JSON"),
        (b'{"\\ud800": 1}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "tensor a|not valid JSON"),
        (b'{"a":' + b"[" * 100_000, "not valid JSON.*nested too deeply"),
        (b'{"a":' + b"[" * 65 + b"]" * 65 + b"}", "not valid JSON.*nested too deeply"),
        (b'{"a":' + b"[" * 200_000, "header of 200005 bytes with 200001 brackets, braces and commas, at most"),
        (b'{"a":"' + b"x" * MAX_HEADER + b'"}', f"header of {MAX_HEADER + 8} bytes with 1 brackets"),
        (b'{"a": 1e999}', "not valid JSON.*1e999 is out of range"),
        (b"[]", "must be a JSON object, found list"),
        (b"null", "must be a JSON object, found NoneType"),
        (b"1", "must be a JSON object, found int"),
        (b'{"a": {}, "a": {}}', "names 'a' twice"),
        (b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}', "names 'dtype' twice"),
        (b'{"a": {"dtype": "U8", "shape": [-0], "data_offsets": [0, 0]}}', "tensor a: shape must be"),
    ],
)
def test_malformed_text(text: bytes, message: str) -> None:
    with pytest.raises(HeaderError, match=f"^here: .*{message}"):
        parse(text, 0, "here")


def test_what_the_text_is_called_stands_in_the_message() -> None:
    with pytest.raises(HeaderError, match=r"^base: /x/config\.json: config is not valid JSON"):
        load_json(b"{", "base: /x/config.json", "config")


# Files -----------------------------------------------------------------------------------------------------


def header_of(path: Path, tally: Tally | None = None) -> Any:
    source = SourceFile(path, "primary", tally or Tally())
    try:
        return read_header(source)
    finally:
        source.close()


def test_a_file_gives_its_raw_header_and_reads_no_data(tmp_path: Path) -> None:
    file, tally = tmp_path / "model.safetensors", Tally()
    raw = safetensors_bytes(sound())
    file.write_bytes(raw + DATA)
    header = header_of(file, tally)
    assert header.raw == raw
    assert header.entries == parse(raw[8:], 64, "here")[0]
    assert tally.read == len(raw)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file: 0 bytes, expected at least 8"),
        (b"\x02\0\0\0", "no safetensors file: 4 bytes, expected at least 8"),
        ((3).to_bytes(8, "little") + b"{}", "truncated: its header ends at byte 11, the file at 10"),
        ((MAX_HEADER + 1).to_bytes(8, "little") + b"{}", f"header of {MAX_HEADER + 1} bytes, at most {MAX_HEADER}"),
        (b"\xff" * 16, f"header of {2**64 - 1} bytes, at most {MAX_HEADER}"),
        ((0).to_bytes(8, "little"), "header is not valid JSON"),
        (safetensors_bytes(sound(), DATA)[:-1], "end at data byte 64, the file holds 63 data bytes"),
        (safetensors_bytes(sound(), DATA + b"x"), "end at data byte 64, the file holds 65 data bytes"),
        (b"PK\x03\x04" + bytes(60), "header of .* bytes|truncated"),
    ],
)
def test_damaged_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(HeaderError, match=f"^primary: {file}.*({message})"):
        header_of(file)


def test_a_header_at_the_limit_is_judged_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as out:
        out.write(MAX_HEADER.to_bytes(8, "little"))
        out.truncate(8 + MAX_HEADER)
    with pytest.raises(HeaderError, match="header is not valid JSON"):
        header_of(file)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    import os

    folder, pipe = tmp_path / "folder.safetensors", tmp_path / "pipe.safetensors"
    folder.mkdir()
    os.mkfifo(pipe)
    for path in (folder, pipe):
        with pytest.raises(SourceError, match=f"^primary: {path} is not a regular file"):
            header_of(path)


# The library judges alike ----------------------------------------------------------------------------------


def library_view(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Name to element type, shape and data as the safetensors library reads them; None where it refuses."""
    try:
        found = deserialize(raw)
    except SafetensorError:
        return None
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in found}


def our_view(raw: bytes, folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """The same through read_header; None on HeaderError, the one exception that is allowed."""
    file = folder / "mutated.safetensors"
    file.write_bytes(raw)
    try:
        header = header_of(file)
    except HeaderError as error:
        assert str(error).isprintable()
        return None
    data = raw[len(header.raw) :]
    return {e.name: (e.code, e.shape, data[e.start : e.stop]) for e in header.entries}


def compare(raw: bytes, folder: Path) -> bool:
    """Check that what we accept, the library accepts with the same tensors; whether we accepted."""
    ours = our_view(raw, folder)
    if ours is not None:
        assert ours == library_view(raw)
    event("accepted" if ours is not None else "refused")
    return ours is not None


ODD_VALUES = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([1 << 31, 1 << 62, 1 << 63, (1 << 64) - 1, 1 << 64, -1, 1e3, 0.5, True, False, None, "", "F32"]),
    st.sampled_from(sorted(BITS)),
    st.lists(st.integers(0, 8), max_size=3),
    st.lists(st.sampled_from([0, 1, 2, 1 << 62, 1 << 63, -0.0, "1"]), max_size=4),
    st.text(max_size=4),
)


def slots(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [slot for key in keys for slot in slots(value[key])]


@st.composite
def documents(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A valid header and the size of its data."""
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), unique=True, max_size=5))
    document: dict[str, Any] = {}
    position = 0
    for name in names:
        code = draw(st.sampled_from(["F32", "F16", "BF16", "U8", "I64", "BOOL", "F8_E4M3"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = BITS[code] // 8
        for extent in shape:
            size *= extent
        if name != "__metadata__":
            document[name] = tensor(code, shape, position, position + size)
            position += size
    if draw(st.booleans()):
        document["__metadata__"] = draw(
            st.dictionaries(st.text("ab", max_size=2), st.text("xy", max_size=3), max_size=2)
        )
    return document, position


RUNS = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@RUNS
@given(valid=documents(), escaped=st.booleans())
def test_a_valid_header_is_accepted_with_the_librarys_tensors(
    valid: tuple[dict[str, Any], int], escaped: bool, tmp_path: Path
) -> None:
    document, size = valid
    text = json.dumps(document, ensure_ascii=escaped).encode()
    assert compare(safetensors_bytes(text, random.Random(0).randbytes(size)), tmp_path)


@RUNS
@given(valid=documents(), data=st.data())
def test_changed_values_are_refused_or_read_as_the_library_reads_them(
    valid: tuple[dict[str, Any], int], data: st.DataObject, tmp_path: Path
) -> None:
    document, size = valid
    for _ in range(data.draw(st.integers(1, 3))):
        places = slots(document)
        if not places:
            return
        container, key = data.draw(st.sampled_from(places))
        if data.draw(st.booleans()) or isinstance(container, list):
            container[key] = data.draw(ODD_VALUES)
        else:
            container[data.draw(st.text(max_size=3))] = container.pop(key)
    size += data.draw(st.sampled_from([0, 0, 0, -1, 1, 8]))
    compare(safetensors_bytes(document, random.Random(0).randbytes(max(0, size))), tmp_path)


@RUNS
@given(valid=documents(), data=st.data())
def test_changed_bytes_are_refused_or_read_as_the_library_reads_them(
    valid: tuple[dict[str, Any], int], data: st.DataObject, tmp_path: Path
) -> None:
    document, size = valid
    text = bytearray(json.dumps(document, ensure_ascii=False).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 3)))
        token = st.sampled_from(
            [b"", b"-", b"0", b"1", b".", b"e", b'"', b"\\u", b"\\ud8", b",", b" ", b"{", b"]", b"\0"]
        )
        text[start:stop] = data.draw(st.one_of(token, st.binary(max_size=3)))
    compare(safetensors_bytes(bytes(text), random.Random(0).randbytes(size)), tmp_path)


@RUNS
@given(raw=st.binary(max_size=80), length=st.none() | st.integers(0, 80))
def test_any_bytes_at_all(raw: bytes, length: int | None, tmp_path: Path) -> None:
    compare(raw if length is None else length.to_bytes(8, "little") + raw, tmp_path)
