"""The distances of merged targets from the models: relative L2 by stack, from sums of squares that are taken once.

In a selected head, `merged - M_k` is the sum of `c_i * (M_i - M_k)` over the other models, for coefficients that sum to
1. In other heads, `merged` is primary. So the sums over elements are taken once for a set of models, whatever the
parameters. The distances are those of the formula's values before they are rounded. With D_ij for |M_i - M_j|^2,
`|merged - M_k|^2` is the sum of `c_i^2 * D_ik` and of `c_i * c_j * (D_ik + D_jk - D_ij)` over pairs i < j.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

from hsa.methods.geometry import Norms, Pair
from hsa.methods.tensors import TensorRecord


def by_stack(targets: Iterable[tuple[TensorRecord, Norms]], roles: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """The distances from the models with these roles by stack, and for `all`."""
    sums: dict[str, list[float]] = {}
    for target, norms in targets:
        decision, stack = target.decision, "" if target.place is None else target.place.stack
        selected = decision.selection.merged
        merged, kept = ({pair: _sum(norms, pair, selected, inside) for pair in norms.differences} for inside in (1, 0))
        parts: list[float] = []
        for model, norm in enumerate(norms.models):
            far = _squared_distance(decision.coefficients, merged, model)
            parts += (far if model == 0 else far + kept[0, model], norm)
        for each in (stack, "all"):
            totals = sums.setdefault(each, [0.0] * len(parts))
            for place, part in enumerate(parts):
                totals[place] += part
    return {
        stack: {role: _root(*totals[2 * number : 2 * number + 2]) for number, role in enumerate(roles)}
        for stack, totals in sums.items()
    }


def _sum(norms: Norms, pair: Pair, selected: frozenset[int], inside: int) -> float:
    """|M_i - M_j|^2 over the selected heads, or over the others."""
    return sum(value for head, value in enumerate(norms.differences[pair]) if (head in selected) == bool(inside))


def _squared_distance(coefficients: Sequence[float], apart: dict[Pair, float], model: int) -> float:
    """|merged - M_k|^2, k the model, by |M_i - M_j|^2 of each pair."""
    others = [number for number in range(len(coefficients)) if number != model]

    def between(first: int, second: int) -> float:
        return apart[min(first, second), max(first, second)]

    squares = sum(coefficients[i] ** 2 * between(i, model) for i in others)
    return squares + sum(
        coefficients[i] * coefficients[j] * (between(i, model) + between(j, model) - between(i, j))
        for i, j in combinations(others, 2)
    )


def _root(above: float, below: float) -> float | None:
    if above <= 0.0:
        return 0.0
    return float((above / below) ** 0.5) if below > 0 else None
