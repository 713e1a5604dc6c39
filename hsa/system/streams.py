"""The standard streams of a command: what cannot be printed never undoes what was done.

`say` prints to stderr if it can. `tell` prints to stdout; what is lost there is kept for `unprinted`, and the command
ends with exit code 1 and a message that names what is finished. A reader that stops early (`| head -1`) and a closed
stdout lose nothing but text for people: only JSON counts as lost there.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import IO, Any

_lost: ContextVar[list[str] | None] = ContextVar("hsa text that could not be printed", default=None)


class Nowhere(io.StringIO):
    """Takes the place of a stream that was closed before the program started, and forgets what it is given."""

    def write(self, text: str) -> int:
        return len(text)


class Forgiving:
    """A text stream whose writes may fail and say nothing of it, such as a terminal that was closed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare() -> None:
    """Make this process's standard streams safe: for a program's own start, not for a library's.

    Descriptors 0 to 2 that are closed lead to /dev/null afterwards, so that no data file gets one of these numbers and
    is written to by whatever prints. stdout escapes letters that its encoding lacks.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or Nowhere()
    sys.stdout = sys.stdout or Nowhere()
    sys.stderr = Forgiving(sys.stderr or Nowhere())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def settle() -> None:
    """Send to /dev/null what stdout does not take, so that Python's own end does not try again and fail."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, sys.stdout.fileno())
            os.close(descriptor)


def watched() -> bool:
    """Whether stderr is a terminal."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def say(text: str) -> None:
    """Print to stderr, if it takes it."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            _print(sys.stderr, text)


def tell(text: str, *, done: str = "", needed: bool = False) -> None:
    """Print to stdout. What it does not take is noted for `unprinted`, with `done`: what is finished all the same.

    With `needed`, as for JSON, a closed stdout and a reader that went away count too.
    """
    try:
        if sys.stdout is None or isinstance(sys.stdout, Nowhere):
            raise BrokenPipeError(errno.EBADF, "it is closed")
        _print(sys.stdout, text)
    except (OSError, ValueError) as error:
        if needed or not isinstance(error, BrokenPipeError):
            _note(getattr(error, "strerror", None) or str(error), done)


def _note(reason: str, done: str) -> None:
    lost = _lost.get()
    if lost is not None:
        about = f"{done}; only its summary" if done else "the result"
        lost.append(f"{about} could not be printed, for stdout took no more: {reason}")


def _print(stream: IO[str], text: str) -> None:
    encoding = getattr(stream, "encoding", None)
    if encoding is not None:
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=stream, flush=True)


@contextmanager
def unprinted() -> Iterator[list[str]]:
    """The messages about what `tell` could not print while the block lasted."""
    lost: list[str] = []
    token = _lost.set(lost)
    try:
        yield lost
    finally:
        _lost.reset(token)
