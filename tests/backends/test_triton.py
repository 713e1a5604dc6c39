"""The Triton backend in the interpreter: the same files as the CPU backend writes, and what it refuses.

Each test runs in a process of its own, for Triton reads TRITON_INTERPRET when the kernels are defined.
"""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import merge_arguments, poke, run_hsa, snapshot
from processes import ROOT
from soundness import check_command

from hsa.testing.whisper_checkpoints import SHAPES, write_triple

pytestmark = pytest.mark.long

Triple = dict[str, Path]
INTERPRETED = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests" / "support")}

COMMAND = """
import gpu  # which makes the interpreter faster
from hsa.__main__ import main

main()
"""

MERGER = """
import sys
import gpu
from pathlib import Path
import torch
import hsa
from helpers import raw_bytes, read_tensors

triple = dict(zip(("base", "primary", "secondary"), map(Path, sys.argv[1:]), strict=True))
cpu = hsa.Merger(**triple, targets="attention-all", backend="cpu")
gpu = hsa.Merger(**triple, targets="attention-all", backend="triton")
assert (gpu.backend, gpu.device) == ("triton", "cpu")
for name, score in cpu.scores.items():
    torch.testing.assert_close(gpu.scores[name], score, rtol=1e-6, atol=0)
model = read_tensors(triple["primary"])
half = {name: tensor.half() for name, tensor in model.items()}
for k, lam in ((0.6, 0.5), (1.0, 0.0), (0.0, 0.5), (0.3, 0.9)):
    assert cpu.selected(k) == gpu.selected(k)
    expected = cpu.merge(k=k, lam=lam)
    for found in (gpu.merge(k=k, lam=lam), gpu.apply_(model, k=k, lam=lam)):
        wrong = [name for name, tensor in expected.items() if raw_bytes(tensor) != raw_bytes(found[name])]
        assert wrong == [], wrong
    narrow = cpu.apply_({name: tensor.half() for name, tensor in model.items()}, k=k, lam=lam)
    gpu.apply_(half, k=k, lam=lam)
    assert all(raw_bytes(narrow[name]) == raw_bytes(half[name]) for name in expected)

# An overflow leaves what is written to as it was; autograd notices what a kernel wrote; torch's modes do not matter.
name = "model.encoder.layers.1.self_attn.v_proj.weight"
sources = {role: read_tensors(path) for role, path in triple.items()}
sources["secondary"][name] *= 1e7
large = hsa.Merger(**sources, num_heads=4, num_layers=2, targets="attention-all", backend="triton")
before = {name: raw_bytes(tensor) for name, tensor in half.items()}
try:
    large.apply_(half, k=1.0, lam=0.0)
    raise SystemExit("an overflow was written")
except hsa.NonFiniteError as error:
    assert f"{name}, head" in str(error), error
assert {name: raw_bytes(tensor) for name, tensor in half.items()} == before
version = model[name]._version
torch.set_default_device("meta")
with torch.inference_mode():
    gpu = hsa.Merger(**triple, targets="attention-all", backend="triton")
    gpu.apply_(model, lam=0.1)
    result = gpu.merge(lam=0.1)
torch.set_default_device(None)
assert model[name]._version > version
expected = cpu.merge(lam=0.1)
assert all(raw_bytes(expected[name]) == raw_bytes(result[name]) == raw_bytes(model[name]) for name in expected)
gpu.apply_(model, lam=0.3)
expected = cpu.merge(lam=0.3)
assert all(raw_bytes(tensor) == raw_bytes(model[name]) for name, tensor in expected.items())
try:
    hsa.Merger(**triple, num_heads=64, backend="triton")
    raise SystemExit("more heads than the kernels have room for")
except hsa.BackendUnavailable as error:
    assert "expected 1 to 62, found 64; use backend='cpu'" in str(error), error

known = dict(gpu._resident._tables)
gpu.apply_(model, lam=0.2)
assert gpu._resident._tables == known, "tables were made again for tensors that were written before"
print("same")
"""

WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None
from hsa.cli.app import run

sys.exit(run(sys.argv[1:]))
"""


def run_interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh process whose kernels are interpreted; what it has written is verified."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **INTERPRETED},
    )
    if done.returncode == 0:
        check_command(arguments)
    return done


def weights(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in snapshot(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(
    "options",
    [(), ("--dtype=bfloat16", "--k=0.3"), ("--targets=attention-all", "--attention-scale=0.5", "--lambda=0.1")],
    ids=["patch", "cast", "columns-and-scale"],
)
def test_the_same_file_as_the_cpu_backend(shared_triple: Triple, tmp_path: Path, options: tuple[str, ...]) -> None:
    for backend, run in (("cpu", run_hsa), ("triton", run_interpreted)):
        done = run(*merge_arguments(shared_triple, tmp_path / backend, f"--backend={backend}", *options))
        assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "triton") == weights(tmp_path / "cpu") != {}


def test_the_same_file_on_the_demo_triple(tmp_path: Path) -> None:
    triple = write_triple(tmp_path / "sources", SHAPES["demo"], dtype="float16")
    for backend, run in (("cpu", run_hsa), ("triton", run_interpreted)):
        done = run(*merge_arguments(triple, tmp_path / backend, f"--backend={backend}", "--json"))
        assert done.returncode == 0, done.stderr
        assert f'"backend": "{backend}"' in done.stdout
    assert weights(tmp_path / "triton") == weights(tmp_path / "cpu") != {}


def test_merger_in_the_interpreter(shared_triple: Triple) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MERGER, *map(str, shared_triple.values())],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **INTERPRETED},
    )
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_not_finite_sources_are_named(triple: Triple, tmp_path: Path, role: str) -> None:
    name = "model.encoder.layers.1.self_attn.k_proj.weight"
    poke(triple[role] / "model.safetensors", name, 17 * 64 + 3, struct.pack("<f", math.nan))
    done = run_hsa(*merge_arguments(triple, tmp_path / "out", "--backend=triton"), env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 2
    assert f"{role} " in done.stderr and f"tensor {name}, head 1 holds NaN or Inf" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sources"]


def test_the_interpreter_has_no_cuda(shared_triple: Triple, tmp_path: Path) -> None:
    done = run_hsa(*merge_arguments(shared_triple, tmp_path / "out", "--device=cuda"), env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 2
    assert "with TRITON_INTERPRET=1 the kernels run on the CPU" in done.stderr


@pytest.mark.parametrize(("backend", "code"), [("cpu", 0), ("auto", 0), ("triton", 2)])
def test_without_triton(shared_triple: Triple, tmp_path: Path, backend: str, code: int) -> None:
    arguments = merge_arguments(shared_triple, tmp_path / "out", f"--backend={backend}")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "out").exists() == (code == 0)
    if code:
        assert "backend 'triton' cannot be imported" in done.stderr and "--backend cpu" in done.stderr
