"""Problems found by a verification."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from hsa.errors import one_line

MAX_PROBLEMS = 1000
"""Problems that a report names; a larger number of them tells nothing more."""


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it must be: the file of the output, or the role of a source, and what was found."""

    file: str
    what: str


class Problems:
    """Problems found so far, by any thread, each text on one line."""

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
