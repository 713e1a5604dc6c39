"""`hsa demo`: what it prints, what it keeps, and that its own checks can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import run_hsa

import hsa
from hsa.testing import demo
from hsa.testing.whisper_checkpoints import SHAPES, write_triple


def test_the_whole_demo(tmp_path: Path) -> None:
    kept = tmp_path / "new" / "kept"
    done = run_hsa("demo", f"--output={kept}")
    assert done.returncode == 0, done.stderr
    assert "All checks passed" in done.stdout
    assert f"in {kept}: nothing is installed or downloaded" in done.stdout
    assert "k = 0.6 of a tensor's 6 heads is 3.6, which rounds to 4." in done.stdout
    drawn_heads = done.stdout.partition("layer  q")[2].partition("All checks")[0].count
    assert f"The 12 weights: {drawn_heads('#')} of their {drawn_heads('#') + drawn_heads('.')} heads" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.strip()[:1].isdigit() and "##" in line]
    for layer, row in enumerate(rows):
        planted = {(layer + offset) % 6 for offset in (0, 1, 3, 4)}
        drawn = "".join("#" if head in planted else "." for head in range(6))
        assert row == [str(layer), drawn, drawn, drawn]
    assert len(rows) == 4
    assert sorted(path.name for path in kept.iterdir()) == ["base", "merged", "primary", "secondary"]
    assert sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) < demo.NEEDED < 200_000_000


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("chapter 1")
    done = run_hsa("demo", f"--output={tmp_path}")
    assert done.returncode == 2
    assert done.stderr == f"hsa: error: output {tmp_path} is not an empty directory; name a new one\n"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_its_checks_can_fail(tmp_path: Path) -> None:
    paths = write_triple(tmp_path, SHAPES["demo"], dtype="float16", loud_heads=demo.LOUD)
    report = hsa.merge(output=tmp_path / "out", k=0.9, **paths)
    with pytest.raises(demo.DemoFailed, match="were merged"):
        demo._check_heads(report)
    with pytest.raises(demo.DemoFailed, match="differs from the oracle"):
        demo._check_bytes(report, paths)
