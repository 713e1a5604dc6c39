"""What the parts of a verification share: its sources, counters and problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hsa.sources.roles import Role
from hsa.system.fsio import Tally
from hsa.system.memory import PeakMemory
from hsa.system.types import PathLike
from hsa.verification.problems import Problems

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@dataclass(frozen=True)
class SourcePaths:
    """Where the sources are that an output is compared with, and the ids that the user says they have."""

    by_role: Mapping[Role, PathLike]
    ids: Mapping[Role, str | None]


@dataclass(frozen=True)
class VerifyContext:
    """Number of threads, counters, problems and notes so far, and the caller's progress callback."""

    threads: int
    tally: Tally
    memory: PeakMemory
    problems: Problems
    notes: list[str]
    progress: Progress | None = None
