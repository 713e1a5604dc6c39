"""An error is one printable line, whatever a path, a tensor name or a value holds."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from bad_input import PLACES, Refuse, Triple, change_tensors, damage
from helpers import (
    merge_arguments,
    read_safetensors,
    run_hsa,
    safetensors_bytes,
    snapshot,
)

from hsa.errors import shown
from hsa.sources.checkpoint import WEIGHTS

# A numpy warning of a worker thread would be a second line on stderr.
pytestmark = pytest.mark.filterwarnings("error")


def test_the_same_from_a_fresh_process(triple: Triple, output: Path, tmp_path: Path) -> None:
    tensor, element, head = PLACES["weight"]
    damage(triple["secondary"], tensor, element, math.nan, "float32")
    before = snapshot(tmp_path)
    file = triple["secondary"] / WEIGHTS
    for arguments, start in (
        (merge_arguments(triple, output), f"secondary {file}: tensor {tensor}, head {head} holds NaN or Inf;"),
        (merge_arguments(triple, output, "--json"), f"secondary {file}: tensor {tensor}, head {head} holds"),
        (merge_arguments(triple, output, "--quiet", "--k=nan"), "--k must be in [0, 100], got nan"),
        (["merge", "--base=x"], "Missing option '--output'"),
        (["merge", "--base=x", f"--output={output}"], "Missing option '--primary'"),
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
