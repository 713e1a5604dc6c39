"""Running programs side by side: wall and CPU time, memory of the process tree, and bytes that it moved.

Memory is sampled every 10 ms from outside. CPU time and bytes are the kernel's own accounts of the process and of the
children that it waited for: those of system calls (reads of mapped files are not among them), and those that reached a
disk. Source: proc(5), wait4(2).
"""

from __future__ import annotations

import compileall
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hsa
from hsa.system.memory import process_tree

INTERVAL = 0.01
SETTLE = 1.0
"""Seconds of rest after everything was written back, before a program is started."""


def compile_package() -> None:
    """Have `hsa` in bytecode, as pip leaves every package but those that it installs in place."""
    if not compileall.compile_dir(Path(hsa.__file__).parent, quiet=1):
        raise SystemExit("hsa could not be compiled to bytecode: its start would be timed with its compilation")


@dataclass(frozen=True)
class Run:
    """One run of a program: seconds, bytes, and what it printed where that was a JSON object.

    `synced` are the seconds until its output was on disk too, `seconds` those that its row stands for.
    """

    seconds: float
    synced: float
    cpu: float
    peak: int
    peak_rss: int
    io: dict[str, int]
    report: dict[str, Any]


@dataclass
class Program:
    """One way to make an output: a command in which `{out}` stands for the destination.

    `sync` counts the time until everything is on disk. `whole` programs read all of base and secondary, others their
    targets alone. `check` raises SystemExit when an output is not what it should be.
    """

    name: str
    command: Sequence[str]
    sync: bool = False
    whole: bool = False
    slow: bool = False
    check: Callable[[Path], None] | None = None
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def median(self, cache: str, figure: Callable[[Run], float]) -> float:
        return statistics.median(map(figure, self.runs[cache]))


def measure(program: Program, out: Path, prepare: Callable[[], None]) -> Run:
    """Run a program once into a fresh destination, from a page cache that `prepare` set up, and measure it."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    prepare()
    time.sleep(SETTLE)
    command = [part.format(out=out) for part in program.command]
    with tempfile.TemporaryFile("w+") as printed:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.PIPE, text=True)
        complaints = _Drain(process)
        watcher = _Watcher(process.pid)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and its accounts still there
        ended = time.perf_counter() - started
        os.sync()
        synced = time.perf_counter() - started
        moved = _io(process.pid)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        watcher.stop()
        if process.returncode:
            raise SystemExit(f"{program.name} failed with exit code {process.returncode}: {complaints.text()[-2000:]}")
        printed.seek(0)
        text = printed.read()
    if program.check is not None:
        program.check(out)
    report = json.loads(text) if text.startswith("{") else {}
    seconds = synced if program.sync else ended
    return Run(seconds, synced, used.ru_utime + used.ru_stime, watcher.peak, watcher.peak_rss, moved, report)


class _Drain:
    """What a process says on stderr, read while it runs so that it never waits for a reader."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._text = ""
        self._thread = threading.Thread(target=self._read, args=(process,))
        self._thread.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr as stream:
            self._text = stream.read()

    def text(self) -> str:
        self._thread.join()
        return self._text


class _Watcher:
    """The highest memory of a process and its descendants: RssAnon + RssShmem, and VmRSS."""

    def __init__(self, pid: int) -> None:
        self.peak = self.peak_rss = 0
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL):
            sizes = [_memory(pid) for pid in process_tree(self._pid)]
            self.peak = max(self.peak, sum(size[0] for size in sizes))
            self.peak_rss = max(self.peak_rss, sum(size[1] for size in sizes))

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def _memory(pid: int) -> tuple[int, int]:
    """Bytes of RssAnon + RssShmem, and of VmRSS; zeros when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return 0, 0
    sizes = {line.partition(":")[0]: line.split()[1] for line in lines if "Rss" in line or "VmRSS" in line}
    own = sum(int(sizes.get(name, 0)) for name in ("RssAnon", "RssShmem"))
    return own * 1024, int(sizes.get("VmRSS", 0)) * 1024


def _io(pid: int) -> dict[str, int]:
    """Bytes by system calls and to and from disks; empty where the kernel does not tell."""
    names = {
        "rchar": "syscall_read",
        "wchar": "syscall_written",
        "read_bytes": "disk_read",
        "write_bytes": "disk_written",
    }
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(": ") for line in lines)
    return {names[key]: int(value) for key, value in pairs if key in names}
