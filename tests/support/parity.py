"""Distances from mergekit's tensors, as tests measure them, and how far they may go.

Tests of `make parity` add the rows that they measured to bench/results/parity.csv, from which bench/report.py makes the
tables of docs/methods.md. All distances are relative to the norm of the tensor in which they are largest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import rows

ROUNDING = 3e-7
"""The rounding of float32."""

OF_METHOD = {"karcher": 1e-6}
"""Methods that may be farther from mergekit: it rounds the unit vectors of karcher to float32 at every step."""

PACKAGES = ("numpy", "torch", "mergekit")


@dataclass(frozen=True)
class Limit:
    """How far a merge may lie from mergekit's, and where that is more than rounding, why."""

    most: float
    reason: str = ""


def limit_of(method: str) -> Limit:
    """The limit of a merge that is no exception.

    Example:
        >>> limit_of("ties").most, limit_of("karcher").most
        (3e-07, 1e-06)
    """
    most = OF_METHOD.get(method, ROUNDING)
    return Limit(most, "mergekit rounds unit vectors to float32 at every step" if most > ROUNDING else "")


def settings_text(settings: Mapping[str, Any]) -> list[str]:
    """What the documentation says of each setting of a merge, but for weights.

    Example:
        >>> settings_text({"weights": [0.5, 0.3], "lam": 0.7, "normalize": True})
        ['lambda 0.7', 'normalize true']
    """
    shown = {name: str(value).lower() for name, value in settings.items() if name != "weights"}
    return [f"{'lambda' if name == 'lam' else name} {value}" for name, value in shown.items()]


@dataclass(frozen=True)
class Distances:
    """Distances of one merge; None where they were not measured.

    `between` ours and mergekit's in float32, `ours` and `theirs` from the exact value, `formulas` between both in
    float64.
    """

    between: float
    ours: float | None = None
    theirs: float | None = None
    formulas: float | None = None

    def larger(self, other: Distances) -> Distances:
        """The larger of each."""
        mine, others = asdict(self), asdict(other)
        both = {key: [each for each in (mine[key], others[key]) if each is not None] for key in mine}
        return replace(self, **{key: max(found, default=None) for key, found in both.items()})


class Measured:
    """The largest distances of each merge that a module compares."""

    def __init__(self, comparison: str) -> None:
        self.comparison = comparison
        self.found: dict[tuple[str, str], tuple[Distances, Limit]] = {}

    def add(self, method: str, case: str, distances: Distances, limit: Limit) -> None:
        before = self.found.get((method, case))
        self.found[method, case] = (distances if before is None else before[0].larger(distances), limit)

    def text(self) -> str:
        """The rows as a table in Markdown."""
        head = ("method", "case", "between", "at most", "ours", "mergekit's", "in float64")
        lines = [
            (method, case, *map(_short, (each.between, limit.most, each.ours, each.theirs, each.formulas)))
            for (method, case), (each, limit) in self.found.items()
        ]
        return rows.markdown(head, lines)

    def write(self) -> None:
        """Add the rows to the results; a row that is beyond its limit is none."""
        known = rows.about(PACKAGES)
        every = [
            {**known, "comparison": self.comparison, "method": method, "case": case}
            | {key: "" if value is None else f"{value:.3g}" for key, value in asdict(each).items()}
            | {"most": f"{limit.most:g}", "reason": limit.reason}
            for (method, case), (each, limit) in self.found.items()
        ]
        if any(each.between > limit.most for each, limit in self.found.values()):
            print("distances are beyond their limits: nothing was added to parity.csv")
        elif every:
            rows.append("parity", every)


def measured(comparison: str) -> Iterator[Measured]:
    """For a fixture of a module: what its tests measure, printed at its end, and written where HSA_PARITY says
    `write`."""
    found = Measured(comparison)
    yield found
    print("", found.text(), sep="\n")
    if os.environ.get("HSA_PARITY") == "write":
        found.write()


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
