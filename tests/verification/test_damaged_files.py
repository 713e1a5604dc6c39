"""`hsa verify` of files that are damaged, missing, strays, or replaced while they are read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forged_outputs import Triple, forge, named, told, truncate
from helpers import ordinary_user

import hsa
from hsa.errors import MachineError, SourceChanged
from hsa.system.manifest import PROVENANCE

# Whole files -----------------------------------------------------------------------------------------------


def empty(path: Path) -> None:
    os.truncate(path, 0)


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def remove(path: Path) -> None:
    path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_name(f"{path.stem}.other{path.suffix}"))


def link_out(path: Path) -> None:
    elsewhere = path.parents[1] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def link_inside(path: Path) -> None:
    path.rename(path.with_name(".hidden"))
    path.symlink_to(".hidden")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (truncate, empty, extend, remove, rename, link_out, link_inside, dangling, loop, pipe, folder)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file(merged: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    for name in sorted(os.listdir(merged)):
        out = Path(shutil.copytree(merged, tmp_path / name / "out"))
        damage(out / name)
        report = hsa.verify(out)
        assert name in named(report), told(report)
        assert all("\n" not in problem.what for problem in report.problems)
        if damage is rename and name not in (PROVENANCE, "README.md"):  # without the one no file is known
            assert len(named(report)) >= 2, "the file under its new name, too"


@pytest.mark.parametrize(
    "name",
    [
        "model-00009-of-00009.safetensors",
        "pytorch_model.bin",
        "tf_model.h5",
        "model.fp16.safetensors",
        "model.safetensors.index.fp16.index.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "Tokenizer.4.0.0.json",
        "vocabulary.txt",
        "processor_config.json",
        "config.4.0.0.json",
        "chat_template.jinja",
        "custom_generate",
        "code.py",
    ],
)
def test_a_stray_file_that_a_loader_would_read_is_a_problem(out: Path, name: str) -> None:
    (out / name).unlink(missing_ok=True)
    forge(out, lambda document: document["files"].pop(name, None))
    (out / name).write_bytes(b"x")
    report = hsa.verify(out)
    assert named(report) == {name} and "does not know it" in told(report)


@pytest.mark.parametrize(
    "name", ["wer.json", "extra.json", "trainer_state.json", "all_results.json", "notes.txt", "log", "runs", "x.yaml"]
)
def test_any_other_stray_is_a_note_and_no_problem(out: Path, name: str) -> None:
    if name == "runs":
        (out / name).mkdir()
    else:
        (out / name).write_bytes(b"x")
    report = hsa.verify(out)
    assert report.ok, told(report)
    assert report.notes == (f"1 files beside the output were not looked at, such as {name!r}",)


def test_a_file_that_may_not_be_read(merged: Path) -> None:
    top = Path(tempfile.mkdtemp())
    try:
        top.chmod(0o755)
        out = Path(shutil.copytree(merged, top / "out"))
        for name in ("config.json", "vocab.json"):
            (out / name).chmod(0)
        with ordinary_user():
            report = hsa.verify(out)
        assert named(report) == {"config.json", "vocab.json"} and "Permission denied" in told(report)
    finally:
        shutil.rmtree(top)


def test_a_disk_that_fails(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a damaged output, and not a sound one: an error of the machine."""
    preadv = os.preadv

    def failing(fd: int, views: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}").endswith("vocab.json"):
            raise OSError(5, os.strerror(5))
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(MachineError, match=r"vocab\.json failed: Input/output error"):
        hsa.verify(out)


# Replaced while it is read ---------------------------------------------------------------------------------


def test_an_output_that_is_replaced_while_it_is_read_is_verified_whole(shared_triple: Triple, tmp_path: Path) -> None:
    output = tmp_path / "out"
    hsa.merge(**shared_triple, output=output, sync=False)
    replaced: list[int] = []

    def replace_once(done: int, total: int) -> None:
        if not replaced:
            replaced.append(done)
            hsa.merge(**shared_triple, output=output, k=0.9, sync=False, overwrite=True)

    report = hsa.verify(output, progress=replace_once)
    assert replaced and report.ok, told(report)
    assert report.record is not None and report.record.parameters["k"] == 0.9
    assert report.notes == (f"{output} was replaced while it was read; this is of what replaced it",)


def test_an_output_that_is_replaced_again_and_again_is_called_that(shared_triple: Triple, tmp_path: Path) -> None:
    """And is not called damaged."""
    output = tmp_path / "out"
    hsa.merge(**shared_triple, output=output, sync=False)

    def replace_it(done: int, total: int) -> None:
        hsa.merge(**shared_triple, output=output, sync=False, overwrite=True)

    with pytest.raises(SourceChanged, match=r"was replaced 3 times while it was read; verify it once no run writes"):
        hsa.verify(output, progress=replace_it)


def test_an_output_that_is_removed_while_it_is_read_is_called_that(out: Path) -> None:
    with pytest.raises(SourceChanged, match="was removed while it was read"):
        hsa.verify(out, progress=lambda done, total: shutil.rmtree(out, ignore_errors=True))


def test_a_file_that_changes_while_it_is_read_is_not_called_withdrawn(out: Path, monkeypatch: Any) -> None:
    (path, *_) = sorted(out.glob("*.safetensors"))
    preadv, once = os.preadv, []

    def touched(fd: int, views: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == str(path) and len(views[0]) > 1 << 16 and not once:
            once.append(os.utime(path, ns=(1, 1)))
        return preadv(fd, views, offset)

    monkeypatch.setattr(os, "preadv", touched)
    report = hsa.verify(out, threads=1)
    assert path.name in named(report) and "changed while it was read; verify it again" in told(report)
    assert "withdrawn" not in told(report)
