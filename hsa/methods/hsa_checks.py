"""Check that a recorded decision of HSA follows from its settings, and is consistent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hsa.errors import HsaError, shown
from hsa.methods import values
from hsa.methods.hsa_formula import keep_count, layer_coefficient, normalized
from hsa.methods.tensors import TensorRecord

MARGIN_ERROR = 1e-12
"""Tolerance for margins: a margin is computed from squared scores, but the provenance contains their rounded roots."""


def decision_faults(target: TensorRecord, settings: Any, layers: int) -> Iterator[str]:
    """Check that coefficient and selection of a target follow from the settings. `layers` counts the layers of its
    stack."""
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
    yield from _share_faults(target, settings, layers)
    yield from _selection_faults(target.name, decision)


def _share_faults(target: TensorRecord, settings: Any, layers: int) -> Iterator[str]:
    """Check that each secondary's share of the blend follows from the weights. If `num_layers` is given, lists over
    layers are not checked: the number of layers that the model has is known only from its tensors."""
    assert target.place is not None
    count = len(target.decision.shares)
    weights = settings.weights if values.is_per_model(settings.weights) else (settings.weights,) * count
    if count == 1 or (settings.num_layers is not None and any(map(values.follows_layers, weights))):
        return
    depth = target.place.layer / (layers - 1) if layers > 1 else 1.0
    where = values.Where(target.canonical, depth)
    try:
        expected = normalized([values.at("weights", weight, where) for weight in weights])
    except HsaError as error:
        yield f"target {target.name}: {error}"
        return
    if expected != target.decision.shares:
        yield (
            f"target {target.name} is listed with the shares {shown(list(target.decision.shares))} of its secondaries; "
            f"the parameters give {shown(list(expected))}"
        )


def _selection_faults(name: str, decision: Any) -> Iterator[str]:
    """Check that heads, scores, keep and margin are consistent. Scores are rounded roots, so two scores that are equal
    here may have differed: any of the heads at the cut may be selected."""
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
