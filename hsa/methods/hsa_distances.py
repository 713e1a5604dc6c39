"""How far merged targets lie from the two fine-tunes: relative L2 by stack, from sums of squares taken once.

In a selected head `merged - primary` is `c2 * (secondary - primary)` and `merged - secondary` is
`c1 * (primary - secondary)`, for c1 + c2 = 1; in other heads `merged` is primary. So the sums over elements are taken
once for a triple, whatever the parameters, and are those of the formula's values before they are rounded.
"""

from __future__ import annotations

from collections.abc import Iterable

from hsa.methods.geometry import Norms
from hsa.methods.hsa_formula import rounded_pair
from hsa.methods.tensors import TensorRecord


def by_stack(targets: Iterable[tuple[TensorRecord, Norms]]) -> dict[str, dict[str, float | None]]:
    """The distances from primary and from secondary by stack, and of `all`."""
    sums: dict[str, list[float]] = {}
    for target, norms in targets:
        decision, stack = target.decision, "" if target.place is None else target.place.stack
        c1, c2 = rounded_pair(decision.coefficient)
        selected = decision.selection.merged
        merged = sum(value for head, value in enumerate(norms.difference) if head in selected)
        kept = sum(value for head, value in enumerate(norms.difference) if head not in selected)
        parts = (c2**2 * merged, norms.primary, c1**2 * merged + kept, norms.secondary)
        for each in (stack, "all"):
            totals = sums.setdefault(each, [0.0] * 4)
            for place, part in enumerate(parts):
                totals[place] += part
    return {stack: {"primary": _root(a, b), "secondary": _root(c, d)} for stack, (a, b, c, d) in sums.items()}


def _root(above: float, below: float) -> float | None:
    if above == 0.0:
        return 0.0
    return float((above / below) ** 0.5) if below > 0 else None
