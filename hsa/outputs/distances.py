"""How far merged targets lie from the two fine-tunes: relative L2 by stack, from sums of squares taken once.

In a selected head `merged - primary` is `c2 * (secondary - primary)` and `merged - secondary` is
`c1 * (primary - secondary)`, for c1 + c2 = 1; in other heads `merged` is primary. So the sums over elements are taken
once for a triple, whatever the parameters, and are those of the formula's values before they are rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hsa.methods.geometry import Norms


@dataclass(frozen=True)
class Distances:
    """`|merged - primary| / |primary|` and `|merged - secondary| / |secondary|` over the targets of a stack.

    None where the fine-tune's targets are all zero and the merged ones are not: there is no such ratio.
    """

    from_primary: float | None
    from_secondary: float | None


@dataclass(frozen=True)
class DistanceInputs:
    """What of a merged target its distances hang on: stack, lambda_i, selected heads, and the sums of its sources."""

    stack: str
    coefficient: float
    selected: Sequence[int]
    norms: Norms


def by_stack(targets: Iterable[DistanceInputs]) -> dict[str, Distances]:
    """The distances by stack, and of `all`."""
    sums: dict[str, list[float]] = {}
    for target in targets:
        selected, norms = set(target.selected), target.norms
        c1, c2 = float(np.float32(target.coefficient)), float(np.float32(1.0 - target.coefficient))
        merged = sum(value for head, value in enumerate(norms.difference) if head in selected)
        kept = sum(value for head, value in enumerate(norms.difference) if head not in selected)
        parts = (c2**2 * merged, norms.primary, c1**2 * merged + kept, norms.secondary)
        for stack in (target.stack, "all"):
            totals = sums.setdefault(stack, [0.0] * 4)
            for place, part in enumerate(parts):
                totals[place] += part
    return {stack: Distances(_root(a, b), _root(c, d)) for stack, (a, b, c, d) in sums.items()}


def _root(above: float, below: float) -> float | None:
    if above == 0.0:
        return 0.0
    return float((above / below) ** 0.5) if below > 0 else None
