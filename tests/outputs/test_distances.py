"""Distances in patches and sweeps: every finite target has one, however large or small its elements are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_tensors, run_hsa, snapshot, write_tensors

import hsa
from hsa.outputs import patch_format

Triple = dict[str, Path]
LARGEST = float(torch.finfo(torch.float32).max)


def rescale(triple: Triple, largest: float) -> None:
    """Multiply every attention projection of the three by one number, so that the largest element is `largest`."""
    held = {role: read_tensors(path) for role, path in triple.items()}
    names = [name for name in held["base"] if "_proj" in name]
    most = max(float(tensors[name].abs().max()) for tensors in held.values() for name in names)
    for role, tensors in held.items():
        scaled = {n: (t.double() * (largest / most)).float() if n in names else t for n, t in tensors.items()}
        assert all(torch.isfinite(tensor).all() for tensor in scaled.values())
        write_tensors(triple[role], scaled)


def expected(triple: Triple, merged: Path, names: Any) -> tuple[float, float]:
    """The relative L2 distances of merged targets from primary and from secondary, in float64 by torch."""
    ours, one, two = (read_tensors(path) for path in (merged, triple["primary"], triple["secondary"]))

    def norm(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor] | None) -> float:
        parts = [first[n].double() - (0 if second is None else second[n].double()) for n in names]
        return sum(float((part * part).sum()) for part in parts) ** 0.5

    return norm(ours, one) / norm(one, None), norm(ours, two) / norm(two, None)


def recorded(path: Path) -> dict[str, dict[str, float | None]]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    found: dict[str, dict[str, float | None]] = json.loads(header["__metadata__"][patch_format.KEY])["distances"]
    return found


@pytest.mark.parametrize("largest", [1e-30, 1e-24, 1e18, 2e19, 1e30, LARGEST / 4])
def test_a_patch_of_targets_whose_squares_float32_cannot_hold(triple: Triple, tmp_path: Path, largest: float) -> None:
    """Above 1.8e19 a float32 square is infinite, below 1e-23 it is zero: tracebacks, and distances of 0.0."""
    rescale(triple, largest)
    patch = tmp_path / "p.safetensors"
    report = hsa.merge_patch(**triple, output=patch, sync=False)
    hsa.merge(**triple, output=tmp_path / "merged", sync=False)
    hsa.apply(triple["primary"], patch, output=tmp_path / "applied", sync=False)
    assert snapshot(tmp_path / "applied") == snapshot(tmp_path / "merged")
    found, far = recorded(patch)["all"], expected(triple, tmp_path / "merged", report.tensors)
    assert list(found) == ["primary", "secondary"]
    assert tuple(found.values()) == pytest.approx(far, rel=1e-4)


@pytest.mark.parametrize("flags", [(), ("--full",)], ids=["patches", "checkpoints"])
@pytest.mark.parametrize("largest", [1e-30, 2e19, LARGEST / 4])
def test_a_sweep_of_targets_whose_squares_float32_cannot_hold(
    triple: Triple, tmp_path: Path, largest: float, flags: tuple[str, ...]
) -> None:
    rescale(triple, largest)
    sources = [f"--{role}={path}" for role, path in triple.items()]
    output = tmp_path / "sweep"
    arguments = ("sweep", *sources, "--k=0.3,0.6", f"--output={output}", "--no-sync", *flags)
    for made in (2, 0):  # the second run measures the distances of checkpoints again
        done = run_hsa(*arguments)
        assert done.returncode == 0 and f"{made} points made" in done.stdout, done.stderr
        report = hsa.merge(**triple, output=tmp_path / "merged", k=0.3, sync=False, overwrite=True)
        (point,) = [p for p in json.loads((output / "index.json").read_text())["points"] if p["k"] == 0.3]
        found = point["distances"]["all"]
        far = expected(triple, tmp_path / "merged", report.tensors)
        assert (found["from_primary"], found["from_secondary"]) == pytest.approx(far, rel=1e-4)
        assert all(found.values())


def test_a_primary_whose_targets_are_all_zero_has_no_relative_distance(triple: Triple, tmp_path: Path) -> None:
    """It is null, and not 0.0: the merged targets do differ."""
    tensors = read_tensors(triple["primary"])
    write_tensors(triple["primary"], {n: t * 0 if "_proj" in n else t for n, t in tensors.items()})
    hsa.merge_patch(**triple, output=tmp_path / "p.safetensors", sync=False)
    found = recorded(tmp_path / "p.safetensors")["all"]
    near, far = found["primary"], found["secondary"]
    assert near is None and far is not None and far > 0
    hsa.apply(triple["primary"], tmp_path / "p.safetensors", output=tmp_path / "out", sync=False)
    report = hsa.sweep(**triple, output=tmp_path / "sweep", k=[0.6], sync=False)
    assert report.entries[0].distances["all"] == {"primary": None, "secondary": far}
    assert hsa.sweep(**triple, output=tmp_path / "sweep", k=[0.6], sync=False).skipped
