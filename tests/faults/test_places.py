"""Destinations and sources that are full, read-only, unreadable, elsewhere, links, in use, or changing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_harness import FULL, Fault, Injector, Operation, Points, Stage, attempt, make_stage
from fault_operations import OPERATIONS
from helpers import mounted, ordinary_user, snapshot

from hsa.errors import HsaError
from hsa.system import fsio

MANY = 1 if FULL else 20
"""Every which point of a walk is tried."""


@pytest.fixture(params=OPERATIONS, ids=lambda operation: operation.name)
def stage(request: pytest.FixtureRequest, shared_triple: dict[str, Path], tmp_path: Path) -> Stage:
    operation: Operation = request.param
    return make_stage(operation, tmp_path / "stage", shared_triple)


@pytest.fixture
def open_to_all(request: pytest.FixtureRequest, shared_triple: dict[str, Path]) -> Iterator[Path]:
    """A folder that other users can reach, for root's rights are let go of."""
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    yield top
    subprocess.run(["chmod", "-R", "u+rwX", str(top)], check=True)
    shutil.rmtree(top)


def copied(stage: Stage, folder: Path) -> dict[str, Path]:
    return {role: Path(shutil.copytree(path, folder / role)) for role, path in stage.sources.items()}


def refused(stage: Stage, out: Path, *causes: str) -> None:
    """The run ends with an error that names one of the causes."""
    with pytest.raises(HsaError) as caught:
        stage.operation.run(stage.sources, out, "new")
    assert any(cause in str(caught.value) for cause in causes), caught.value
    assert "\n" not in str(caught.value)


# Full and read-only ----------------------------------------------------------------------------------------


def test_a_full_disk(stage: Stage) -> None:
    points = Points("full disk (tmpfs)", stage.operation)
    needed = sum(path.stat().st_size for path in stage.kept["new"].iterdir())
    with mounted(stage.root / "disk", "-t", "tmpfs", "-o", "size=8m", "none") as point:
        for earlier in (False, True):
            for leave in range(0, needed + 64 * 1024, 8192 * MANY):
                with points.point(f"{leave} bytes free, earlier output {earlier}"):
                    place = point / "place"
                    shutil.rmtree(place, ignore_errors=True)
                    (point / "filler").unlink(missing_ok=True)
                    place.mkdir()
                    if earlier:
                        shutil.copytree(stage.kept["old"], place / "out")
                    with (point / "filler").open("wb") as file:
                        os.posix_fallocate(file.fileno(), 0, max(1, fsio.free_bytes(point) - leave))
                    try:
                        stage.operation.run(stage.sources, place / "out", "new")
                    except HsaError as error:
                        assert "No space left" in str(error) and "bytes are free" in str(error), error
                        assert error.exit_code == 1
                        assert stage.judge(place / "out", earlier=earlier) == ("old" if earlier else "absent")
                    else:
                        assert stage.judge(place / "out", earlier=earlier) == "new"
                    assert os.listdir(place) in ([], ["out"])
    points.end(at_least=8)


def test_a_read_only_destination(stage: Stage) -> None:
    points = Points("read-only destination", stage.operation)
    with mounted(stage.root / "disk", "-t", "tmpfs", "-o", "size=8m", "none") as point:
        for name in ("new", "earlier"):
            (point / name).mkdir()
        shutil.copytree(stage.kept["old"], point / "earlier" / "out")
        subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
        for name in ("new", "earlier", "far/away"):
            with points.point(name):
                refused(stage, point / name / "out", "Read-only file system")
                stage.judge(point / name / "out", earlier=name == "earlier")
    points.end(at_least=3)


def test_a_directory_that_may_not_be_written_to(stage: Stage, open_to_all: Path) -> None:
    points = Points("directory without permission to write", stage.operation)
    sources = {
        role: Path(shutil.copytree(path, open_to_all / "sources" / role)) for role, path in stage.sources.items()
    }
    for name in ("new", "earlier"):
        (open_to_all / name).mkdir()
    shutil.copytree(stage.kept["old"], open_to_all / "earlier" / "out")
    subprocess.run(["chmod", "-R", "a+rX,a-w", str(open_to_all)], check=True)
    for name in ("new", "earlier"):
        with points.point(name), ordinary_user(), pytest.raises(HsaError, match="Permission denied"):
            stage.operation.run(sources, open_to_all / name / "out", "new")
        stage.judge(open_to_all / name / "out", earlier=name == "earlier")
    points.end(at_least=2)


def test_a_source_that_may_not_be_read(stage: Stage, open_to_all: Path) -> None:
    points = Points("unreadable shard or config", stage.operation)
    sources = {
        role: Path(shutil.copytree(path, open_to_all / "sources" / role)) for role, path in stage.sources.items()
    }
    place = open_to_all / "place"
    place.mkdir()
    place.chmod(0o777)
    for path in [source / name for source in sources.values() for name in ("model.safetensors", "config.json")]:
        if not path.exists():
            continue
        before = snapshot(open_to_all / "sources")
        path.chmod(0)
        with points.point(str(path.relative_to(open_to_all))):
            with ordinary_user():
                with pytest.raises(HsaError, match="Permission denied") as caught:
                    stage.operation.run(sources, place / "out", "new")
                assert path.name in str(caught.value)
            assert os.listdir(place) == []
        path.chmod(0o644)
        assert snapshot(open_to_all / "sources") == before
    points.end(at_least=2)


# Elsewhere -------------------------------------------------------------------------------------------------


def walk(stage: Stage, injector: Injector) -> list[int]:
    """The numbers of the calls of a run."""
    with injector.watching():
        stage.run("new")
    return list(range(1, len(injector.trace) + 1))[:: 5 * MANY if not FULL else 5]


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "overwrite"])
def test_a_destination_on_another_filesystem(stage: Stage, earlier: bool) -> None:
    points = Points("error at a call, destination on another filesystem", stage.operation)
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == stage.root.stat().st_dev:
        pytest.skip("/dev/shm is no other filesystem that may be written to")
    elsewhere = Path(tempfile.mkdtemp(dir=memory))
    try:
        stage.place = elsewhere / "place"
        stage.reset(earlier=earlier)
        injector = Injector(stage.place)
        for at in walk(stage, injector):
            with points.point(f"call {at}"):
                stage.reset(earlier=earlier)
                attempt(stage, injector, Fault(at, 5), earlier=earlier)
    finally:
        shutil.rmtree(elsewhere)
    points.end(at_least=2)


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "overwrite"])
def test_a_destination_that_is_a_link(stage: Stage, earlier: bool) -> None:
    """The link stays what it was, and what it leads to is absent, old or new."""
    points = Points("error at a call, destination is a link", stage.operation)
    link = stage.root / "link"
    stage.reset(earlier=earlier)
    link.symlink_to(stage.out)
    injector = Injector(stage.place)

    def run(variant: str = "new") -> None:
        stage.operation.run(stage.sources, link, variant)

    stage.run = run  # type: ignore[method-assign]
    for at in walk(stage, injector):
        with points.point(f"call {at}"):
            stage.reset(earlier=earlier)
            attempt(stage, injector, Fault(at, 5), earlier=earlier)
            assert os.readlink(link) == str(stage.out)
    points.end(at_least=2)


# At the same time ------------------------------------------------------------------------------------------


def test_a_second_run_to_the_same_destination(stage: Stage) -> None:
    """Begun at every moment of the first, and refused at once; the first one ends whole."""
    points = Points("second run to the destination, at a call", stage.operation)
    injector = Injector(stage.place)
    stage.reset(earlier=True)
    for at in walk(stage, injector):
        with points.point(f"call {at}"):
            stage.reset(earlier=True)
            answers: list[str] = []

            def second(number: int, name: str, at: int = at, answers: list[str] = answers) -> None:
                if number == at:
                    thread = threading.Thread(target=other, args=(answers,))
                    thread.start()
                    thread.join(60)

            def other(answers: list[str]) -> None:
                done = subprocess.run(
                    [sys.executable, "-m", "hsa", *stage.operation.arguments(stage.sources, stage.out, "old")],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                answers.append(f"{done.returncode} {done.stderr}")

            with injector.watching(hook=second):
                try:
                    stage.run("new")
                    first = "finished"
                except HsaError as error:
                    first = str(error)
            (answer,) = answers
            assert answer.startswith("0 ") or ("2 hsa: error: " in answer and "another run" in answer), answer
            assert first == "finished" or "another run" in first, first
            assert first == "finished" or answer.startswith("0 "), "one of the two succeeds"
            stage.judge(earlier=True)
            assert os.listdir(stage.place) == ["out"]
    points.end(at_least=2)


@pytest.mark.parametrize("how", ["truncated", "rewritten", "replaced", "removed", "grown"])
def test_a_source_that_changes_while_it_is_read(stage: Stage, how: str) -> None:
    """At every call on a source in turn; when the change comes before the file is opened, it is just another source."""
    points = Points(f"source {how} while it is read", stage.operation)
    roles = [role for role in stage.sources if (stage.sources[role] / "model.safetensors").is_file()]
    stage.reset(earlier=True)
    injector = Injector(stage.root / "sources")
    with injector.watching():
        stage.run("new")
    reads = [at for at, name in enumerate(injector.trace, 1) if name == "preadv"]
    pristine = stage.root / "pristine"
    shutil.copytree(stage.root / "sources", pristine)
    for role in roles:
        for at in reads[1 :: 3 if FULL else 3 * MANY]:
            with points.point(f"{role} {how} at call {at}"):
                stage.reset(earlier=True)
                path = stage.sources[role] / "model.safetensors"
                with injector.watching(hook=lambda n, name, at=at, path=path: change(path, how) if n == at else None):
                    try:
                        stage.run("new")
                        first = ""
                    except HsaError as error:
                        first = str(error)
                shutil.rmtree(stage.root / "sources")
                shutil.copytree(pristine, stage.root / "sources", copy_function=shutil.copy2)
                state = stage.judge(earlier=True)
                assert os.listdir(stage.place) == ["out"]
                if state == "new":  # the same bytes, before the file was opened
                    assert first == "" and how in ("rewritten", "replaced"), first
                else:
                    assert role in first and any(word in first for word in CHANGES), first
                points.seen[state] += 1
    points.end(at_least=3)
    assert points.seen["old"] > 0


CHANGES = (
    "changed while",
    "ended at byte",
    "vanished",
    "is truncated",
    "tensors end at data byte",
    "holds no weights",
    "cannot be opened",
    "cannot open",
)
"""What a message may say of it: the last five where the change came before the file was opened."""


def change(path: Path, how: str) -> None:
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "removed":
        path.unlink()
    elif how == "replaced":
        copy = path.with_name("copy")
        shutil.copy(path, copy)
        copy.replace(path)
    elif how == "grown":
        with path.open("ab") as file:
            file.write(b"more")
    else:
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.write(content)
