"""Pickles that are hostile, damaged or not in OpenAI's format: refused, and none of their code runs."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import ADAPTER, WEIGHT, WIDTH, Damage, Refuse, Triple, each_role, move
from helpers import (
    merge_arguments,
    read_tensors,
    safetensors_bytes,
    write_adapter,
    write_openai,
    write_pickle,
    write_tensors,
)

from hsa.sources.checkpoint import WEIGHTS

# A numpy warning of a worker thread would be a second line on stderr.
pytestmark = pytest.mark.filterwarnings("error")


# Pickles -------------------------------------------------------------------------------------------------------


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, call: Callable[..., object], *arguments: str) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.call, self.arguments)


BOMBS: dict[str, Callable[[Path], Bomb]] = {
    "os.makedirs": lambda path: Bomb(os.makedirs, str(path)),
    "posix.system": lambda path: Bomb(os.system, f"touch '{path}'"),
    "io.open": lambda path: Bomb(open, str(path), "w"),
    "eval": lambda path: Bomb(eval, f"open({str(path)!r}, 'w')"),
}
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"

each_bomb = pytest.mark.parametrize("bomb", BOMBS)


def set_off(file: Path) -> None:
    """Load a pickle freely, and close the files that it opens."""
    ahead = [torch.load(file, weights_only=False)]
    while ahead:
        found = ahead.pop()
        if isinstance(found, dict):
            ahead += found.values()
        elif isinstance(found, io.IOBase):
            found.close()


def as_bin(directory: Path, damage: Damage = bytes) -> Path:
    """Replace a checkpoint's weights by a pickle, damaged."""
    write_pickle(directory, read_tensors(directory))
    (directory / BIN).write_bytes(damage((directory / BIN).read_bytes()))
    return directory / BIN


@each_role
@each_bomb
@pytest.mark.parametrize("place", ["tensor", "whole"])
def test_hostile_pickles_are_refused_and_do_not_run(
    triple: Triple, output: Path, tmp_path: Path, refuse: Refuse, role: str, bomb: str, place: str
) -> None:
    went_off = tmp_path / "went-off"
    armed = BOMBS[bomb](went_off)
    tensors = read_tensors(triple[role])
    (triple[role] / WEIGHTS).unlink()
    file = triple[role] / BIN
    torch.save({**tensors, WEIGHT: armed} if place == "tensor" else armed, file)
    refuse(
        merge_arguments(triple, output), f"{role}: {file} holds more than tensors", f"it names {bomb}", "safetensors"
    )
    assert not went_off.exists()
    set_off(file)  # the bomb is live: had anything loaded it, the checks above would have seen it
    assert went_off.exists()


@each_role
def test_a_hostile_pickle_without_an_archive_is_refused_unread(
    triple: Triple, output: Path, tmp_path: Path, refuse: Refuse, role: str
) -> None:
    went_off = tmp_path / "went-off"
    bomb = pickle.dumps(BOMBS["os.makedirs"](went_off))
    (triple[role] / WEIGHTS).unlink()
    (triple[role] / BIN).write_bytes(bomb)
    refuse(merge_arguments(triple, output), f"{role}: {triple[role] / BIN} is no zip archive", "safetensors")
    assert not went_off.exists()
    pickle.loads(bomb)
    assert went_off.exists()


@pytest.mark.parametrize("name", ["secondary.pt", ADAPTER])
@each_bomb
def test_hostile_files_of_other_kinds_are_refused_and_do_not_run(
    triple: Triple, output: Path, tmp_path: Path, refuse: Refuse, bomb: str, name: str
) -> None:
    went_off = tmp_path / "went-off"
    armed = BOMBS[bomb](went_off)
    secondary = triple["secondary"].parent / "adapter"
    if name == ADAPTER:
        write_adapter(secondary, {WEIGHT: torch.empty(WIDTH, WIDTH)})
        (secondary / "adapter_model.safetensors").unlink()
        torch.save({WEIGHT: armed}, secondary / ADAPTER)
    else:
        secondary = write_openai(triple["secondary"].parent / name, triple["secondary"], dims=armed)
    refuse(merge_arguments({**triple, "secondary": secondary}, output), "holds more than tensors", f"it names {bomb}")
    assert not went_off.exists()
    set_off(secondary / ADAPTER if name == ADAPTER else secondary)
    assert went_off.exists()


def compressed(raw: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


PICKLES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "empty file": (lambda raw: b"", ("is no zip archive",)),
    "truncated": (lambda raw: raw[:-100], ("is truncated or damaged", "copy it again")),
    "half of it": (lambda raw: raw[: len(raw) // 2], ("is truncated or damaged", "copy it again")),
    "compressed": (compressed, ("is compressed or encrypted", "safetensors")),
    "safetensors": (lambda raw: safetensors_bytes({}), ("is no zip archive",)),
}


@each_role
@pytest.mark.parametrize("name", PICKLES)
def test_a_damaged_pickle(triple: Triple, output: Path, refuse: Refuse, role: str, name: str) -> None:
    damage, expected = PICKLES[name]
    file = as_bin(triple[role], damage)
    refuse(merge_arguments(triple, output), f"{role}: {file}", *expected)


@each_role
def test_a_pickled_dtype_that_is_not_known(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    write_pickle(triple[role], {**read_tensors(triple[role]), WEIGHT: torch.zeros(WIDTH, WIDTH, dtype=torch.complex64)})
    refuse(merge_arguments(triple, output), f"{role}: {triple[role] / BIN}: tensor {WEIGHT} has dtype torch.complex64")


@each_role
def test_a_pickled_view_that_is_not_contiguous(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    tensors = read_tensors(triple[role])
    write_pickle(triple[role], {**tensors, WEIGHT: tensors[WEIGHT].t()})
    refuse(
        merge_arguments(triple, output), f"{role}: {triple[role] / BIN}: tensor {WEIGHT}", "contiguous", "safetensors"
    )


PICKLE_INDICES: dict[str, tuple[str, tuple[str, ...]]] = {
    "missing shard": ("gone.bin", ("names the shard gone.bin, which is missing",)),
    "parent": ("../away.bin", ("'../away.bin'", "plain name of a .bin file")),
    "absolute": ("/tmp/away.bin", ("'/tmp/away.bin'", "plain name of a .bin file")),
    "link out": ("link.bin", ("link.bin is a link that leads out", "refused")),
    "safetensors": ("model.safetensors", ("'model.safetensors'", "plain name of a .bin file")),
}


@each_role
@pytest.mark.parametrize("name", PICKLE_INDICES)
def test_a_bad_index_of_pickles(triple: Triple, output: Path, refuse: Refuse, role: str, name: str) -> None:
    shard, expected = PICKLE_INDICES[name]
    write_pickle(triple[role], read_tensors(triple[role]), shards=2)
    (triple[role].parent / "away.bin").write_bytes(b"")
    (triple[role] / "link.bin").symlink_to(triple[role].parent / "away.bin")
    index = json.loads((triple[role] / BIN_INDEX).read_text())
    move(index, shard)
    (triple[role] / BIN_INDEX).write_text(json.dumps(index))
    refuse(merge_arguments(triple, output), f"{role}: {triple[role]}", *expected)


def test_a_pickled_tensor_in_the_wrong_shard(triple: Triple, output: Path, refuse: Refuse) -> None:
    write_pickle(triple["base"], read_tensors(triple["base"]), shards=2)
    index = json.loads((triple["base"] / BIN_INDEX).read_text())
    index["weight_map"][WEIGHT] = next(v for v in index["weight_map"].values() if v != index["weight_map"][WEIGHT])
    (triple["base"] / BIN_INDEX).write_text(json.dumps(index))
    refuse(
        merge_arguments(triple, output), f"holds tensor {WEIGHT}, which {BIN_INDEX} places in", "do not belong together"
    )


def test_nan_in_a_pickled_target(triple: Triple, output: Path, refuse: Refuse) -> None:
    tensors = read_tensors(triple["primary"])
    tensors[WEIGHT][0, 0] = math.nan
    write_pickle(triple["primary"], tensors)
    file = triple["primary"] / BIN
    refuse(merge_arguments(triple, output), f"primary {file}: tensor {WEIGHT}, head 0", "NaN or Inf", dry=False)


def test_pickles_beside_the_weights_are_neither_loaded_nor_copied(
    triple: Triple, output: Path, tmp_path: Path, finish: Callable[[Sequence[str]], list[str]]
) -> None:
    went_off = tmp_path / "went-off"
    names = ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt")
    for path in triple.values():
        for name in names:
            (path / name).write_bytes(pickle.dumps(BOMBS["os.makedirs"](went_off)))
    finish(merge_arguments(triple, output))
    assert not went_off.exists()
    assert not {path.name for path in output.iterdir()} & set(names)


# Files in OpenAI's format --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [{}, [], {"dims": {}}, {"model_state_dict": {}}, {"dims": 3, "model_state_dict": {}}]
)
def test_a_pt_file_that_is_not_openais(triple: Triple, output: Path, refuse: Refuse, content: object) -> None:
    file = triple["base"].parent / "base.pt"
    torch.save(content, file)
    refuse(merge_arguments({**triple, "base": file}, output), f"base: {file}", "OpenAI's format", "dims")


def test_a_pt_file_with_bad_dimensions(triple: Triple, output: Path, refuse: Refuse) -> None:
    file = write_openai(triple["base"].parent / "base.pt", triple["base"], n_text_layer=0)
    refuse(merge_arguments({**triple, "base": file}, output), f"base: {file}: dims has n_text_layer = 0")


def test_a_pt_file_that_is_missing(triple: Triple, output: Path, refuse: Refuse) -> None:
    file = triple["base"].parent / "gone.pt"
    refuse(merge_arguments({**triple, "base": file}, output), f"base: {file} cannot be found", "OpenAI's format")


def test_a_pt_file_that_is_truncated(triple: Triple, output: Path, refuse: Refuse) -> None:
    file = write_openai(triple["base"].parent / "base.pt", triple["base"])
    file.write_bytes(file.read_bytes()[:-1000])
    refuse(merge_arguments({**triple, "base": file}, output), f"base: {file} is truncated")


def test_a_pt_file_without_a_target(triple: Triple, output: Path, refuse: Refuse) -> None:
    tensors = read_tensors(triple["base"])
    del tensors[WEIGHT]
    write_tensors(triple["base"], tensors)
    file = write_openai(triple["base"].parent / "base.pt", triple["base"])
    refuse(merge_arguments({**triple, "base": file}, output), WEIGHT.removeprefix("model."), "is missing from base")


def test_a_pt_file_as_primary(triple: Triple, output: Path, refuse: Refuse) -> None:
    file = write_openai(triple["base"].parent / "primary.pt", triple["primary"])
    refuse(merge_arguments({**triple, "primary": file}, output), f"primary: {file}", "config.json", "convert it")
