"""What every command of this package does around its work: signals that end it, and errors as one line on stderr."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

from hsa.errors import HsaError, one_line
from hsa.signals import ENDING

GRACE = 3.0
"""Seconds in which a second signal does not disturb the cleaning up after the first: wrappers send each twice."""

_terminated = -GRACE


class Terminated(BaseException):
    """A signal asked this process to end; carries its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def guarded(work: Callable[[], int], *, debug: bool = False) -> int:
    """Do a command's work and return its exit code: that of the work, 1 (machine), 2 (request or input), 130 or
    128 + signal. `debug` adds the traceback to an error."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _terminate)
    try:
        return work()
    except HsaError as error:
        return fail(str(error), error.exit_code, debug=debug)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was left behind", 130, debug=debug)
    except Terminated as error:
        how = "interrupted" if error.number == signal.SIGINT else f"ended by {signal.Signals(error.number).name}"
        return fail(f"{how}; nothing was left behind", 128 + error.number, debug=debug)
    except MemoryError:
        return fail("out of memory; give --threads 1, or free some", 1, debug=debug)
    except OSError as error:
        return fail(f"the system refused: {error}; see --debug", 1, debug=debug)


def finish(code: int) -> None:
    """End the process. Python lets go of its handlers before it ends: a late signal would change the exit code."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def fail(message: str, code: int, *, debug: bool = False) -> int:
    """Print the line of an error, and return the exit code."""
    if debug:
        traceback.print_exc()
    print(f"hsa: error: {one_line(message)}", file=sys.stderr)
    return code


def _terminate(number: int, frame: FrameType | None) -> None:
    global _terminated
    now = time.monotonic()
    if now >= _terminated + GRACE:
        _terminated = now
        raise Terminated(number)
