"""Print to the standard streams of a command without failing if they are closed or full.

`print_stderr` ignores failures. `print_stdout` records for `unprinted` what stdout does not accept; the command then
ends with exit code 1 and a message that names what is finished. If a reader stops early (`| head -1`) or stdout is
closed, text for people is not counted as lost; JSON is.
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

_unprinted: ContextVar[list[str] | None] = ContextVar("hsa text that could not be printed", default=None)


class NullStream(io.StringIO):
    """Replaces a stream that was closed before the program started, and discards what it is given."""

    def write(self, text: str) -> int:
        return len(text)


class LenientStream:
    """A text stream whose failed writes are ignored, such as a terminal that was closed."""

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


def protect_streams() -> None:
    """Make this process's standard streams safe. This is for the start of a program, not of a library.

    Closed descriptors 0 to 2 are opened on /dev/null. Otherwise a data file could get one of these numbers, and
    whatever prints would write into it. stdout escapes letters that its encoding lacks.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or NullStream()
    sys.stdout = sys.stdout or NullStream()
    sys.stderr = LenientStream(sys.stderr or NullStream())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def flush_stdout() -> None:
    """Flush stdout, and redirect it to /dev/null if that fails. Otherwise Python would try again at exit and fail."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, sys.stdout.fileno())
            os.close(descriptor)


def stderr_is_terminal() -> bool:
    """Whether stderr is a terminal."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def print_stderr(text: str) -> None:
    """Print to stderr, and ignore failures."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            _print(sys.stderr, text)


def print_stdout(text: str, *, done: str = "", needed: bool = False) -> None:
    """Print to stdout. Text that it does not accept is recorded for `unprinted`, with `done`: what is finished anyway.

    With `needed`, as for JSON, a closed stdout and a reader that has gone count as failures too.
    """
    try:
        if sys.stdout is None or isinstance(sys.stdout, NullStream):
            raise BrokenPipeError(errno.EBADF, "it is closed")
        _print(sys.stdout, text)
    except (OSError, ValueError) as error:
        if needed or not isinstance(error, BrokenPipeError):
            _note_unprinted(getattr(error, "strerror", None) or str(error), done)


def _note_unprinted(reason: str, done: str) -> None:
    messages = _unprinted.get()
    if messages is not None:
        subject = f"{done}; only its summary" if done else "the result"
        messages.append(f"{subject} could not be printed, for stdout took no more: {reason}")


def _print(stream: IO[str], text: str) -> None:
    encoding = getattr(stream, "encoding", None)
    if encoding is not None:
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=stream, flush=True)


@contextmanager
def unprinted() -> Iterator[list[str]]:
    """The messages about what `print_stdout` could not print inside the block."""
    messages: list[str] = []
    token = _unprinted.set(messages)
    try:
        yield messages
    finally:
        _unprinted.reset(token)
