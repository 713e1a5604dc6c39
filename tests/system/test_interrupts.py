"""Runs that are killed or interrupted, at random moments and at every step: no destination, or a whole one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import merge_arguments, snapshot

import hsa
from hsa.actions import merge as merge_module
from hsa.cli import app
from hsa.system import console, fsio
from hsa.system.publish import StagedOutput
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

pytestmark = pytest.mark.long

Triple = dict[str, Path]
Snapshot = dict[str, str]

KILLS = 20
"""Random kills of a first run, and again of a run that replaces an earlier output."""

AT_WORK, MOST_KILLS = 3, 100
"""How many of them at least must land while files are written; where fewer do, more are drawn, up to so many in all."""

BEYOND = 1.2
"""The latest moment of a kill, in run times: a run may take longer than the one that was timed."""

OLD, NEW = 0.3, 0.6
"""The `k` of an earlier output and of the one that replaces it."""

STEPS = ("mkdir", "pwritev", "fsync", "rename", "unlink", "rmdir")
"""The functions of `os` through which a run changes the disk; `fsio.exchange` comes beside them."""

FORKER = """
import json, os, signal, sys
import blake3
# Once here, not in every child:
import hsa.actions.merge, hsa.backends.cpu, hsa.outputs.card, hsa.planning.reference_script
from hsa.system import fsio

def run(order):
    steps = 0
    def watch(holder, name):
        function = getattr(holder, name)
        def wrapped(*arguments, **keywords):
            nonlocal steps
            steps += 1
            if steps == order["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)
        setattr(holder, name, wrapped)
    for name in order["steps"]:
        watch(os, name)
    if not order["swap"]:
        fsio.exchange = lambda first, second: False
    watch(fsio, "exchange")
    hsa.merge(**order["merge"], threads=1)
    return steps

for line in sys.stdin:
    order = json.loads(line)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(send, str(run(order)).encode())
        finally:
            os._exit(0)
    os.close(send)
    with open(receive) as pipe:
        steps = pipe.read()
    os.waitpid(child, 0)
    print(int(steps or -1), flush=True)
"""
"""A process that forks a child for each line it reads; the child kills itself right before the step it is told to."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triple]:
    """A triple of 70 MB each, long enough at work that a signal can land in every phase."""
    yield write_triple(tmp_path_factory.mktemp("large"), SHAPES["demo"])


@pytest.fixture(scope="module")
def whole(large: Triple, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Snapshot]:
    """What a run that nothing disturbs leaves, by `k`."""
    place = tmp_path_factory.mktemp("whole")
    found = {}
    for k in (OLD, NEW):
        hsa.merge(**large, output=place / "out", k=k, overwrite=True)
        found[k] = snapshot(place / "out")
    assert found[OLD] != found[NEW]
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "place"
    place.mkdir()
    return place


def as_from_a_terminal() -> None:
    """Undo what nohup or a background shell around the tests did: an ignored signal stays ignored in children."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(arguments: Sequence[str], *, before: Callable[[], object] = as_from_a_terminal) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hsa", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )


def run_time(triple: Triple, output: Path) -> float:
    """Seconds that a whole run takes, the shorter of two."""
    times = []
    for _ in range(2):
        started = time.monotonic()
        process = start(merge_arguments(triple, output, "--overwrite", "--threads=2"))
        process.communicate(timeout=120)
        times.append(time.monotonic() - started)
        assert process.returncode == 0
    return min(times)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_kill_9_at_random_moments(
    large: Triple,
    whole: dict[float, Snapshot],
    place: Path,
    capsys: pytest.CaptureFixture[str],
    overwrite: bool,
) -> None:
    out = place / "out"
    seconds = run_time(large, place.parent / "timed")
    if overwrite:
        hsa.merge(**large, output=out, k=OLD, sync=False)
    landed: Counter[str] = Counter()
    for number in range(MOST_KILLS):
        if number >= KILLS and landed["during"] >= AT_WORK:
            break
        # Half of them spread evenly over the time that a run took, one at random in each of as many equal parts; the
        # others a random moment after the staging directory is seen, so that a slow machine is killed at work too.
        share = (number + random.random()) / KILLS if number < KILLS else random.random() / 10
        seen = number % 2 == 1 or number >= KILLS
        delay = seconds * (0.2 * share if seen else BEYOND * share)
        process = start(merge_arguments(large, out, f"--k={NEW}", "--threads=2", *["--overwrite"] * overwrite))
        try:
            while seen and process.poll() is None and not (place / ".out.hsa-staging").exists():
                time.sleep(0.0005)
            time.sleep(delay)
        finally:
            process.kill()
            process.communicate()
        found = snapshot(out) if out.exists() else None
        assert found in [whole[OLD] if overwrite else None, whole[NEW]], f"killed after {delay:.3f} s"
        finished = "after" if found == whole[NEW] else "before"
        landed["during" if (place / ".out.hsa-staging").exists() else finished] += 1
        hsa.merge(**large, output=out, k=OLD, overwrite=True, sync=False)
        assert os.listdir(place) == ["out"]
        assert snapshot(out) == whole[OLD]
        if not overwrite:
            shutil.rmtree(out)
    with capsys.disabled():
        kills = sum(landed.values())
        print(f"\n  {kills} kills over {seconds:.2f} s: " + ", ".join(f"{n} {phase}" for phase, n in landed.items()))
    assert kills >= KILLS >= 20
    assert landed["during"] >= AT_WORK >= 3, landed


# At every step ---------------------------------------------------------------------------------------------


class Forker:
    """Runs in children of one process, each killed right before a step of its choice: no start-up to wait for."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, kill: int, *, swap: bool, **merge: Any) -> int:
        """The number of steps of the whole run, or -1 when it was killed before step `kill`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        arguments = {key: str(value) if isinstance(value, Path) else value for key, value in merge.items()}
        order = {"kill": kill, "swap": swap, "steps": STEPS, "merge": arguments}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    forker = Forker()
    yield forker
    forker.process.kill()
    forker.process.communicate()


@pytest.mark.parametrize("how", ["new", "overwrite", "overwrite without swap"])
def test_kill_9_before_every_step(shared_triple: Triple, place: Path, forker: Forker, how: str) -> None:
    out, aside = place / "out", place / ".out.hsa-replaced"
    triple, overwrite, swap = shared_triple, how != "new", how != "overwrite without swap"
    for k in (OLD, NEW):
        hsa.merge(**triple, output=place / "x" / str(k), k=k)
    old, new = snapshot(place / "x" / str(OLD)), snapshot(place / "x" / str(NEW))
    (place / "x").rename(place.parent / "x")
    if overwrite:
        hsa.merge(**triple, output=out, k=OLD)
    steps = forker.run(0, swap=swap, **triple, output=out, k=NEW, overwrite=overwrite)
    assert steps > 20
    seen: Counter[str] = Counter()
    for step in range(1 if swap else steps // 2, steps + 1):  # the two ways differ at the end
        hsa.merge(**triple, output=out, k=OLD, overwrite=True, sync=False)
        assert os.listdir(place) == ["out"], step
        assert snapshot(out) == old, step
        if not overwrite:
            shutil.rmtree(out)
        assert forker.run(step, swap=swap, **triple, output=out, k=NEW, overwrite=overwrite) == -1, step
        if out.exists():
            found = snapshot(out)
            assert found in ([old, new] if overwrite else [new]), step
            seen["old" if found == old else "new"] += 1
        else:
            assert not overwrite or (not swap and snapshot(aside) == old), step
            seen["absent"] += 1
    expected = {"new": {"absent", "new"}, "overwrite": {"old", "new"}}.get(how, {"old", "absent", "new"})
    assert set(seen) == expected, seen


@pytest.mark.parametrize("how", ["new", "overwrite", "overwrite without swap"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_at_every_step(
    shared_triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch, how: str, moment: str
) -> None:
    triple, overwrite = shared_triple, how != "new"
    out = place / "far" / "out" if how == "new" else place / "out"
    for k in (OLD, NEW):
        hsa.merge(**triple, output=place.parent / str(k), k=k)
    old, new = snapshot(place.parent / str(OLD)), snapshot(place.parent / str(NEW))
    step, interrupted = (20 if how == "overwrite without swap" else 0), True  # the two ways differ at the end
    seen: Counter[str] = Counter()
    while interrupted:
        step += 1
        if overwrite:
            hsa.merge(**triple, output=out, k=OLD, overwrite=True, sync=False)
        elif out.exists():
            shutil.rmtree(out.parent)
        with monkeypatch.context() as patch:
            if how == "overwrite without swap":
                patch.setattr(fsio, "exchange", lambda first, second: False)
            interrupt_at(patch, step, after=moment == "after")
            try:
                hsa.merge(**triple, output=out, k=NEW, overwrite=overwrite, threads=1)
                interrupted = False
            except KeyboardInterrupt:
                pass
        if out.exists():
            found = snapshot(out)
            assert found in ([old, new] if overwrite else [new]), step
            seen["old" if found == old else "new"] += 1
            assert os.listdir(out.parent) == ["out"], step
        else:
            assert not overwrite, step
            assert os.listdir(place) == [], step
            seen["absent"] += 1
    assert step > 25
    assert set(seen) == ({"old", "new"} if overwrite else {"absent", "new"}), seen


def interrupt_at(patch: pytest.MonkeyPatch, step: int, *, after: bool) -> None:
    """Let the `step`-th call that changes the disk meet a KeyboardInterrupt: a signal that came as it was made."""
    calls = 0

    def watch(holder: Any, name: str) -> None:
        function = getattr(holder, name)

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            mine = calls
            if mine == step and not after:
                raise KeyboardInterrupt
            result = function(*arguments, **keywords)
            if mine == step:
                raise KeyboardInterrupt
            return result

        patch.setattr(holder, name, wrapped)

    for name in STEPS:
        watch(os, name)
    watch(fsio, "exchange")


# Signals ---------------------------------------------------------------------------------------------------


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


TRIES = 10
"""Runs at most until a signal comes before its run is done."""

SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")]


@pytest.mark.parametrize("earlier", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(("number", "code", "word"), SIGNALS, ids=[number.name for number, _, _ in SIGNALS])
def test_a_signal_ends_a_run_in_one_line(
    large: Triple,
    whole: dict[float, Snapshot],
    place: Path,
    number: signal.Signals,
    code: int,
    word: str,
    earlier: bool,
) -> None:
    for _ in range(TRIES):
        if earlier:
            hsa.merge(**large, output=place / "out", k=OLD, sync=False, overwrite=True)
        process = start(merge_arguments(large, place / "out", "--overwrite"))
        wait_for(place / ".out.hsa-staging", process)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        if process.returncode != 0:
            break
        shutil.rmtree(place / "out")  # on a busy machine a run can be done before the signal comes
    assert process.returncode == code
    assert stdout == ""
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("hsa: error: ") and word in stderr
    assert os.listdir(place) == ["out"] * earlier
    assert not earlier or snapshot(place / "out") == whole[OLD]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_staging_directory_is_made(
    shared_triple: Triple, place: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of the directory and the moment when somebody is in charge of removing it."""

    class Struck(StagedOutput):
        def _acquire(self) -> int:
            lock = super()._acquire()
            os.kill(os.getpid(), number)
            return lock

    monkeypatch.setattr(merge_module, "StagedOutput", Struck)
    earlier = {of: signal.getsignal(of) for of in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    as_from_a_terminal()
    monkeypatch.setattr(console, "_terminated", -console.GRACE)
    try:
        assert app.run(merge_arguments(shared_triple, place / "out")) == 128 + number
    finally:
        for of, handler in earlier.items():
            signal.signal(of, handler)
    assert os.listdir(place) == []


def test_a_signal_at_any_moment_leaves_nothing_half(large: Triple, whole: dict[float, Snapshot], place: Path) -> None:
    seconds = run_time(large, place / "out")
    codes: Counter[int] = Counter()
    for number in range(6):
        shutil.rmtree(place / "out", ignore_errors=True)
        process = start(merge_arguments(large, place / "out", f"--k={NEW}"))
        if number < 3:  # in the middle of it, however fast the machine is just now
            while not os.listdir(place) and process.poll() is None:
                time.sleep(0.001)
        else:
            time.sleep(seconds * (0.5 + 0.6 * (number + random.random()) / 6))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        codes[process.returncode] += 1
        assert os.listdir(place) in ([], ["out"])
        if (place / "out").exists():
            assert snapshot(place / "out") == whole[NEW]
        else:
            assert process.returncode != 0
    assert set(codes) <= {0, 130, -signal.SIGINT}, codes  # the last: before or after the program has its turn
    assert codes[130] >= 2, codes


@pytest.mark.parametrize("numbers", [("SIGINT",), ("SIGINT", "SIGTERM", "SIGHUP")], ids=len)
@pytest.mark.parametrize(("first", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_does_not_disturb_the_cleaning_up(
    shared_triple: Triple, place: Path, first: str, code: int, numbers: tuple[str, ...]
) -> None:
    text = f"""
import os, signal, sys
from hsa.system import fsio, staging
from hsa.__main__ import main
remove_contents, sync = staging.remove_contents, fsio.sync
def send(*names):
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))
def noisy_remove(fd):
    send(*{numbers!r})
    remove_contents(fd)
    send(*{numbers!r})
def noisy_sync(fd):
    staging.remove_contents = noisy_remove
    send({first!r})
fsio.sync = noisy_sync
main()
"""
    command = [sys.executable, "-c", text, *merge_arguments(shared_triple, place / "a" / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert os.listdir(place) == []


def test_a_signal_that_is_ignored_stays_ignored(large: Triple, whole: dict[float, Snapshot], place: Path) -> None:
    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = start(merge_arguments(large, place / "out", f"--k={NEW}"), before=nohup)
    wait_for(place / ".out.hsa-staging", process)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert snapshot(place / "out") == whole[NEW]


def test_a_run_that_is_stopped_and_continued_finishes(large: Triple, whole: dict[float, Snapshot], place: Path) -> None:
    process = start(merge_arguments(large, place / "out", f"--k={NEW}"))
    wait_for(place / ".out.hsa-staging", process)
    for _ in range(5):
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.02)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.01)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert snapshot(place / "out") == whole[NEW]


def test_an_interrupt_during_the_first_imports_is_one_line_too() -> None:
    text = (
        "import builtins, runpy, sys\n"
        "imported = builtins.__import__\n"
        "def interrupt(name, *rest, **more):\n"
        "    if name == 'typer':\n"
        "        raise KeyboardInterrupt\n"
        "    return imported(name, *rest, **more)\n"
        "builtins.__import__ = interrupt\n"
        "runpy.run_module('hsa', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert len(done.stderr.splitlines()) == 1, done.stderr
