"""`hsa.sweep` with a method that has no patches: each point is a merge of its own, planned and opened once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import run_hsa, snapshot

import hsa
from hsa.planning import plan as plan_module
from hsa.planning.tasks import TaskFinder
from hsa.sweeps import points as points_module

Triple = dict[str, Path]
PLUGIN = Path(__file__).resolve().parents[1] / "support" / "maximum_method.py"


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSA_PLUGINS", str(PLUGIN))


@pytest.fixture
def models(shared_triple: Triple) -> list[Path]:
    return [shared_triple["primary"], shared_triple["secondary"]]


def swept(models: list[Path], output: Path, factor: list[float], **options: Any) -> hsa.SweepReport:
    given = {"full": True, "sync": False, **options}
    return hsa.sweep(method="maximum", models=models, output=output, factor=factor, **given)


def test_every_point_is_its_merge(models: list[Path], tmp_path: Path) -> None:
    report = swept(models, tmp_path / "sweep", [0.5, 1.0])
    assert report.made == ("maximum_factor0.5", "maximum_factor1") and report.warnings == ()
    for factor, point in zip([0.5, 1.0], report.made, strict=True):
        hsa.merge(method="maximum", models=models, output=tmp_path / point, factor=factor, sync=False)
        assert snapshot(tmp_path / "sweep" / point) == snapshot(tmp_path / point)
    listed = json.loads((tmp_path / "sweep" / "index.json").read_text(encoding="utf-8"))["points"]
    assert [(each["place"], each["method"], each["factor"]) for each in listed] == [
        ("maximum_factor0.5", "maximum", 0.5),
        ("maximum_factor1", "maximum", 1.0),
    ]
    assert hsa.verify(tmp_path / "sweep").ok


def test_structure_is_planned_once(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kw: (calls.append(name), original(*args, **kw))[1])

    count(TaskFinder, "targets")
    count(plan_module, "pack")
    swept(models, tmp_path / "sweep", [0.5, 1.0, 2.0, 3.0])
    assert (calls.count("targets"), calls.count("pack")) == (1, 1)


def test_without_full_it_is_refused_in_one_line(models: list[Path], tmp_path: Path) -> None:
    arguments = ["sweep", "--method=maximum", *(f"--model={path}" for path in models), "--factor=0.5,1"]
    done = run_hsa(*arguments, f"--output={tmp_path / 'sweep'}")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "method maximum changes whole tensors; give --full to write checkpoints" in done.stderr
    assert not (tmp_path / "sweep").exists()
    done = run_hsa(*arguments, f"--output={tmp_path / 'sweep'}", "--full", "--json", "--no-sync")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["made"] == ["maximum_factor0.5", "maximum_factor1"]


def test_finished_points_are_verified_and_skipped(models: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    swept(models, place, [0.5, 1.0])
    before = snapshot(place)
    again = swept(models, place, [0.5, 1.0])
    assert (again.made, again.skipped) == ((), ("maximum_factor0.5", "maximum_factor1"))
    assert snapshot(place) == before
    weights = place / "maximum_factor1" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    mended = swept(models, place, [1.0, 2.0])
    assert mended.made == ("maximum_factor1", "maximum_factor2") and mended.skipped == ()
    assert any("maximum_factor1 is damaged and is rebuilt" in note for note in mended.notes)
    assert weights.read_bytes() == whole
    assert [entry.place for entry in mended.entries] == ["maximum_factor0.5", "maximum_factor1", "maximum_factor2"]


def test_several_at_a_time_give_the_same_files(models: list[Path], tmp_path: Path) -> None:
    for jobs in (1, 2):
        swept(models, tmp_path / str(jobs), [0.5, 1.0, 2.0], jobs=jobs, threads=2)
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2")


def test_progress_ends_with_all_bytes(models: list[Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = swept(models, tmp_path / "sweep", [0.5, 1.0], progress=lambda done, total: seen.append((done, total)))
    done, total = seen[-1]
    assert seen == sorted(seen) and len({total for _, total in seen}) == 1
    weights = sum((tmp_path / "sweep" / name / "model.safetensors").stat().st_size for name in report.made)
    assert done == total == weights


def test_a_full_disk_is_found_before_the_work(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(points_module.fsio, "free_bytes", lambda path: 1000)
    with pytest.raises(hsa.MachineError, match="2 points need"):
        swept(models, tmp_path / "sweep", [0.5, 1.0])


def test_a_directory_of_other_sources_is_refused(models: list[Path], tmp_path: Path) -> None:
    swept(models, tmp_path / "sweep", [0.5])
    before = snapshot(tmp_path / "sweep")
    with pytest.raises(hsa.HsaError, match=r"other sources|its sources differ"):
        swept(models[::-1], tmp_path / "sweep", [0.5, 1.0])
    assert snapshot(tmp_path / "sweep") == before


def test_strict_writes_no_doubtful_point(shared_triple: Triple, tmp_path: Path) -> None:
    """The same model given twice is warned of."""
    twice = [shared_triple["primary"]] * 2
    report = swept(twice, tmp_path / "sweep", [0.5])
    assert any("is the same model given twice?" in text for text in report.warnings)
    with pytest.raises(hsa.StrictError, match="given twice"):
        swept(twice, tmp_path / "strict", [0.5], strict=True)
    assert not (tmp_path / "strict" / "maximum_factor0.5").exists()
