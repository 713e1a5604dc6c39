"""Sources that are missing or malformed: directories, files, headers, indices and config.json.

Every refusal is checked by the `refuse` fixture: exit code, an empty stdout, exactly one printable line on
stderr, and a file tree (sources, destination, everything beside it) that is what it was before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input import BIAS, COPIED, WEIGHT, Damage, Index, Refuse, Triple, each_role, move
from helpers import (
    edit_json,
    merge_arguments,
    run_hsa,
    safetensors_bytes,
)

from hsa.sources.checkpoint import CONFIG, INDEX, WEIGHTS
from hsa.sources.safetensors import MAX_HEADER

# A numpy warning of a worker thread would be a second line on stderr.
pytestmark = pytest.mark.filterwarnings("error")


# A source that is not there ----------------------------------------------------------------------------------


@each_role
def test_source_missing(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    path = triple[role].parent / "nowhere"
    refuse(
        merge_arguments({**triple, role: path}, output), f"{role}: {path}", "cannot be found", CONFIG, WEIGHTS, INDEX
    )


@each_role
def test_source_is_a_file(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    path = triple[role] / WEIGHTS
    refuse(
        merge_arguments({**triple, role: path}, output), f"{role}: {path} is not a directory", CONFIG, WEIGHTS, INDEX
    )


@each_role
def test_source_without_weights(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    (triple[role] / WEIGHTS).unlink()
    refuse(merge_arguments(triple, output), f"{role}: {triple[role]} holds no weights", WEIGHTS, INDEX)


@each_role
def test_source_given_as_nothing(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    """What an unset shell variable gives; the current directory would be a strange guess."""
    arguments = [f"--{role}=" if a.startswith(f"--{role}=") else a for a in merge_arguments(triple, output)]
    refuse(arguments, f"{role}: ", "empty path")


@pytest.mark.parametrize("path", ["~nosuchuser-hsa/model", "x" * 300, "/dev/null/model"])
def test_source_that_cannot_be(triple: Triple, output: Path, refuse: Refuse, path: str) -> None:
    refuse(merge_arguments({**triple, "primary": Path(path)}, output), f"primary: {path}", "cannot be found")


@each_role
@pytest.mark.parametrize("kind", ["pipe", "directory", "dangling link", "link out"])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_something_else_in_place_of_a_file(
    triple: Triple, output: Path, refuse: Refuse, role: str, kind: str, name: str
) -> None:
    file = triple[role] / name
    outside = file.rename(triple[role].parent / "outside")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to(outside if kind == "link out" else "missing")
    found = {"dangling link": "cannot be opened", "link out": f"leads out of the directory, to {outside}"}
    arguments = merge_arguments(triple, output)
    if kind == "pipe":  # the snapshot cannot read one
        result = run_hsa(*arguments, timeout=30)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"hsa: error: {role}: {file} is not a regular file; expected a file with data in it\n"
        assert not output.parent.exists()
    else:
        refuse(arguments, f"{role}: {file}", found.get(kind, "is not a regular file"))


# Headers -----------------------------------------------------------------------------------------------------


def document(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header and leave the data."""

    def damage(raw: bytes) -> bytes:
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        change(header)
        return safetensors_bytes(header, raw[end:])

    return damage


def shift(header: dict[str, Any], by: int) -> None:
    start, stop = header[WEIGHT]["data_offsets"]
    header[WEIGHT]["data_offsets"] = [start + by, stop + by]


def duplicate(raw: bytes) -> bytes:
    end = 8 + int.from_bytes(raw[:8], "little")
    entry = json.dumps({BIAS: json.loads(raw[8:end])[BIAS]}).encode()[1:-1]
    return safetensors_bytes(raw[8:end].rstrip()[:-1] + b"," + entry + b"}", raw[end:])


HEADERS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "empty file": (lambda raw: b"", ("no safetensors file: 0 bytes, expected at least 8",)),
    "seven bytes": (lambda raw: raw[:7], ("no safetensors file: 7 bytes, expected at least 8",)),
    "truncated in the header": (lambda raw: raw[:100], ("is truncated: its header ends at byte", "the file at 100")),
    "truncated in the data": (lambda raw: raw[:-1], ("tensors end at data byte", "the file holds")),
    "extra data": (lambda raw: raw + b"\0", ("tensors end at data byte", "the file holds")),
    "header longer than the file": (
        lambda raw: len(raw).to_bytes(8, "little") + raw[8:],
        ("is truncated: its header ends at byte", "the file at"),
    ),
    "header over 100 MB": (
        lambda raw: (MAX_HEADER + 1).to_bytes(8, "little") + raw[8:],
        (f"header of {MAX_HEADER + 1} bytes, at most {MAX_HEADER} are allowed",),
    ),
    "not JSON": (lambda raw: safetensors_bytes(b"{'a': 1}"), ("header is not valid JSON",)),
    "not UTF-8": (lambda raw: safetensors_bytes(b'{"\xff": {}}'), ("header is not valid JSON", "utf-8")),
    "a lone surrogate": (lambda raw: safetensors_bytes(b'{"\\ud800": {}}'), ("header is not valid JSON",)),
    "not an object": (lambda raw: safetensors_bytes(b"[1, 2]"), ("header must be a JSON object, found list",)),
    "nested deeply": (lambda raw: safetensors_bytes(b'{"a":' + b"[" * 100_000), ("header is not valid JSON",)),
    "duplicate names": (duplicate, (f"header names '{BIAS}' twice",)),
    "overlapping": (document(lambda h: shift(h, -8)), (f"tensor {WEIGHT} starts at data byte", "overlaps the tensor")),
    "hole": (document(lambda h: shift(h, 8)), (f"tensor {WEIGHT} starts at data byte", "leaves a hole")),
    "out of bounds": (document(lambda h: shift(h, 1 << 40)), ("starts at data byte", "expected")),
    "end before start": (
        document(lambda h: h[WEIGHT].update(data_offsets=[9, 1])),
        (f"tensor {WEIGHT}: data_offsets [9, 1] end before they start",),
    ),
    "shape that does not fit": (
        document(lambda h: h[WEIGHT].update(shape=[63, 64])),
        (f"tensor {WEIGHT}: shape [63, 64] of F32 takes 16128 bytes, data_offsets [", "] hold 16384"),
    ),
    "dtype that does not fit": (
        document(lambda h: h[WEIGHT].update(dtype="F16")),
        (f"tensor {WEIGHT}: shape [64, 64] of F16 takes 8192 bytes, data_offsets [", "] hold 16384"),
    ),
    "unknown dtype": (document(lambda h: h[WEIGHT].update(dtype="F128")), (f"tensor {WEIGHT}: unknown dtype 'F128'",)),
    "negative size": (
        document(lambda h: h[WEIGHT].update(shape=[-64, -64])),
        (f"tensor {WEIGHT}: shape must be", "at least 0, found [-64, -64]"),
    ),
    "float size": (
        document(lambda h: h[WEIGHT].update(shape=[64.0, 64])),
        (f"tensor {WEIGHT}: shape must be", "whole numbers", "found [64.0, 64]"),
    ),
    "bool size": (
        document(lambda h: h[WEIGHT].update(shape=[True, 4096])),
        (f"tensor {WEIGHT}: shape must be", "whole numbers", "found [True, 4096]"),
    ),
    "size beyond any file": (
        document(lambda h: h[WEIGHT].update(shape=[1 << 62, 1 << 62])),
        (f"tensor {WEIGHT}: shape", "larger than any file"),
    ),
    "negative offset": (
        document(lambda h: h[WEIGHT].update(data_offsets=[-16384, 0])),
        (f"tensor {WEIGHT}: data_offsets must be", "at least 0, found [-16384, 0]"),
    ),
    "missing offset": (
        document(lambda h: h[WEIGHT].pop("data_offsets")),
        (f"tensor {WEIGHT}: expected exactly dtype, shape and data_offsets",),
    ),
    "metadata of numbers": (document(lambda h: h.update(__metadata__={"a": 1})), ("__metadata__ must map names",)),
}


@each_role
@pytest.mark.parametrize("name", HEADERS)
def test_malformed_header(triple: Triple, output: Path, refuse: Refuse, role: str, name: str) -> None:
    damage, expected = HEADERS[name]
    file = triple[role] / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    refuse(merge_arguments(triple, output), f"{role}: {file}", *expected)


# Indices -----------------------------------------------------------------------------------------------------

INDICES: dict[str, tuple[Callable[[Index], object], tuple[str, ...]]] = {
    "missing shard": (lambda i: move(i, "gone.safetensors"), ("names the shard gone.safetensors, which is missing",)),
    "parent": (lambda i: move(i, "../away.safetensors"), ("'../away.safetensors'", "in the same directory")),
    "absolute": (lambda i: move(i, "/tmp/away.safetensors"), ("'/tmp/away.safetensors'", "in the same directory")),
    "sub-directory": (lambda i: move(i, "sub/in.safetensors"), ("'sub/in.safetensors'", "in the same directory")),
    "link out": (lambda i: move(i, "link.safetensors"), ("link.safetensors is a link that leads out", "refused")),
    "link nowhere": (lambda i: move(i, "dead.safetensors"), ("dead.safetensors cannot be opened",)),
    "a pickle": (lambda i: move(i, "pytorch_model.bin"), ("'pytorch_model.bin'", "of a .safetensors file")),
    "forged line": (lambda i: move(i, "x\nhsa: error: y"), ("names the shard 'x\\nhsa: error: y'",)),
    "no weight_map": (lambda i: i.pop("weight_map"), ("expected a weight_map from tensor names to file names",)),
    "no list of tensors": (lambda i: i.update(weight_map=[]), ("expected a weight_map from tensor names",)),
    "no names of files": (lambda i: i["weight_map"].update({BIAS: 1}), ("expected a weight_map from tensor names",)),
    "wrong shard": (
        lambda i: i["weight_map"].update({COPIED: max(i["weight_map"].values())}),
        ("model-00001-of-", f"holds tensor {COPIED}, which {INDEX} places in model-"),
    ),
    "not listed": (
        lambda i: i["weight_map"].pop(COPIED),
        ("model-00001-of-", f"holds tensor {COPIED}, which {INDEX} does not list", "fetch all its files again"),
    ),
    "listed but absent": (
        lambda i: i["weight_map"].update(ghost=min(i["weight_map"].values())),
        (f"{INDEX} places tensor ghost in model-00001-of-", "which does not hold it"),
    ),
}


@each_role
@pytest.mark.parametrize("name", INDICES)
def test_malformed_index(sharded: Triple, output: Path, refuse: Refuse, role: str, name: str) -> None:
    change, expected = INDICES[name]
    folder = sharded[role]
    first = min(folder.glob("*.safetensors"))
    shutil.copy(first, folder.parent / "away.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(first, folder / "sub" / "in.safetensors")
    (folder / "link.safetensors").symlink_to("../away.safetensors")
    (folder / "dead.safetensors").symlink_to("missing")
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    refuse(merge_arguments(sharded, output), f"{role}: {folder}", *expected)


@each_role
def test_index_that_is_not_json(sharded: Triple, output: Path, refuse: Refuse, role: str) -> None:
    (sharded[role] / INDEX).write_text("{")
    refuse(merge_arguments(sharded, output), f"{role}: {sharded[role] / INDEX}: index is not valid JSON")


@each_role
def test_malformed_header_of_a_shard(sharded: Triple, output: Path, refuse: Refuse, role: str) -> None:
    shard = max(sharded[role].glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-3])
    refuse(merge_arguments(sharded, output), f"{role}: {shard}", "the file holds")


# config.json -------------------------------------------------------------------------------------------------


@each_role
def test_no_config(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    (triple[role] / CONFIG).unlink()
    refuse(merge_arguments(triple, output), f"{role}: {triple[role]} has no {CONFIG}")


@each_role
@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": NaN}', '{"a": 1, "a": 2}'])
def test_config_that_is_not_json(triple: Triple, output: Path, refuse: Refuse, role: str, text: str) -> None:
    (triple[role] / CONFIG).write_text(text)
    refuse(merge_arguments(triple, output), f"{role}: {triple[role] / CONFIG}: config ")


@each_role
@pytest.mark.parametrize("model_type", ["wav2vec2", "speech\nhsa: error: forged", None, 7])
def test_another_model(triple: Triple, output: Path, refuse: Refuse, role: str, model_type: Any) -> None:
    edit_json(triple[role] / CONFIG, model_type=model_type)
    refuse(
        merge_arguments(triple, output),
        f"{role} {triple[role]} is not a Whisper checkpoint",
        f"model_type {model_type!r}",
        "supported is 'whisper'",
    )


@each_role
@pytest.mark.parametrize("value", [0, -4, 4.0, "4", None, True])
def test_head_count_that_is_none(triple: Triple, output: Path, refuse: Refuse, role: str, value: Any) -> None:
    edit_json(triple[role] / CONFIG, encoder_attention_heads=value)
    refuse(
        merge_arguments(triple, output), f"{role} {triple[role]}", f"encoder_attention_heads = {value!r}", "positive"
    )


def test_heads_that_do_not_divide_the_width(triple: Triple, output: Path, refuse: Refuse) -> None:
    for path in triple.values():
        edit_json(path / CONFIG, encoder_attention_heads=5)
    refuse(merge_arguments(triple, output), "[64", "cannot be split into 5 heads: 64 is not a multiple of 5")


def test_num_heads_that_do_not_divide_the_width(triple: Triple, output: Path, refuse: Refuse) -> None:
    refuse(merge_arguments(triple, output, "--num-heads=5"), "cannot be split into 5 heads: 64 is not a multiple of 5")


def test_fewer_layers_than_there_are(triple: Triple, output: Path, refuse: Refuse) -> None:
    refuse(merge_arguments(triple, output, "--num-layers=1"), "lies in layer 1", "1 layers by --num-layers")
    edit_json(triple["primary"] / CONFIG, encoder_layers=1)
    refuse(merge_arguments(triple, output), "lies in layer 1", "1 layers by the config.json of primary")
