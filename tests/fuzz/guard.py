"""What no input may do: read or write outside its arena, start a program, open a connection, take too much memory or
time.

An audit hook sees every file that Python opens and every change to a directory; it cannot be taken out again, so it is
armed only while an input runs. C code that opens files itself (torch's) is not seen.
"""

from __future__ import annotations

import os
import resource
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIMIT = 512 << 20
"""Bytes of memory that are no pages of mapped files, for the whole process."""

CPU_LIMIT = 2.0
"""Seconds of CPU time, of all threads, that an input may take beyond a sound one."""

_CODE = tuple(
    {
        *filter(None, sys.path),
        *sysconfig.get_paths().values(),
        sys.prefix,
        sys.base_prefix,
        str(Path(__file__).resolve().parents[2]),
    }
)
_SYSTEM = ("/proc/", "/sys/", "/dev/", "/etc/localtime", "/usr/share/zoneinfo")
_CHANGES = {
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.setxattr": ((0, None),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
    "shutil.rmtree": ((0, 1),),
}
"""Events that change a directory: which of their arguments are paths, and the directories that these count from."""
_NEVER = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.", "socket.", "pty.")
_PLAIN_CLASSES = ("torch", "collections", "_codecs", "builtins")


class Finding(Exception):
    """An input did what no input may do."""


class Guard:
    """Arena of one process: reads below `arena`, writes below `arena/out`, and nothing else; `broken` says what was."""

    def __init__(self, arena: Path) -> None:
        self.arena, self.armed, self.broken = Path(os.path.realpath(arena)), False, list[str]()
        self.out = self.arena / "out"
        self._settled: int | None = None
        self.sound_cpu: float | None = None
        self._factor = 1.0
        sys.addaudithook(self._see)

    def settle(self) -> None:
        """Count no more what the process grows by from input to input: under atheris's instrumentation that is some
        35 KB each, of which none is left without it (3,000 merges: 2 MiB)."""
        reset_peak()
        self._settled = peak()

    def measure(self, work: Callable[[], object], factor: float = 1.0) -> None:
        """Run a sound input, whose CPU time the later ones are compared with; `factor` is how much longer instrumented
        code may take."""
        self.sound_cpu = None
        started = cpu_seconds()
        work()
        self.sound_cpu, self._factor = cpu_seconds() - started, factor

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Raise Finding when the block breaks a rule, however it ends. Time counts once `measure` has run."""
        self.broken.clear()
        started = cpu_seconds()
        reset_peak()
        grown = 0 if self._settled is None else max(0, peak() - self._settled)
        self.armed = True
        try:
            yield
        finally:
            self.armed = False
            if self.broken:
                raise Finding(self.broken[0])
            if (taken := peak() - grown) > LIMIT:
                raise Finding(f"took {taken >> 20} MiB, at most {LIMIT >> 20} are allowed")
            spent = cpu_seconds() - started
            if self.sound_cpu is not None and spent > (allowed := self.sound_cpu + CPU_LIMIT * self._factor):
                raise Finding(f"took {spent:.1f} s of CPU time, at most {allowed:.1f} are allowed")

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        before = len(self.broken)
        self._judge(event, arguments)
        if len(self.broken) > before:  # so that it does not happen; and kept, for the program may catch it
            raise Finding(self.broken[-1])

    def _judge(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            self._open(path, bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)))
        elif event in ("os.listdir", "os.scandir"):
            self._open(arguments[0] or ".", False)
        elif event in _CHANGES:
            for position, folder in _CHANGES[event]:
                held = arguments[folder] if folder is not None and folder < len(arguments) else None
                self._open(arguments[position], True, held)
        elif event == "pickle.find_class":
            if str(arguments[0]).partition(".")[0] not in _PLAIN_CLASSES:
                self.broken.append(f"the pickle got at {arguments[0]}.{arguments[1]}")
        elif event.startswith(_NEVER):
            self.broken.append(f"{event} {arguments!r:.200}")

    def _open(self, path: Any, writes: bool, folder: Any = None) -> None:
        """`open` does not say which directory a relative path counts from; but that was opened before, and seen then.
        So the working directory is `out`, where such a path is let through."""
        if isinstance(path, int):  # a file that is open already
            return
        start = f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder >= 0 else "."
        real = os.path.realpath(os.path.join(start, os.fsdecode(path)))
        below = self.out if writes else self.arena
        if Path(real).is_relative_to(below):
            return
        if not writes and real.startswith((*_CODE, *_SYSTEM)):  # modules that are imported late
            return
        self.broken.append(f"{'writes' if writes else 'reads'} {path!r:.200}")


def cpu_seconds() -> float:
    """Seconds of CPU time of this process so far, of all its threads, in Python and in the kernel."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def reset_peak() -> None:
    """Forget the peak so far. Source: proc(5), clear_refs."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes at the peak since `reset_peak`, without pages of mapped files: exact, for the kernel keeps it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return (int(fields["VmHWM"].split()[0]) - int(fields["RssFile"].split()[0])) * 1024
