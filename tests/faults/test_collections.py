"""Directories of many outputs: what stands in them is whole, and another run ends with the files of an undisturbed one.

A sweep and a release tree are no outputs that appear at once: their points do. After any fault each point is absent or
whole, byte for byte, and so is the index that lists them, at some moment of the work.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_harness import CALLS, FULL, Fault, Injector, Operation, Points, Snapshot, assert_ended_by
from helpers import snapshot

import hsa

INDEXES = {"index.json", "index.csv", "README.md"}
KILLS = 12 if FULL else 1
SAMPLE = 11 if FULL else 149
"""Of the calls of a run, every which one is tried."""

Sources = dict[str, Path]


@dataclass(frozen=True)
class Collection:
    """A command that fills a directory: in this process, and as a command line; and where its points stand."""

    name: str
    run: Callable[[Sources, Path], Any]
    arguments: Callable[[Sources, Path], Sequence[str]]

    @property
    def operation(self) -> Operation:
        """For the table."""
        return Operation(self.name, lambda *_: None, lambda *_: (), lambda _: None)


LAMBDAS = (0.1, 0.5)


def sweep(sources: Sources, output: Path, *, full: bool) -> object:
    return hsa.sweep(**sources, output=output, lam=LAMBDAS, full=full, threads=1)


def sweep_command(sources: Sources, output: Path, *, full: bool) -> list[str]:
    given = [part for role, path in sources.items() for part in (f"--{role}", str(path))]
    return ["sweep", *given, "--lambda=0.1,0.5", f"--output={output}", "--threads=2", *(["--full"] if full else [])]


def recipe(sources: Sources) -> Path:
    path = next(iter(sources.values())).parent.parent / "recipe.yaml"
    if not path.exists():
        merges = [{"name": f"lambda-{n}", "group": "g", "lambda": lam} for n, lam in enumerate(LAMBDAS)]
        defaults = {role: str(place) for role, place in sources.items()}
        path.write_text(yaml.safe_dump({"defaults": defaults, "merges": merges}))
    return path


def release(sources: Sources, output: Path) -> object:
    """A release goes on past an entry that fails, and reports it; here that is an error, as for the others."""
    report = hsa.release(recipe(sources), output, threads=1)
    problems = [str(entry.problem) for entry in report.failed] + [report.index_problem or ""]
    if not report.ok:
        raise hsa.HsaError("; ".join(filter(None, problems)))
    return report


COLLECTIONS = (
    Collection(
        "sweep",
        lambda sources, output: sweep(sources, output, full=False),
        lambda sources, output: sweep_command(sources, output, full=False),
    ),
    Collection(
        "sweep --full",
        lambda sources, output: sweep(sources, output, full=True),
        lambda sources, output: sweep_command(sources, output, full=True),
    ),
    Collection(
        "release",
        release,
        lambda sources, output: ["release", str(recipe(sources)), f"--output={output}", "--threads=2"],
    ),
)


@dataclass
class Stage:
    """Copied sources, a place for the directory, and what an undisturbed run leaves in it."""

    collection: Collection
    root: Path
    sources: Sources
    whole: Snapshot
    before: Snapshot

    @property
    def place(self) -> Path:
        return self.root / "place"

    @property
    def out(self) -> Path:
        return self.place / "out"

    def reset(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()

    def judge(self) -> str:
        """How many of the points stand; AssertionError where one is not whole, or a source was changed."""
        assert snapshot(self.root / "sources") == self.before, "a source was changed"
        found = snapshot(self.out) if self.out.exists() else {}
        standing = {name: digest for name, digest in found.items() if not _hidden(name) and name not in INDEXES}
        for name, digest in standing.items():
            assert self.whole.get(name) == digest, f"{name} is not what an undisturbed run writes"
        for name in standing:  # a directory that stands holds all of its files
            if "hsa_merge.json" in name:
                folder = os.path.dirname(name)
                missing = [other for other in self.whole if os.path.dirname(other) == folder and other not in standing]
                assert not missing, f"{folder} lacks {missing}"
        return "all" if standing.keys() >= self.whole.keys() - INDEXES else "some" if standing else "none"

    def tidy(self) -> None:
        """The next run ends with the files of an undisturbed one, and nothing else."""
        self.collection.run(self.sources, self.out)
        assert os.listdir(self.place) == ["out"], os.listdir(self.place)
        assert snapshot(self.out) == self.whole


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


@pytest.fixture(scope="module", params=COLLECTIONS, ids=lambda collection: collection.name)
def stage(request: pytest.FixtureRequest, shared_triple: Sources, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    collection: Collection = request.param
    root = tmp_path_factory.mktemp("collections")
    sources = {role: Path(shutil.copytree(path, root / "sources" / role)) for role, path in shared_triple.items()}
    collection.run(sources, root / "kept")
    return Stage(collection, root, sources, snapshot(root / "kept"), snapshot(root / "sources"))


def test_an_error_at_calls_all_the_way(stage: Stage) -> None:
    injector = Injector(stage.place, stage.root / "sources")
    stage.reset()
    with injector.watching():
        stage.collection.run(stage.sources, stage.out)
    calls = list(injector.trace)
    assert snapshot(stage.out) == stage.whole
    points = Points("I/O error or short I/O at a call", stage.collection.operation)
    walk = [(at, answer) for at, name in enumerate(calls, 1) for answer in CALLS[name][1]]
    for at, answer in walk[::SAMPLE]:
        with points.point(f"call {at} {calls[at - 1]}: {answer}"):
            stage.reset()
            fault = Fault(at, answer)
            with injector.watching(fault):
                try:
                    stage.collection.run(stage.sources, stage.out)
                    finished = True
                except hsa.HsaError as error:
                    finished = False
                    assert fault.cause is not None, f"a short answer is no error: {error}"
                    assert fault.cause in str(error), f"the message does not name {fault.cause!r}: {error}"
            assert injector.struck, "the fault was not met"
            state = stage.judge()
            assert not finished or state == "all", state
            points.seen["finished" if finished else state] += 1
            stage.tidy()
    points.end(at_least=len(walk[::SAMPLE]))
    assert points.seen["none"] + points.seen["some"] > 0


def test_a_disk_that_is_gone_from_some_call_on(stage: Stage) -> None:
    injector = Injector(stage.place)
    stage.reset()
    with injector.watching():
        stage.collection.run(stage.sources, stage.out)
    calls = len(injector.trace)
    points = Points("disk gone for good from a call on", stage.collection.operation)
    for at in range(1, calls, max(1, calls // (40 if FULL else 4))):
        with points.point(f"from call {at} on"):
            stage.reset()
            with injector.watching(Fault(at, errno.EROFS, lasting=True)):
                try:
                    stage.collection.run(stage.sources, stage.out)
                except hsa.HsaError:
                    points.seen["refused"] += 1
            stage.judge()
            stage.tidy()
    points.end(at_least=4)
    assert points.seen["refused"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_at_a_random_moment(stage: Stage, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "hsa", *stage.collection.arguments(stage.sources, stage.out)]
    stage.reset()
    begun = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.monotonic() - begun
    points = Points(f"{number.name} at a random moment", stage.collection.operation)
    for count in range(KILLS):
        share = random.random()
        with points.point(f"kill {count}, share {share:.4f} of {seconds:.2f} s"):
            stage.reset()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            time.sleep(share * seconds)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
            in_order = assert_ended_by(number, process.returncode, stderr)
            points.seen[stage.judge()] += 1
            if in_order:
                lines = stderr.splitlines()  # a release says before what it has built
                assert lines[-1].startswith("hsa: error: "), stderr
                assert not any("error" in line for line in lines[:-1]), stderr
            stage.tidy()
    points.end(at_least=KILLS)
