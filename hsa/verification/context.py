"""The state that the parts of a verification share: sources, counters and problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hsa.sources.roles import Role
from hsa.system.fsio import Tally
from hsa.system.memory import PeakMemory
from hsa.system.types import PathLike
from hsa.verification.problems import Problems

Progress = Callable[[int, int], None]
"""A callback that is called with the bytes done and the total bytes."""


@dataclass(frozen=True)
class SourcePaths:
    """The paths of the sources that an output is compared with, and their ids as given by the user."""

    by_role: Mapping[Role, PathLike]
    ids: Mapping[Role, str | None]


@dataclass(frozen=True)
class VerifyContext:
    """The number of threads, counters, the problems and notes so far, and the caller's progress callback."""

    threads: int
    tally: Tally
    memory: PeakMemory
    problems: Problems
    notes: list[str]
    progress: Progress | None = None
