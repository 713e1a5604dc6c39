"""What a command does to the process that it runs in, and what it makes of errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hsa.cli import app
from hsa.errors import MachineError, RequestError
from hsa.option_names import command_line, spelled
from hsa.system import console
from hsa.system.console import guarded
from hsa.system.signals import END_SIGNALS


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.fixture
def handlers() -> Iterator[dict[signal.Signals, Any]]:
    """Handlers of this process's own, one of each kind; what pytest had is put back at the end."""
    before = {number: signal.getsignal(number) for number in END_SIGNALS}
    own = dict(zip(END_SIGNALS, (signal.default_int_handler, lambda number, frame: None, signal.SIG_DFL), strict=True))
    for number, handler in own.items():
        signal.signal(number, handler)
    yield own
    for number, handler in before.items():
        signal.signal(number, handler)


def current() -> dict[signal.Signals, Any]:
    return {number: signal.getsignal(number) for number in END_SIGNALS}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RequestError("k must be small"), 2, "k must be small"),
        (MachineError("the disk is full"), 1, "the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted; nothing half done was left behind"),
        (console.Terminated(signal.SIGTERM), 143, "ended by SIGTERM; nothing half done was left behind"),
        (MemoryError(), 1, "out of memory; give --threads 1, or free some"),
        (OSError(5, "Input/output error"), 1, "the system refused: Input/output error; see --debug"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_a_line_and_a_code_and_handlers_come_back(
    handlers: dict[signal.Signals, Any],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    with spelled(command_line):
        assert guarded(raising(error)) == code
    assert capsys.readouterr().err == f"hsa: error: {line}\n"
    assert current() == handlers


def test_handlers_come_back_after_success_and_after_a_bug(handlers: dict[signal.Signals, Any]) -> None:
    during = []

    def work() -> int:
        during.append(current())
        return 7

    assert guarded(work) == 7
    assert current() == handlers
    assert all(during[0][number] is not handler for number, handler in handlers.items())
    with pytest.raises(ZeroDivisionError):
        guarded(raising(ZeroDivisionError()))
    assert current() == handlers


def test_a_signal_ends_the_work_and_its_handler_comes_back(
    handlers: dict[signal.Signals, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_terminated", -console.GRACE)

    def work() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(30)
        return 0

    assert guarded(work) == 143
    assert capsys.readouterr().err == "hsa: error: ended by SIGTERM; nothing half done was left behind\n"
    assert current() == handlers


def test_an_ignored_signal_stays_ignored(handlers: dict[signal.Signals, Any]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def work() -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    assert guarded(work) == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_the_command_line_runs_in_any_thread(
    handlers: dict[signal.Signals, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []

    def call() -> None:
        codes.append(app.run(["--version"]))
        codes.append(app.run(["merge", "--base=/nowhere"]))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert codes == [0, 2]
    printed = capsys.readouterr()
    assert printed.out.strip()
    assert printed.err.startswith("hsa: error: Missing option")
    assert current() == handlers


LATE = """
import os, signal, sys, atexit
from hsa.system.console import exit_with, guarded
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
def work():
    if sys.argv[1] == "after":
        code = guarded(lambda: 3)
        os.kill(os.getpid(), signal.SIGTERM)
        return code
    return guarded(lambda: os.kill(os.getpid(), signal.SIGTERM) or 3)
exit_with(work)
"""


@pytest.mark.parametrize("when", ["during", "after"])
def test_a_second_signal_does_not_change_the_exit_code(when: str) -> None:
    done = subprocess.run([sys.executable, "-c", LATE, when], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert "Traceback" not in done.stderr
