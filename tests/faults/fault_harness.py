"""The fault suite's own machinery: what an operation is, how faults are put into it, and how its outcome is judged.

A point is one run with one fault. It survives when sources are untouched, the destination is absent, or the old output
whole, or the new one whole (by bytes, and by the operation's own check), nothing is left behind after the next run, and
an error names its cause. Anything else is lost; the table at the end counts both.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from helpers import snapshot

from hsa.errors import HsaError
from hsa.system import fsio

FULL = os.environ.get("HSA_FAULTS") == "full"
"""Whether the suite runs in full, by each operation's step; without it a sample, small enough for every `make test`."""

Sources = Mapping[str, Path]
Snapshot = dict[str, str]


@dataclass(frozen=True)
class Operation:
    """A command under test.

    `run` does the work in this process: sources, output, and which of two variants ("old", "new") of the result.
    `arguments` is the same as a command line. `prepare` makes further input from the sources, in a folder that counts
    as one of them. `check` raises AssertionError unless an output is whole. Of a walk over its calls every `step`-th
    point is tried in full: where another operation leads the way, the same path need not be walked as closely again.
    """

    name: str
    run: Callable[[Sources, Path, str], object]
    arguments: Callable[[Sources, Path, str], Sequence[str]]
    check: Callable[[Path], None]
    prepare: Callable[[Sources, Path], Sources] = lambda sources, folder: sources
    step: int = 3


# How a run ended -------------------------------------------------------------------------------------------


def assert_ended_by(number: signal.Signals, code: int, stderr: str) -> bool:
    """That a run with signal `number` sent to it went through, or ended as it should; whether hsa ended it in order.

    `code` is subprocess's: below zero the signal's own action, before hsa had its handlers or after it let go of them.
    """
    if number == signal.SIGINT and code == 1:
        # Python itself was starting: an interrupt while it imports `site` ends it so, before a line of hsa has run.
        assert stderr.startswith("Fatal Python error: init_import_site"), stderr
        return False
    assert code in {0, -number, 128 + number} - {128 + signal.SIGKILL}, (code, stderr)
    return code > 0


# Counting --------------------------------------------------------------------------------------------------


@dataclass
class Count:
    tried: int = 0
    lost: int = 0


TABLE: dict[tuple[str, str], Count] = {}
"""Points by fault kind and operation, of the whole session."""


class Points:
    """The points of one test: each is counted, and a lost one does not keep the next from being tried."""

    def __init__(self, kind: str, operation: Operation) -> None:
        self._count = TABLE.setdefault((kind, operation.name), Count())
        self.failures: list[str] = []
        self.seen: Counter[str] = Counter()

    @contextmanager
    def point(self, label: str) -> Iterator[None]:
        self._count.tried += 1
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            self._count.lost += 1
            self.failures.append(f"{label}: {type(error).__name__}: {str(error)[:300]}")

    def end(self, at_least: int) -> None:
        """Fail unless every point survived, and as many were tried as this test is for."""
        assert not self.failures, f"{len(self.failures)} points were lost:\n" + "\n".join(self.failures[:200])
        assert self._count.tried >= at_least


def table() -> list[str]:
    """The lines of the table: fault kind, operation, points tried, survived, lost."""
    rows = [("fault", "of", "tried", "survived", "lost")]
    for (kind, operation), count in TABLE.items():
        rows.append((kind, operation, str(count.tried), str(count.tried - count.lost), str(count.lost)))
    total = sum(count.tried for count in TABLE.values())
    lost = sum(count.lost for count in TABLE.values())
    rows.append(("all", "", str(total), str(total - lost), str(lost)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return [
        "  ".join(
            cell.ljust(w) if n < 2 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


# A place to work -------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """Sources, a place for outputs with nothing else in it, and what undisturbed runs write."""

    operation: Operation
    root: Path
    sources: Sources
    whole: Mapping[str, Snapshot]
    kept: Mapping[str, Path]
    before: Snapshot
    place: Path = field(init=False)

    def __post_init__(self) -> None:
        self.place = self.root / "place"

    @property
    def out(self) -> Path:
        return self.place / "out"

    def reset(self, *, earlier: bool) -> None:
        """Nothing at the destination, or the old output."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        if earlier:
            shutil.copytree(self.kept["old"], self.out)

    def run(self, variant: str = "new") -> None:
        self.operation.run(self.sources, self.out, variant)

    def judge(self, out: Path | None = None, *, earlier: bool, aside: bool = True) -> str:
        """Which of absent, old and new the destination is; AssertionError where it is none, or where absence loses the
        old output (it may stand `aside`, under the name from which the next run puts it back)."""
        out = out or self.out
        assert snapshot(self.root / "sources") == self.before, "a source was changed"
        if not out.exists():
            beside = out.with_name(f".{out.name}.hsa-replaced")
            if earlier:
                assert aside and snapshot(beside) == self.whole["old"], "the old output is lost"
            return "absent"
        found = snapshot(out)
        named = [variant for variant, whole in self.whole.items() if found == whole]
        assert named and (earlier or named != ["old"]), f"neither old nor new: {sorted(found)}"
        self.operation.check(out)
        return named[0]

    def tidy(self) -> None:
        """The next run: it succeeds, and nothing stands beside its output."""
        self.run("old")
        assert os.listdir(self.place) == ["out"], f"left behind: {sorted(os.listdir(self.place))}"
        assert snapshot(self.out) == self.whole["old"]


def make_stage(operation: Operation, root: Path, triple: Sources) -> Stage:
    """Copy the sources below `root`, and run both variants undisturbed."""
    sources: Sources = {role: Path(shutil.copytree(path, root / "sources" / role)) for role, path in triple.items()}
    sources = operation.prepare(sources, root / "sources")
    kept = {variant: root / "kept" / variant for variant in ("old", "new")}
    for variant, path in kept.items():
        operation.run(sources, path, variant)
        operation.check(path)
    whole = {variant: snapshot(path) for variant, path in kept.items()}
    assert whole["old"] != whole["new"]
    stage = Stage(operation, root, sources, whole, kept, snapshot(root / "sources"))
    stage.reset(earlier=False)
    return stage


def sampled(stage: Stage, points: Sequence[Any], sample: int) -> Sequence[Any]:
    """The points of a walk that are tried: in full by the operation's step, else each `sample`-th."""
    return points[:: stage.operation.step if FULL else sample]


# Faults ----------------------------------------------------------------------------------------------------

SHORT, END = "short", "end of file"

CALLS: dict[str, tuple[Any, tuple[int | str, ...]]] = {
    "open": (os, (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EACCES)),
    "close": (os, (errno.EIO, errno.ENOSPC)),
    "preadv": (os, (errno.EIO, SHORT, END)),
    "pwritev": (os, (errno.EIO, errno.ENOSPC, errno.EDQUOT, SHORT)),
    "fsync": (os, (errno.EIO, errno.ENOSPC)),
    "ftruncate": (os, (errno.EIO,)),
    "mkdir": (os, (errno.EIO, errno.ENOSPC, errno.EROFS)),
    "rename": (os, (errno.EIO, errno.ENOSPC, errno.EACCES)),
    "unlink": (os, (errno.EIO, errno.EROFS)),
    "rmdir": (os, (errno.EIO, errno.ENOTEMPTY)),
    "listdir": (os, (errno.EIO,)),
    "stat": (os, (errno.EIO,)),
    "lstat": (os, (errno.EIO,)),
    "fstat": (os, (errno.EIO,)),
    "flock": (fcntl, (errno.EIO, errno.ENOLCK)),
    "_reserve": (fsio, (errno.EIO, errno.ENOSPC)),
    "clone": (fsio, (errno.EIO, errno.ENOSPC)),
    "exchange": (fsio, (errno.EIO, errno.ENOSPC)),
}
"""Every way in which the program asks the system for something on a file, and what the system may answer."""

CHANGES = {"open", "pwritev", "fsync", "mkdir", "rename", "unlink", "rmdir", "_reserve", "clone", "exchange"}
"""What fails from some moment on when a disk goes away or read-only."""


def place_of(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> str:
    """The path that a call is about."""
    first = arguments[0] if arguments else "."
    if isinstance(first, int):
        try:
            return os.readlink(f"/proc/self/fd/{first}")
        except OSError:
            return ""
    path = os.fsdecode(os.fspath(first))
    folder = keywords.get("dir_fd")
    if folder is not None and not os.path.isabs(path):
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.abspath(path)


@dataclass(frozen=True)
class Fault:
    """What call number `at` answers, and with `lasting` every later call of a kind that changes the disk, too."""

    at: int
    answer: int | str
    lasting: bool = False

    @property
    def cause(self) -> str | None:
        """What a message must hold; None where the run must go on as if nothing were."""
        if self.answer == SHORT:
            return None
        return "ended at byte" if self.answer == END else os.strerror(int(self.answer))


class Injector:
    """Watches every call below some folders, counts them, and lets one fail."""

    def __init__(self, *roots: Path) -> None:
        self.roots = tuple(f"{os.path.realpath(root)}{os.sep}" for root in roots)
        self.trace: list[str] = []
        self.struck = 0
        self._lock = threading.Lock()

    @contextmanager
    def watching(
        self, fault: Fault | None = None, hook: Callable[[int, str], object] | None = None
    ) -> Iterator[Injector]:
        """Patch the calls. `hook` is called with number and name of each, before it is made."""
        self.trace, self.struck = [], 0
        with pytest.MonkeyPatch.context() as patch:
            for name, (holder, _) in CALLS.items():
                patch.setattr(holder, name, self._wrapped(name, getattr(holder, name), fault, hook))
            yield self

    def _wrapped(
        self, name: str, function: Callable[..., Any], fault: Fault | None, hook: Callable[[int, str], object] | None
    ) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if not f"{place_of(arguments, keywords)}{os.sep}".startswith(self.roots):
                return function(*arguments, **keywords)
            with self._lock:
                self.trace.append(name)
                number = len(self.trace)
                due = fault is not None and (
                    number == fault.at or (fault.lasting and number > fault.at and name in CHANGES)
                )
                if name == "open" and number != (fault.at if fault else 0) and due:
                    due = bool(arguments[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
                self.struck += due
            if hook is not None:
                hook(number, name)
            if not due or fault is None:
                return function(*arguments, **keywords)
            if fault.answer == SHORT:
                fd, views, offset = arguments
                part = max(1, len(views[0]) // 3)
                return function(fd, [views[0][:part]], offset)
            if fault.answer == END:
                return 0
            if name == "close":
                function(*arguments, **keywords)
            raise OSError(int(fault.answer), os.strerror(int(fault.answer)))

        return call


def attempt(stage: Stage, injector: Injector, fault: Fault, *, earlier: bool) -> str:
    """One run with one fault, judged; returns how it ended."""
    outcome = "finished"
    with injector.watching(fault):
        try:
            stage.run("new")
        except HsaError as error:
            outcome, message = "refused", str(error)
    assert injector.struck, "the fault was not met"
    if outcome == "refused":
        assert fault.cause is not None, f"a short answer is no error: {message}"
        assert fault.cause in message, f"the message does not name {fault.cause!r}: {message}"
        assert "\n" not in message
    state = stage.judge(earlier=earlier)
    if outcome == "finished":
        assert state == "new", state
    if os.listdir(stage.place) not in ([], ["out"]):
        stage.tidy()
        outcome = "refused, tidied by the next run"
    return outcome
