"""Input and output that fails: call by call (by the operation's step), every answer the system may give."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from fault_harness import CALLS, FULL, SHORT, Fault, Injector, Operation, Points, Stage, attempt, make_stage, sampled
from fault_operations import OPERATIONS

from hsa.system import fsio

HOWS = ("new", "overwrite", "overwrite without swap")
SAMPLE = 37
"""Of the points of a walk, every which one is tried in a sample; being prime, it comes upon all kinds of calls."""


@pytest.fixture(scope="module", params=OPERATIONS, ids=lambda operation: operation.name)
def stage(
    request: pytest.FixtureRequest, shared_triple: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Stage:
    operation: Operation = request.param
    return make_stage(operation, tmp_path_factory.mktemp("io"), shared_triple)


@pytest.mark.parametrize("how", HOWS)
def test_an_error_at_every_call(stage: Stage, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = how != "new"
    if how == "overwrite without swap":
        monkeypatch.setattr(fsio, "exchange", lambda first, second: False)
    injector = Injector(stage.place, stage.root / "sources")
    stage.reset(earlier=earlier)
    with injector.watching():
        stage.run("new")
    calls = list(injector.trace)
    points = Points("I/O error or short I/O at a call", stage.operation)
    walk = [(at, answer) for at, name in enumerate(calls, 1) for answer in CALLS[name][1]]
    tried = sampled(stage, walk, SAMPLE)
    for at, answer in tried:
        with points.point(f"{how}, call {at} {calls[at - 1]}: {answer}"):
            stage.reset(earlier=earlier)
            points.seen[attempt(stage, injector, Fault(at, answer), earlier=earlier)] += 1
            assert injector.trace[at - 1] == calls[at - 1], "the calls come in one order"
    points.end(at_least=len(tried))
    assert points.seen["refused"] > len(tried) / 4, points.seen


@pytest.mark.parametrize("how", HOWS)
def test_a_disk_that_is_gone_from_some_call_on(stage: Stage, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be cleaned up then: that is for the next run."""
    earlier = how != "new"
    if how == "overwrite without swap":
        monkeypatch.setattr(fsio, "exchange", lambda first, second: False)
    injector = Injector(stage.place)
    stage.reset(earlier=earlier)
    with injector.watching():
        stage.run("new")
    calls = list(injector.trace)
    points = Points("disk gone, full or read-only from a call on", stage.operation)
    answers = (errno.EIO, errno.ENOSPC, errno.EROFS)
    walk = [(at, answers[at % 3]) for at in range(1, len(calls) + 1)]
    tried = sampled(stage, walk, SAMPLE // 3)
    for at, answer in tried:
        with points.point(f"{how}, from call {at} {calls[at - 1]} on: {answer}"):
            stage.reset(earlier=earlier)
            points.seen[attempt(stage, injector, Fault(at, answer, lasting=True), earlier=earlier)] += 1
            stage.tidy()
    points.end(at_least=len(tried))


def test_every_read_and_every_write_is_short(stage: Stage) -> None:
    points = Points("every read and write short", stage.operation)
    preadv, pwritev = os.preadv, os.pwritev
    for size in (1, 7, 512, 4096, 5000) if FULL else (512, 5000):
        with points.point(f"{size} bytes"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "preadv", lambda fd, v, at, n=size: preadv(fd, [v[0][: max(n, len(v[0]) // 999)]], at))
            patch.setattr(os, "pwritev", lambda fd, v, at, n=size: pwritev(fd, [v[0][: max(n, len(v[0]) // 999)]], at))
            stage.reset(earlier=False)
            stage.run("new")
            patch.undo()
            assert stage.judge(earlier=False) == "new"
    points.end(at_least=2)
    assert SHORT in CALLS["preadv"][1] and SHORT in CALLS["pwritev"][1]
