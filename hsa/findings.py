"""The notes and warnings of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Findings:
    """Notes, and warnings of possible mistakes. Each is one line.

    Example:
        >>> Findings(("primary has no tokenizer",)) + Findings(warnings=("base and primary are equal",))
        Findings(notes=('primary has no tokenizer',), warnings=('base and primary are equal',))
    """

    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def once(self) -> Findings:
        """The same findings without duplicates."""
        return Findings(tuple(dict.fromkeys(self.notes)), tuple(dict.fromkeys(self.warnings)))

    def __add__(self, other: Findings) -> Findings:
        return Findings((*self.notes, *other.notes), (*self.warnings, *other.warnings))


def counted(warnings: Sequence[str]) -> str:
    """The number of warnings, to append to a report's summary of itself; empty if there are none."""
    return f"; {len(warnings)} warning{'s' * (len(warnings) > 1)}" if warnings else ""
