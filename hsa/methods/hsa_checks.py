"""Whether a recorded decision of HSA follows from its settings, and fits together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hsa.errors import HsaError, shown
from hsa.methods.hsa_formula import keep_count, layer_coefficient
from hsa.methods.settings import Settings
from hsa.methods.tensors import TensorRecord

MARGIN_ERROR = 1e-12
"""A margin is taken from squared scores, and the roots that the provenance holds are rounded."""


def decision_faults(target: TensorRecord, settings: Settings, layers: int) -> Iterator[str]:
    """Whether coefficient and selection of a target follow from the settings; `layers` are those of its stack."""
    assert target.place is not None
    name, decision = target.canonical, target.decision
    try:
        keep = keep_count(settings.of("k", name), target.heads)
        lam, alpha = settings.of("lam", name), settings.of("alpha", name)
        coefficient = layer_coefficient(lam, alpha, target.place.layer, layers)
    except (HsaError, ArithmeticError) as error:
        yield f"target {target.name}: {error}"
        return
    if (decision.keep, decision.coefficient) != (keep, coefficient):
        yield (
            f"target {target.name} is listed with keep {decision.keep} and lambda_i {shown(decision.coefficient)}; the "
            f"parameters give {keep} and {shown(coefficient)}"
        )
    yield from _selection_faults(target.name, decision)


def _selection_faults(name: str, decision: Any) -> Iterator[str]:
    """Whether heads, scores, keep and margin fit together. Scores are rounded roots, so that two which are equal here
    may have differed: of those at the cut, any may be in."""
    selected, scores, keep = decision.selection.merged, decision.scores, decision.keep
    kept = [scores[head] for head in decision.selected]
    dropped = [score for head, score in enumerate(scores) if head not in selected]
    cut = sorted(scores, reverse=True)[keep - 1] if 0 < keep <= len(scores) else None
    right = cut is not None and len(kept) >= keep and min(kept) >= cut and max(dropped, default=0.0) <= cut
    if not (right if keep else not kept):
        yield f"target {name}: heads {shown(list(decision.selected))} are not the {keep} with the largest scores"
        return
    if not kept or not dropped:
        margin = None
    else:
        last = min(kept) ** 2
        margin = (last - max(dropped) ** 2) / last if last > 0 else 0.0
    if (margin is None) != (decision.margin is None) or (
        margin is not None and decision.margin is not None and abs(margin - decision.margin) > MARGIN_ERROR
    ):
        yield f"target {name}: margin {shown(decision.margin)} is listed, the scores give {shown(margin)}"
