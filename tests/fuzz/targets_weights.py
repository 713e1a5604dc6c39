"""Hostile weights: safetensors, and pickles in their archives."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from arena import Arena, sound_bytes

from hsa.sources.checkpoint import PICKLES, WEIGHTS
from hsa.sources.lora import WEIGHTS as ADAPTER_WEIGHTS

# Safetensors ---------------------------------------------------------------------------------------------------------


def split_header(raw: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:end], raw[end:]


def merge_header(arena: Arena, data: bytes) -> str:
    path = arena.sharded / "model-00001-of-00002.safetensors"
    _, tensors = split_header(sound_bytes(arena, path))
    path.write_bytes(len(data).to_bytes(8, "little") + data + tensors)
    try:
        return arena.merge(primary=arena.sharded)
    finally:
        path.write_bytes(sound_bytes(arena, path))


def header_seeds(arena: Arena) -> Iterable[bytes]:
    yield split_header((arena.sharded / "model-00001-of-00002.safetensors").read_bytes())[0]
    yield b"{}"


def merge_weights(arena: Arena, data: bytes) -> str:
    path = arena.triple["secondary"] / WEIGHTS
    sound = sound_bytes(arena, path)
    path.write_bytes(data)
    try:
        return arena.merge()
    finally:
        path.write_bytes(sound)


def weights_seeds(arena: Arena) -> Iterable[bytes]:
    yield b"\x02\0\0\0\0\0\0\0{}"
    header = b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}'
    yield len(header).to_bytes(8, "little") + header + b"\0\x3c\0\x3c"
    yield (arena.triple["secondary"] / WEIGHTS).read_bytes()


# Pickles -------------------------------------------------------------------------------------------------------------


def _records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _archive(records: Mapping[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return held.getvalue()


def _described(data: bytes, sound: bytes) -> bytes:
    """A sound archive with another description of its tensors, padded like the sound one so that places still fit."""
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        (record,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    if len(data) > record.file_size:
        return _archive({**records, record.filename: data})
    start = record.header_offset + 30 + int.from_bytes(sound[record.header_offset + 26 :][:2], "little")
    start += int.from_bytes(sound[record.header_offset + 28 :][:2], "little")
    return sound[:start] + data.ljust(record.file_size, b"\0") + sound[start + record.file_size :]


def merge_pickle(arena: Arena, data: bytes) -> str:
    path = arena.pickled / PICKLES.weights
    sound = sound_bytes(arena, path)
    path.write_bytes(_described(data, sound))
    try:
        return arena.merge(secondary=arena.pickled)
    finally:
        path.write_bytes(sound)


def pickle_seeds(arena: Arena) -> Iterable[bytes]:
    (text,) = (data for name, data in _records(arena.pickled / PICKLES.weights).items() if name.endswith("data.pkl"))
    yield text
    yield b"\x80\x02cos\nsystem\nX\x04\0\0\0trueR."
    yield b"\x80\x02cbuiltins\neval\nX\x01\0\0\0" + b"1\x85R."
    yield b"\x80\x02}."


def zip_seeds(arena: Arena) -> Iterable[bytes]:
    import torch

    held = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.int64)}, held)
    yield held.getvalue()
    yield _archive({"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"little", "a/version": b"3\n"})


def merge_openai(arena: Arena, data: bytes) -> str:
    sound = sound_bytes(arena, arena.openai)
    arena.openai.write_bytes(_described(data, sound))
    try:
        return arena.merge(secondary=arena.openai)
    finally:
        arena.openai.write_bytes(sound)


def merge_adapter_pickle(arena: Arena, data: bytes) -> str:
    path = arena.pickled_adapter / ADAPTER_WEIGHTS[1]
    sound = sound_bytes(arena, path)
    path.write_bytes(_described(data, sound))
    try:
        return arena.merge(secondary=arena.pickled_adapter)
    finally:
        path.write_bytes(sound)


def adapter_pickle_seeds(arena: Arena) -> Iterable[bytes]:
    records = _records(arena.pickled_adapter / ADAPTER_WEIGHTS[1])
    yield next(data for name, data in records.items() if name.endswith("data.pkl"))


def openai_seeds(arena: Arena) -> Iterable[bytes]:
    yield next(data for name, data in _records(arena.openai).items() if name.endswith("data.pkl"))
