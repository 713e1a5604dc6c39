"""Processes that are killed or told to end at random moments."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from fault_harness import FULL, Operation, Points, Stage, assert_ended_by, make_stage
from fault_operations import OPERATIONS

from hsa.testing.whisper_checkpoints import SHAPES, write_triple

KILLS = 68 // len(OPERATIONS) + 1 if FULL else 2
"""Kills for each signal and operation: more than 200 in all."""

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@pytest.fixture(scope="module", params=OPERATIONS, ids=lambda operation: operation.name)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """On a model of several MB, long enough at work that a signal can land in every phase."""
    operation: Operation = request.param
    root = tmp_path_factory.mktemp("kills")
    shape = replace(SHAPES["test"], encoder_layers=16, decoder_layers=16)
    return make_stage(operation, root, write_triple(root / "triple", shape))


def started(stage: Stage) -> subprocess.Popen[str]:
    def ordinary() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    command = [sys.executable, "-m", "hsa", *stage.operation.arguments(stage.sources, stage.out, "new")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=ordinary)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_at_a_random_moment(stage: Stage, number: signal.Signals) -> None:
    begun = time.monotonic()
    stage.reset(earlier=False)
    started(stage).communicate(timeout=120)
    seconds = time.monotonic() - begun
    points = Points(f"{number.name} at a random moment", stage.operation)
    for count in range(KILLS):
        earlier, seen = bool(count & 1), bool(count & 2)
        share = random.random()
        label = f"kill {count}, earlier output {earlier}, after staging {seen}, share {share:.4f} of {seconds:.2f} s"
        with points.point(label):
            stage.reset(earlier=earlier)
            process = started(stage)
            try:
                while seen and process.poll() is None and not (stage.place / ".out.hsa-staging").exists():
                    time.sleep(0.0005)
                time.sleep(share * seconds * (0.3 if seen else 1.1))
                process.send_signal(number)
                _, stderr = process.communicate(timeout=60)
            finally:
                process.kill()
                process.communicate()
            state = stage.judge(earlier=earlier)
            points.seen["done" if process.returncode == 0 else state] += 1
            in_order = assert_ended_by(number, process.returncode, stderr)
            if process.returncode == 0:
                assert state == "new"
            if in_order:
                assert len(stderr.splitlines()) == 1 and stderr.startswith("hsa: error: "), stderr
                assert "interrupted" in stderr or number.name in stderr, stderr
                assert os.listdir(stage.place) in ([], ["out"]), "a run that ends in order clears up"
            stage.tidy()
    points.end(at_least=KILLS)
    assert not FULL or points.seen["absent"] + points.seen["old"] > 0, points.seen


def test_the_suite_kills_as_often_as_it_says() -> None:
    assert not FULL or KILLS * len(SIGNALS) * len(OPERATIONS) >= 200
