"""SPEC section 6 through the command line: one line that says what is wrong, and nothing touched or written.

Every refusal is checked by the `refuse` fixture: exit code, an empty stdout, exactly one printable line on
stderr, and a file tree (sources, destination, everything beside it) that is what it was before.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    edit_json,
    merge_arguments,
    poke,
    read_safetensors,
    read_tensors,
    run_hsa,
    safetensors_bytes,
    snapshot,
    write_adapter,
    write_openai,
    write_pickle,
    write_tensors,
)
from safetensors.torch import load_file, save_file

from hsa.cli import app
from hsa.errors import shown
from hsa.sources.checkpoint import CONFIG, INDEX, WEIGHTS
from hsa.sources.safetensors import MAX_HEADER
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

# A numpy warning of a worker thread would be a second line on stderr.
pytestmark = pytest.mark.filterwarnings("error")

Triple = Mapping[str, Path]
Refuse = Callable[..., str]
ROLES = ("base", "primary", "secondary")
DTYPES = ("float32", "float16", "bfloat16")
WEIGHT = "model.encoder.layers.1.self_attn.q_proj.weight"
BIAS = "model.encoder.layers.0.self_attn.v_proj.bias"
OUT = "model.decoder.layers.0.encoder_attn.out_proj.weight"
COPIED = "model.encoder.conv1.weight"
HEAD_DIM, WIDTH = 16, 64

each_role = pytest.mark.parametrize("role", ROLES)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A destination whose parent is missing too, so that a directory made for nothing would show."""
    return tmp_path / "results" / "merged"


@pytest.fixture
def refuse(tmp_path: Path, output: Path, capfd: pytest.CaptureFixture[str]) -> Refuse:
    """Runs a command line that must be refused; the message, after checking that nothing else happened.

    `expected` are parts of the message. A merge is refused the same way by its dry run, unless `dry` is False.
    """

    def check(arguments: Sequence[str], *expected: str, code: int = 2, dry: bool = True) -> str:
        before = snapshot(tmp_path)
        messages = []
        for more in ([], ["--dry-run"]) if dry else ([],):
            capfd.readouterr()
            status = app.run([*arguments, *more])
            out, err = capfd.readouterr()
            assert (status, out) == (code, ""), err
            assert err.startswith("hsa: error: ")
            assert err.endswith("\n")
            assert err[:-1].isprintable()
            for part in expected:
                assert part in err
            assert snapshot(tmp_path) == before
            assert not output.parent.exists()
            messages.append(err)
        assert len(set(messages)) == 1
        return messages[0]

    return check


@pytest.fixture
def finish(tmp_path: Path, output: Path, capfd: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], list[str]]:
    """Runs a merge that must succeed and leave its sources alone; the lines on stderr."""

    def check(arguments: Sequence[str]) -> list[str]:
        before = snapshot(tmp_path)
        capfd.readouterr()
        status = app.run([*arguments, "--no-sync"])
        err = capfd.readouterr().err
        assert status == 0, err
        after = snapshot(tmp_path)
        assert {name: after[name] for name in before} == before
        assert {name for name in after if name not in before and Path(name).parts[0] != "results"} == set()
        assert os.listdir(output.parent) == ["merged"]
        return err.splitlines()

    return check


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

Damage = Callable[[bytes], bytes]


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


@pytest.fixture(scope="module")
def sharded_once(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("sharded"), SHAPES["test"], max_shard_bytes=300_000, processor=False)


@pytest.fixture
def sharded(sharded_once: Triple, tmp_path: Path) -> Triple:
    return {role: Path(shutil.copytree(path, tmp_path / "sources" / role)) for role, path in sharded_once.items()}


Index = dict[str, Any]


def move(index: Index, to: str) -> None:
    first = min(index["weight_map"].values())
    index["weight_map"] = {name: to if file == first else file for name, file in index["weight_map"].items()}


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


# Sources that do not fit together ----------------------------------------------------------------------------


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)


@each_role
def test_target_missing_from_one_source(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    change_tensors(triple[role], lambda tensors: tensors.pop(WEIGHT))
    others = ", ".join(other for other in ROLES if other != role)
    bare = WEIGHT.removeprefix("model.")
    refuse(merge_arguments(triple, output), f"target tensor {bare} is missing from {role} and stands in {others}")


@each_role
def test_target_in_one_source_alone(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    extra = "encoder.layers.0.self_attn.k_proj.bias"
    change_tensors(triple[role], lambda tensors: tensors.update({f"model.{extra}": torch.zeros(64)}))
    others = ", ".join(other for other in ROLES if other != role)
    refuse(merge_arguments(triple, output), f"target tensor {extra} is missing from {others} and stands in {role}")


@each_role
def test_shapes_differ(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    change_tensors(triple[role], lambda tensors: tensors.update({WEIGHT: torch.zeros(32, 64)}))
    each = ", ".join(f"{other} {'[32, 64]' if other == role else '[64, 64]'}" for other in ROLES)
    bare = WEIGHT.removeprefix("model.")
    refuse(merge_arguments(triple, output), f"target tensor {bare}: the shape differs: {each}")


@each_role
def test_head_counts_differ(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    edit_json(triple[role] / CONFIG, encoder_attention_heads=2)
    each = ", ".join(f"{other} {2 if other == role else 4}" for other in ROLES)
    refuse(merge_arguments(triple, output), "target tensor encoder.layers.", f"the number of heads differs: {each}")


def test_head_counts_of_the_other_stack_do_not_matter(
    triple: Triple, output: Path, refuse: Refuse, finish: Callable[[Sequence[str]], list[str]]
) -> None:
    edit_json(triple["secondary"] / CONFIG, decoder_attention_heads=2)
    arguments = merge_arguments(triple, output, "--targets=attention-qkv")
    refuse(arguments, "target tensor decoder.layers.", "base 4, primary 4, secondary 2")
    finish(merge_arguments(triple, output))


@each_role
@pytest.mark.parametrize("shape", [(64, 64, 1), (64,), (64, 0)])
def test_shapes_that_no_projection_has(
    triple: Triple, output: Path, refuse: Refuse, role: str, shape: tuple[int, ...]
) -> None:
    for path in triple.values():
        change_tensors(path, lambda tensors: tensors.update({WEIGHT: torch.zeros(shape)}))
    refuse(merge_arguments(triple, output), WEIGHT.removeprefix("model."), f"shape {list(shape)}, expected a matrix")


@each_role
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_targets_of_a_dtype_that_cannot_be_merged(
    triple: Triple, output: Path, refuse: Refuse, role: str, dtype: torch.dtype
) -> None:
    change_tensors(triple[role], lambda tensors: tensors.update({WEIGHT: torch.zeros(64, 64).to(dtype)}))
    code = {torch.float64: "F64", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
    file = triple[role] / WEIGHTS
    refuse(merge_arguments(triple, output), f"{role} {file}: target tensor {WEIGHT} has dtype {code}, expected", "BF16")


def test_no_target_anywhere(triple: Triple, output: Path, refuse: Refuse) -> None:
    for path in triple.values():
        tensors = {name.replace("q_proj.", "query."): tensor for name, tensor in read_tensors(path).items()}
        tensors = {name.replace("k_proj.", "key."): tensor for name, tensor in tensors.items()}
        write_tensors(path, {name.replace("v_proj.", "value."): tensor for name, tensor in tensors.items()})
    refuse(merge_arguments(triple, output), "holds no tensor that 'encoder-qkv' would merge", "q_proj.weight")


def test_a_tensor_that_a_scale_needs_is_missing_from_base(
    triple: Triple, output: Path, refuse: Refuse, finish: Callable[[Sequence[str]], list[str]]
) -> None:
    change_tensors(triple["base"], lambda tensors: tensors.pop(COPIED))
    scaled = merge_arguments(triple, output, "--non-attention-scale=0.5")
    refuse(scaled, f"tensor {COPIED} is missing from base", "--non-attention-scale 0.5")
    notes = finish(merge_arguments(triple, output))
    assert any("1 tensors of primary are missing from base" in note for note in notes)


# Parameters --------------------------------------------------------------------------------------------------

NOT_FINITE = ("nan", "inf", "-inf")
RANGES: dict[str, tuple[tuple[str, ...], str]] = {
    "k": (("-0.1", "100.5", "1e308", *NOT_FINITE), "in [0, 100]"),
    "lambda": (("-0.1", "1.1", "60", *NOT_FINITE), "in [0, 1]"),
    "alpha": (("-0.1", *NOT_FINITE), "finite and at least 0"),
    "attention-scale": (NOT_FINITE, "finite"),
    "non-attention-scale": (NOT_FINITE, "finite"),
    "num-heads": (("0", "-4", "10001"), "a whole number from 1 to 10000"),
    "num-layers": (("0", "-1", "10001"), "a whole number from 1 to 10000"),
    "threads": (("0", "-1", "257"), "a whole number from 1 to 256"),
    "dtype": (("float64", "fp16", "", "FLOAT16"), "one of auto, float32, float16, bfloat16"),
    "targets": (("qkv", "", "encoder-qkv,attention-all"), "one of encoder-qkv, attention-qkv, attention-all"),
    "numerics": (("fast", ""), "one of exact, reference"),
    "assets-from": (("nobody", ""), "one of base, primary, secondary"),
    "max-shard-size": (("0GB", "-1GB", "huge", "", "5XB", "nan", "1e9"), "a size such as 5GB"),
    "base-id": (("", " ", "/srv/models/base", "a\nb", "@main"), "a hub id such as org/name"),
    "primary-id": (("", "/srv/models/primary", "@main"), "a hub id such as org/name"),
    "secondary-id": (("", "/srv/models/secondary", "@main"), "a hub id such as org/name"),
    "backend": (("gpu", ""), "one of auto, cpu, triton"),
    "device": (("tpu", "", "cuda:", "cuda:-1", "cuda:x"), "auto, cpu, cuda or cuda:N"),
}


@pytest.mark.parametrize(("option", "value"), [(o, value) for o, (values, _) in RANGES.items() for value in values])
def test_value_out_of_range(triple: Triple, output: Path, refuse: Refuse, option: str, value: str) -> None:
    message = refuse(merge_arguments(triple, output, f"--{option}={value}"), RANGES[option][1], ", got ")
    assert re.search(rf"\b{option}\b", message.replace("_", "-"))


@pytest.mark.parametrize("option", ["k", "lambda", "alpha", "attention-scale", "non-attention-scale"])
@pytest.mark.parametrize("value", ["half", "", "0,5", "1e"])
def test_value_that_is_no_number(triple: Triple, output: Path, refuse: Refuse, option: str, value: str) -> None:
    refuse(
        merge_arguments(triple, output, f"--{option}={value}"),
        f"--{option} must be a number, got",
        ". See: hsa merge --help",
    )


@pytest.mark.parametrize("option", ["num-heads", "num-layers", "threads"])
@pytest.mark.parametrize("value", ["four", "4.5", "", "nan"])
def test_value_that_is_no_whole_number(triple: Triple, output: Path, refuse: Refuse, option: str, value: str) -> None:
    refuse(
        merge_arguments(triple, output, f"--{option}={value}"),
        f"--{option} must be a whole number, got",
        ". See: hsa merge --help",
    )


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("licence=mit", "card field 'licence' is unknown; there are title, language, license"),
        ("license", "--card takes FIELD=VALUE, got 'license'"),
        ("=x", "card field '' is unknown"),
        ("", "--card takes FIELD=VALUE, got ''"),
    ],
)
def test_card_fields(triple: Triple, output: Path, refuse: Refuse, field: str, expected: str) -> None:
    refuse(merge_arguments(triple, output, "--card=title=T", f"--card={field}"), expected)


def test_load_dtype_without_reference_numerics(triple: Triple, output: Path, refuse: Refuse) -> None:
    refuse(merge_arguments(triple, output, "--load-dtype=float32"), "--load-dtype says", "--numerics reference")


@pytest.mark.parametrize("preset", ["encoder-qkv", "attention-all"])
def test_a_layer_missing_from_all_three(triple: Triple, output: Path, refuse: Refuse, preset: str) -> None:
    """Half a model three times over agrees with itself, and is still no model."""
    for path in triple.values():
        tensors = read_tensors(path)
        write_tensors(path, {name: t for name, t in tensors.items() if "encoder.layers.1." not in name})
    refuse(
        merge_arguments(triple, output, f"--targets={preset}"),
        "target tensor encoder.layers.1.self_attn.q_proj.weight is missing from base, primary and secondary",
        "config.json of primary promises it",
    )


def test_options_of_reference_numerics(triple: Triple, output: Path, refuse: Refuse) -> None:
    reference = merge_arguments(triple, output, "--numerics=reference")
    refuse([*reference, "--load-dtype=float16"], "--load-dtype must be one of auto, float32, got 'float16'")
    refuse([*reference, "--dtype=float16"], "numerics 'reference' writes base's dtype", "got 'float16'")
    refuse([*reference, "--backend=triton"], "numerics 'reference'", "on the CPU", "--backend cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and may have what is asked for")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--backend=triton"], "backend 'triton'"),
        (["--backend=triton", "--device=cpu"], "'triton'"),
        (["--backend=triton", "--device=cuda"], "'triton'"),
        (["--device=cuda"], "device 'cuda'"),
        (["--device=cuda:1"], "device 'cuda:1'"),
        (["--backend=cpu", "--device=cuda"], "device 'cuda'"),
    ],
)
def test_a_backend_that_cannot_be_had(
    triple: Triple, output: Path, refuse: Refuse, options: list[str], expected: str
) -> None:
    refuse(merge_arguments(triple, output, *options), expected, "; use --")


# NaN, Inf and overflow ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def triples_once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Triple]:
    root = tmp_path_factory.mktemp("triples")
    return {dtype: write_triple(root / dtype, SHAPES["test"], dtype=dtype, processor=False) for dtype in DTYPES}  # type: ignore[arg-type]


@pytest.fixture
def triple_of(triples_once: dict[str, Triple], tmp_path: Path) -> Callable[[str], Triple]:
    """A copy of the triple of that dtype."""

    def copy(dtype: str) -> Triple:
        once = triples_once[dtype]
        return {role: Path(shutil.copytree(path, tmp_path / "sources" / role)) for role, path in once.items()}

    return copy


def bits(value: float, dtype: str) -> bytes:
    """A number's element in that dtype; bfloat16 cuts off what it cannot hold."""
    if dtype == "float16":
        return struct.pack("<e", value)
    whole = struct.pack("<f", value)
    return whole[2:] if dtype == "bfloat16" else whole


def damage(path: Path, tensor: str, element: int, value: float, dtype: str) -> None:
    poke(path / WEIGHTS, tensor, element, bits(value, dtype))


# One element of each: (tensor, element, the head it belongs to).
PLACES = {
    "weight": (WEIGHT, (2 * HEAD_DIM + 3) * WIDTH + 5, 2),
    "bias": (BIAS, 3 * HEAD_DIM, 3),
    "columns": (OUT, 10 * WIDTH + HEAD_DIM + 15, 1),
}


@each_role
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
def test_not_finite_in_a_target(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, role: str, dtype: str, value: float, place: str
) -> None:
    triple = triple_of(dtype)
    tensor, element, head = PLACES[place]
    damage(triple[role], tensor, element, value, dtype)
    arguments = merge_arguments(triple, output, "--targets=attention-all")
    refuse(arguments, f"{role} {triple[role] / WEIGHTS}: tensor {tensor}, head {head} holds NaN or Inf", dry=False)


@each_role
@pytest.mark.parametrize("options", [["--k=0"], ["--lambda=1"], ["--k=1", "--lambda=0"], ["--dtype=float16"]])
def test_not_finite_in_a_target_that_may_not_matter(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, role: str, options: list[str]
) -> None:
    """Whether or not a source's value would reach the output, a damaged source is refused."""
    triple = triple_of("float32")
    damage(triple[role], WEIGHT, 7, math.nan, "float32")
    expected = f"{role} {triple[role] / WEIGHTS}: tensor {WEIGHT}, head 0 holds NaN or Inf"
    refuse(merge_arguments(triple, output, *options), expected, dry=False)


@each_role
def test_not_finite_in_reference_numerics(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, role: str
) -> None:
    triple = triple_of("float16")
    tensor, element, head = PLACES["weight"]
    damage(triple[role], tensor, element, math.inf, "float16")
    expected = f"{role} {triple[role] / WEIGHTS}: tensor {tensor}, head {head} holds NaN or Inf"
    refuse(merge_arguments(triple, output, "--numerics=reference"), expected, dry=False)


@each_role
def test_not_finite_in_a_shard(sharded: Triple, output: Path, refuse: Refuse, role: str) -> None:
    shard = json.loads((sharded[role] / INDEX).read_text())["weight_map"][WEIGHT]
    poke(sharded[role] / shard, WEIGHT, 0, bits(math.nan, "float32"))
    expected = f"{role} {sharded[role] / shard}: tensor {WEIGHT}, head 0 holds NaN or Inf"
    refuse(merge_arguments(sharded, output), expected, dry=False)


def test_not_finite_where_it_is_only_copied(
    triple_of: Callable[[str], Triple], output: Path, finish: Callable[[Sequence[str]], list[str]]
) -> None:
    triple = triple_of("float32")
    for element, value in enumerate((math.nan, math.inf, -math.inf)):
        damage(triple["primary"], COPIED, element, value, "float32")
    poke(triple["primary"] / WEIGHTS, COPIED, 3, b"\x01\x00\xa0\xff")
    finish(merge_arguments(triple, output))
    before, after = (read_tensors(path)[COPIED].view(torch.int32) for path in (triple["primary"], output))
    assert torch.equal(before, after)


@pytest.mark.parametrize("role", ["base", "primary"])
def test_not_finite_where_it_is_scaled(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, role: str
) -> None:
    triple = triple_of("float32")
    damage(triple[role], COPIED, 0, math.inf, "float32")
    for more in ([], ["--numerics=reference"]):
        arguments = merge_arguments(triple, output, "--non-attention-scale=0.5", *more)
        refuse(arguments, f"{role} {triple[role] / WEIGHTS}: tensor {COPIED} holds NaN or Inf", dry=False)


@pytest.mark.parametrize("k", ["0", "1"])
@pytest.mark.parametrize("place", PLACES)
def test_float16_overflow_of_a_merged_value(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, k: str, place: str
) -> None:
    triple = triple_of("float16")
    tensor, element, head = PLACES[place]
    for role, value in (("base", -30000.0), ("primary", 30000.0), ("secondary", 30000.0)):
        damage(triple[role], tensor, element, value, "float16")
    arguments = merge_arguments(triple, output, "--targets=attention-all", "--attention-scale=3", f"--k={k}")
    expected = f"{triple['primary'] / WEIGHTS}: tensor {tensor}, head {head}: the result overflows F16"
    refuse(arguments, expected, "--dtype float32 or bfloat16", dry=False)


@pytest.mark.parametrize("k", ["0", "1"])
@pytest.mark.parametrize("place", PLACES)
def test_float16_overflow_of_a_cast_target(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, k: str, place: str
) -> None:
    triple = triple_of("float32")
    tensor, element, head = PLACES[place]
    damage(triple["primary"], tensor, element, 1e6, "float32")
    arguments = merge_arguments(triple, output, "--targets=attention-all", "--dtype=float16", f"--k={k}")
    expected = f"{triple['primary'] / WEIGHTS}: tensor {tensor}, head {head}: the result overflows F16"
    refuse(arguments, expected, dry=False)


def test_float16_overflow_of_a_cast_copy(triple_of: Callable[[str], Triple], output: Path, refuse: Refuse) -> None:
    triple = triple_of("bfloat16")
    damage(triple["primary"], COPIED, 3, -1e6, "bfloat16")
    expected = f"{triple['primary'] / WEIGHTS}: tensor {COPIED}: the result overflows F16"
    refuse(merge_arguments(triple, output, "--dtype=float16"), expected, dry=False)


@pytest.mark.parametrize(
    ("base", "primary", "secondary"), [(-3e38, 3e38, 0.0), (3e38, 0.0, -3e38), (0.0, 3e38, 3e38), (0.0, -3e38, 3e38)]
)
def test_float32_overflow_of_a_score(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse, base: float, primary: float, secondary: float
) -> None:
    triple = triple_of("float32")
    for role, value in zip(ROLES, (base, primary, secondary), strict=True):
        damage(triple[role], WEIGHT, 0, value, "float32")
    expected = f"{triple['primary'] / WEIGHTS}: tensor {WEIGHT}, head 0: the result overflows F32"
    refuse(merge_arguments(triple, output), expected, dry=False)


def test_a_scale_beyond_float32_is_refused_by_name(
    triple_of: Callable[[str], Triple], output: Path, refuse: Refuse
) -> None:
    triple = triple_of("float32")
    for option in ("--attention-scale", "--non-attention-scale"):
        refuse(merge_arguments(triple, output, f"{option}=1e300"), option, "float32 ends at 3.4e38")


# A likely mix-up -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["primary", "secondary"])
@pytest.mark.parametrize("numerics", ["exact", "reference"])
def test_base_equal_to_a_fine_tune_is_a_warning(
    triple: Triple, output: Path, finish: Callable[[Sequence[str]], list[str]], role: str, numerics: str
) -> None:
    """On the targets, that is: what is different elsewhere does not silence it."""
    shutil.copy(triple["base"] / WEIGHTS, triple[role] / WEIGHTS)
    damage(triple[role], COPIED, 0, 0.5, "float32")
    lines = finish(merge_arguments(triple, output, f"--numerics={numerics}"))
    warnings = [line for line in lines if line.startswith("hsa: warning: ")]
    assert len(warnings) == 1
    assert f"base and {role} are equal on all 10 target tensors" in warnings[0]
    assert (output / "hsa_merge.json").exists()
    assert read_tensors(output).keys() == read_tensors(triple["primary"]).keys()


def test_one_value_that_differs_is_no_mix_up(
    triple: Triple, output: Path, finish: Callable[[Sequence[str]], list[str]]
) -> None:
    shutil.copy(triple["base"] / WEIGHTS, triple["secondary"] / WEIGHTS)
    damage(triple["secondary"], BIAS, 5, 0.5, "float32")
    assert not [line for line in finish(merge_arguments(triple, output)) if "are equal on all" in line]


def test_a_sound_merge_warns_of_nothing(
    triple: Triple, output: Path, finish: Callable[[Sequence[str]], list[str]]
) -> None:
    assert finish(merge_arguments(triple, output)) == []


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
ADAPTER = "adapter_model.bin"

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


# Adapters ------------------------------------------------------------------------------------------------------

each_tune = pytest.mark.parametrize("role", ["primary", "secondary"])
FOLD = "merge_and_unload"


def with_adapter(triple: Triple, role: str, **settings: Any) -> dict[str, Path]:
    directory = triple[role].parent / "adapter"
    write_adapter(directory, {WEIGHT: torch.empty(WIDTH, WIDTH)}, **settings)
    return {**triple, role: directory}


@each_tune
@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["proj_out"]},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2]]},
        {"a_setting_of_tomorrow": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_more_than_plain_lora(
    triple: Triple,
    output: Path,
    refuse: Refuse,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    settings: dict[str, Any],
) -> None:
    """Without peft, which folds some of these in (tests/programs has them)."""
    monkeypatch.setitem(sys.modules, "peft", None)
    given = with_adapter(triple, role, **settings)
    (name,) = settings
    refuse(merge_arguments(given, output), f"{role}: {given[role] / 'adapter_config.json'}", name, FOLD)


@each_tune
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"r": 4}, "have rank 3, and r is 4 in adapter_config.json"),
        ({"r": 0}, "has r = 0, expected a positive whole number"),
        ({"r": None}, "has r = None"),
        ({"lora_alpha": "8"}, "has lora_alpha = '8', expected a finite number"),
        ({"lora_alpha": 1e300}, "has lora_alpha = 1e+300"),
    ],
)
def test_an_adapters_rank_and_alpha(
    triple: Triple, output: Path, refuse: Refuse, role: str, settings: dict[str, Any], expected: str
) -> None:
    given = with_adapter(triple, role, **settings)
    refuse(merge_arguments(given, output), f"{role}: {given[role]}", expected)


AdapterTensors = dict[str, torch.Tensor]
ADAPTERS: dict[str, tuple[Callable[[str, torch.Tensor], AdapterTensors], tuple[str, ...]]] = {
    "unknown module": (
        lambda name, t: {name.replace("layers.1", "layers.7"): t},
        ("is for encoder.layers.7.self_attn.q_proj.weight, which base does not have", "trained on this base"),
    ),
    "wrong width": (lambda name, t: {name: torch.cat([t, t], 1)}, ("do not fit", "trained on this base")),
    "a magnitude": (lambda name, t: {name: t, f"{name}_magnitude_vector": t.clone()}, ("more than plain LoRA", FOLD)),
    "a saved module": (
        lambda name, t: {name: t, "base_model.model.proj_out.weight": t.clone()},
        ("more than plain", FOLD),
    ),
    "an integer": (lambda name, t: {name: t.int()}, ("has dtype I32, expected one of F32",)),
    "half a pair": (lambda name, t: {}, ("has no counterpart", "incomplete")),
}


@each_tune
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapters_tensors(triple: Triple, output: Path, refuse: Refuse, role: str, name: str) -> None:
    change, expected = ADAPTERS[name]
    given = with_adapter(triple, role)
    file = given[role] / "adapter_model.safetensors"
    tensors = load_file(file)
    changed: AdapterTensors = {}
    for key, tensor in tensors.items():
        changed |= change(key, tensor) if ".lora_A." in key or "module" in name else {key: tensor}
    save_file(changed, file)
    refuse(merge_arguments(given, output), f"{role}: {file}", *expected)


@each_tune
def test_an_adapter_without_weights(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    given = with_adapter(triple, role)
    (given[role] / "adapter_model.safetensors").unlink()
    refuse(merge_arguments(given, output), f"{role}: {given[role]} holds an adapter's config and no weights", ADAPTER)


@each_tune
def test_an_adapter_that_is_empty(triple: Triple, output: Path, refuse: Refuse, role: str) -> None:
    given = with_adapter(triple, role)
    save_file({}, given[role] / "adapter_model.safetensors")
    refuse(merge_arguments(given, output), f"{role}: {given[role]}", "holds no tensor")


def test_an_adapter_as_base(triple: Triple, output: Path, refuse: Refuse) -> None:
    given = with_adapter(triple, "base")
    refuse(merge_arguments(given, output), f"base: {given['base']} holds a LoRA adapter", "the model it was trained on")


def test_nan_in_an_adapter(triple: Triple, output: Path, refuse: Refuse) -> None:
    given = with_adapter(triple, "secondary", scale=math.nan)
    file = given["secondary"] / "adapter_model.safetensors"
    refuse(merge_arguments(given, output), f"secondary {file}: tensor {WEIGHT}", "NaN or Inf", dry=False)


# One line --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["merge"], "Missing option '--base'"),
        (["merge", "--base"], "--base"),
        (["merge", "--nonsense"], "--nonsense"),
        (["merge", "--k", "x\ny", "--base=b", "--primary=p", "--secondary=s", "--output=o"], "--k"),
        (["blend"], "'blend'"),
        (["blend\nhsa: error: forged"], "blend"),
        (["--nonsense"], "--nonsense"),
        (["demo", "extra"], "extra"),
    ],
)
def test_usage_errors_are_one_line(refuse: Refuse, arguments: list[str], expected: str) -> None:
    refuse(arguments, expected, "See: hsa ", "--help", dry=False)


def test_a_stray_argument_is_an_error(triple: Triple, output: Path, refuse: Refuse) -> None:
    refuse([*merge_arguments(triple, output), "stray"], "stray", "See: hsa merge --help")


def test_the_same_from_a_fresh_process(triple: Triple, output: Path, tmp_path: Path) -> None:
    tensor, element, head = PLACES["weight"]
    damage(triple["secondary"], tensor, element, math.nan, "float32")
    before = snapshot(tmp_path)
    file = triple["secondary"] / WEIGHTS
    for arguments, start in (
        (merge_arguments(triple, output), f"secondary {file}: tensor {tensor}, head {head} holds NaN or Inf;"),
        (merge_arguments(triple, output, "--json"), f"secondary {file}: tensor {tensor}, head {head} holds"),
        (merge_arguments(triple, output, "--quiet", "--k=nan"), "--k must be in [0, 100], got nan"),
        (["merge", "--base=x"], "Missing option '--primary'"),
    ):
        result = run_hsa(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"hsa: error: {start}")
        assert result.stderr.count("\n") == 1
        assert snapshot(tmp_path) == before


def test_debug_adds_the_traceback(triple: Triple, output: Path, tmp_path: Path) -> None:
    (triple["base"] / WEIGHTS).write_bytes(b"")
    before = snapshot(tmp_path)
    plain, debug = (run_hsa(*merge_arguments(triple, output, *more)) for more in ((), ("--debug",)))
    assert (plain.returncode, plain.stdout) == (debug.returncode, debug.stdout) == (2, "")
    assert plain.stderr.count("\n") == 1
    assert debug.stderr.startswith("Traceback (most recent call last):\n")
    assert "read_header" in debug.stderr
    assert debug.stderr.endswith("\n" + plain.stderr)
    assert snapshot(tmp_path) == before


FORGERIES = {
    "newline": "x\nhsa: error: forged",
    "carriage return": "x\rhsa: error: forged",
    "colour": "x\x1b[2K\x1b[31mforged",
    "next line": "x\u0085hsa: error: forged",
    "line separator": "x\u2028hsa: error: forged",
    "right to left": "x\u202edegrof",
    "nul": "x\0forged",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_tensor_name_cannot_forge_a_line(triple: Triple, output: Path, refuse: Refuse, name: str) -> None:
    file = triple["primary"] / WEIGHTS
    header, data = read_safetensors(file)
    header[FORGERIES[name]] = {"dtype": "F128", "shape": [0], "data_offsets": [len(data), len(data)]}
    file.write_bytes(safetensors_bytes(header, data))
    message = refuse(merge_arguments(triple, output), f"primary: {file}", "unknown dtype 'F128'")
    assert FORGERIES[name][1] not in message[:-1]


@pytest.mark.parametrize("name", FORGERIES)
def test_a_tensor_name_cannot_forge_a_note(triple: Triple, output: Path, name: str) -> None:
    bias = "model.encoder.conv1.bias"
    change_tensors(triple["base"], lambda tensors: tensors.update({f"{FORGERIES[name]}.{bias}": tensors.pop(bias)}))
    result = run_hsa(*merge_arguments(triple, output, "--no-sync"))
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("hsa: note: 1 tensor names of base are read without what a wrapper added, such as x")
    assert all(line.isprintable() for line in (line, *result.stdout.splitlines()))


@pytest.mark.parametrize("name", FORGERIES)
def test_a_tensor_without_a_place_cannot_forge_a_line(triple: Triple, output: Path, refuse: Refuse, name: str) -> None:
    change_tensors(triple["primary"], lambda tensors: tensors.update({FORGERIES[name]: torch.zeros(1)}))
    assert refuse(merge_arguments(triple, output), "primary", "tensor x", "has no place in the model")[
        :-1
    ].isprintable()


def test_a_path_cannot_forge_a_line(triple: Triple, output: Path, refuse: Refuse) -> None:
    path = triple["base"].parent / "x\nhsa: error: forged"
    refuse(merge_arguments({**triple, "base": path}, output), "x\\nhsa: error: forged cannot be found")


def test_names_that_are_not_utf8_are_no_obstacle(triple: Triple, tmp_path: Path) -> None:
    odd = {role: path.rename(path.parent / os.fsdecode(role.encode() + b"\xff\n")) for role, path in triple.items()}
    output = tmp_path / os.fsdecode(b"merged\xff\n")
    result = run_hsa(*merge_arguments(odd, output, "--no-sync"))
    assert result.returncode == 0, result.stderr
    assert all(line.isprintable() for line in result.stdout.splitlines())
    assert "merged\\udcff\\n" in result.stdout.splitlines()[0]
    recorded = json.loads((output / "hsa_merge.json").read_bytes())["sources"]["base"]["id"]
    assert ascii(recorded) == ascii("base\\xff\n")  # text that UTF-8 can hold, so that the record can be read again
    assert (output / "README.md").read_text(encoding="utf-8").startswith("---\n")


def test_a_value_in_a_message_is_bounded_whatever_it_holds() -> None:
    nested: tuple[object, ...] = ()
    for _ in range(60):  # 2**60 items, were they walked
        nested = (nested, nested)
    for value in (nested, [nested] * 9, 10**5000, -(10**5000), "x" * 10**6, b"\xff" * 10**6, object()):
        assert len(shown(value)) <= 80
    assert shown({"k": [1, 2.5, None, True]}) == "{'k': [1, 2.5, None, True]}"
    assert shown(10**5000) == "<a whole number of 16610 bits>"
