"""Run a command: signals end it cleanly, and errors become one line on stderr and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from hsa.errors import HsaError, one_line
from hsa.option_names import option
from hsa.system.descriptors import import_problem, reason
from hsa.system.signals import END_SIGNALS
from hsa.system.streams import flush_stdout, print_stderr, protect_streams, unprinted
from hsa.system.threads import out_of_memory

GRACE = 3.0
"""Seconds in which a second signal does not disturb the cleanup after the first: wrappers send each signal twice."""

_terminated = -GRACE


class Terminated(BaseException):
    """A signal asked this process to end; carries its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def guarded(work: Callable[[], int], *, debug: bool = False) -> int:
    """Do a command's work and return its exit code.

    The code is that of the work, 1 (machine), 2 (request or input), 130 or 128 + signal. `debug` adds the traceback to
    an error. If the work succeeded but stdout did not accept its output, the code is 1 and the message says what is
    finished.

    Signals that end a process end the work; the previous handlers are restored afterwards. Only the main thread may
    have handlers, so in any other thread signals are left alone.
    """
    previous = _handle_signals()
    try:
        with unprinted() as unprinted_messages:
            code = work()
        return fail(unprinted_messages[0], code or 1) if unprinted_messages else code
    except HsaError as error:
        return fail(str(error), error.exit_code, debug=debug)
    except KeyboardInterrupt:
        return fail("interrupted; nothing half done was left behind", 130, debug=debug)
    except Terminated as error:
        cause = "interrupted" if error.number == signal.SIGINT else f"ended by {signal.Signals(error.number).name}"
        return fail(f"{cause}; nothing half done was left behind", 128 + error.number, debug=debug)
    except ModuleNotFoundError as error:
        name = (error.name or str(error)).partition(".")[0]
        return fail(f"this needs {name}, which is not installed; pip install {name}", 1, debug=debug)
    except MemoryError:
        return fail(out_of_memory(), 1, debug=debug)
    except OSError as error:
        location = "" if error.filename is None else f" at {os.fsdecode(error.filename)}"
        return fail(f"the system refused{location}: {reason(error)}; see {option('debug')}", 1, debug=debug)
    except ImportError as error:
        problem = import_problem(error)
        if problem is None:
            raise
        return fail(problem, 1, debug=debug)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_with(work: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of `work`, which is guarded.

    The handlers stay installed after the work, and are disabled at the very end. Python removes its handlers before it
    ends, and a late signal would then change the exit code.
    """
    protect_streams()
    _handle_signals()
    try:
        code = work()
    except Terminated as error:
        code = 128 + error.number
    flush_stdout()
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _handle_signals() -> dict[signal.Signals, Any]:
    """Make signals that end a process raise Terminated; returns the previous handlers, by signal.

    Ignored signals, as under nohup, stay ignored. A handler that was not set from Python stays, too.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers = {number: signal.getsignal(number) for number in END_SIGNALS}
    previous = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in previous:
        signal.signal(number, _terminate)
    return previous


def fail(message: str, code: int, *, debug: bool = False) -> int:
    """Print an error as one line, and return the exit code."""
    if debug:
        print_stderr(traceback.format_exc().rstrip())
    print_stderr(f"hsa: error: {one_line(message)}")
    return code


def _terminate(number: int, frame: FrameType | None) -> None:
    global _terminated
    now = time.monotonic()
    if now >= _terminated + GRACE:
        _terminated = now
        raise Terminated(number)
