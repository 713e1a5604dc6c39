"""Problems found by a verification."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from hsa.errors import one_line

MAX_PROBLEMS = 1000
"""The most problems that a report lists; more would not help anyone."""


@dataclass(frozen=True)
class Problem:
    """One problem: the output's file or the source's role, and what is wrong with it."""

    file: str
    what: str


class Problems:
    """The problems found so far, each on one line. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._problems: list[Problem] = []
        self._omitted = 0

    def add(self, file: str, what: str) -> None:
        with self._lock:
            if len(self._problems) < MAX_PROBLEMS:
                self._problems.append(Problem(one_line(file[:255]), one_line(what)))
            else:
                self._omitted += 1

    def add_all(self, file: str, texts: Iterator[str]) -> None:
        for text in texts:
            self.add(file, text)

    def all(self) -> tuple[Problem, ...]:
        with self._lock:
            more = [Problem("", f"and {self._omitted} more problems")] if self._omitted else []
            return (*self._problems, *more)
