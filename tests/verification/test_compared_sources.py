"""`hsa verify` with sources: which of them another output was made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from forged_outputs import COPIED, TARGET, WEIGHTS, Triple, named, told, truncate
from helpers import merge_arguments, poke, read_safetensors, run_hsa, safetensors_bytes

import hsa
from hsa.system.manifest import PROVENANCE
from hsa.testing.whisper_checkpoints import SHAPES, write_triple


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_a_source_with_other_targets_is_named(out: Path, triple: Triple, role: str) -> None:
    poke(triple[role] / WEIGHTS, TARGET, 0, np.float32(0.25).tobytes())
    report = hsa.verify(out, **triple)
    assert not report.ok and report.sources_compared
    assert named(report) & {"base", "primary", "secondary"} == {role}
    assert f"{role}: is not the recorded source: its targets have BLAKE3" in told(report)


def test_a_primary_with_other_bytes_outside_the_targets(out: Path, triple: Triple) -> None:
    poke(triple["primary"] / WEIGHTS, COPIED, 0, np.float32(0.25).tobytes())
    report = hsa.verify(out, **triple)
    assert COPIED in told(report) and not named(report) & set(triple)


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
def test_a_source_of_another_size_is_named_and_nothing_is_merged(out: Path, triple: Triple, role: str) -> None:
    path = triple[role] / WEIGHTS
    header, data = read_safetensors(path)
    header["__metadata__"] = {"format": "pt", "more": "more"}
    path.write_bytes(safetensors_bytes(header, data))
    report = hsa.verify(out, **triple)
    assert named(report) == {role} and not report.sources_compared
    assert any("nothing was recomputed" in note for note in report.notes)


def test_the_wrong_way_round(out: Path, shared_triple: Triple) -> None:
    other = {**shared_triple, "primary": shared_triple["secondary"], "secondary": shared_triple["primary"]}
    report = hsa.verify(out, **other)
    assert named(report) >= {"primary", "secondary"} and "base" not in named(report)


def test_a_source_that_holds_nan(out: Path, triple: Triple) -> None:
    poke(triple["secondary"] / WEIGHTS, TARGET, 0, b"\x00\x00\xc0\x7f")
    report = hsa.verify(out, **triple)
    assert named(report) == {"sources"} and "NaN" in told(report) and not report.sources_compared


def test_without_a_provenance_nothing_can_be_merged(out: Path, shared_triple: Triple) -> None:
    (out / PROVENANCE).unlink()
    report = hsa.verify(out, **shared_triple)
    assert PROVENANCE in named(report) and not report.sources_compared and report.record is None
    assert any("nothing was recomputed" in note for note in report.notes)


def test_missing_and_short_files_are_compared_as_far_as_they_go(out: Path, shared_triple: Triple) -> None:
    first, second = sorted(out.glob("*.safetensors"))[:2]
    first.unlink()
    truncate(second)
    report = hsa.verify(out, **shared_triple)
    assert {first.name, second.name} <= named(report) and "the sources give" in told(report)


def test_memory_stays_bounded(tmp_path: Path) -> None:
    triple = write_triple(tmp_path / "triple", SHAPES["demo"])
    hsa.merge(**triple, output=tmp_path / "out", sync=False)
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    done = run_hsa("verify", str(tmp_path / "out"), "--json", "--sources", *merge_arguments(triple, tmp_path)[1:4])
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["sources_compared"]
    assert found["bytes_read"] > 2 * size > 100e6
    assert found["peak_memory_bytes"] < 64e6
