"""Problems found by a verification."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from hsa.errors import one_line

LISTED = 1000
"""Problems that are kept; a larger number of them tells nothing more."""


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it must be: the file of the output, or the role of a source, and what was found."""

    file: str
    what: str


class Problems:
    """Problems found so far, by any thread, each text on one line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: list[Problem] = []
        self._more = 0

    def add(self, file: str, what: str) -> None:
        with self._lock:
            if len(self._found) < LISTED:
                self._found.append(Problem(one_line(file[:255]), one_line(what)))
            else:
                self._more += 1

    def add_all(self, file: str, found: Iterator[str]) -> None:
        for what in found:
            self.add(file, what)

    def listed(self) -> tuple[Problem, ...]:
        with self._lock:
            more = [Problem("", f"and {self._more} more problems")] if self._more else []
            return (*self._found, *more)
