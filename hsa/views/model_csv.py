"""An inspection of whole models as CSV: one row for each tensor. Floats are written so that they parse back exactly."""

from __future__ import annotations

import csv
import io
from itertools import combinations

from hsa.inspection.model_report import ModelInspection, TensorVectors, kept_dict, vectors_dict
from hsa.sources.roles import Role
from hsa.views.csv_file import cell

PLACE = ("tensor", "stack", "layer", "kind", "elements", "copied", "base_norm", "shared", "disagreeing", "conflict")

OF_MODELS = ("norm", "relative", "moved", "kept", "kept_energy", "agreeing", "coefficient")
"""The columns of each model; their names begin with its role."""


def render(inspection: ModelInspection) -> bytes:
    """The bytes of the file: RFC 4180 with a header, UTF-8. Empty cells are unknown, or not decided by the method."""
    text, models = io.StringIO(newline=""), inspection.models
    writer = csv.writer(text)
    pairs = [f"cosine_{one}_{two}" for one, two in combinations(models, 2)]
    writer.writerow([*PLACE, *(f"{role}_{name}" for role in models for name in OF_MODELS), *pairs])
    for tensor in inspection.tensors.values():
        writer.writerow([cell(value) for value in _row(tensor, models, based=inspection.based)])
    return text.getvalue().encode("utf-8")


def _row(tensor: TensorVectors, models: tuple[Role, ...], *, based: bool) -> list[object]:
    sums, spot = vectors_dict(tensor.vectors, models, based=based), tensor.spot
    conflicts, kept = sums["conflicts"] or {}, kept_dict(tensor.kept, models) or {}
    row: list[object] = [tensor.name, spot.stack, spot.layer, spot.kind, tensor.elements, int(tensor.copied)]
    row += [sums["base_norm"], *(conflicts.get(name) for name in ("shared", "disagreeing", "share"))]
    for role in models:
        row += [(sums[name] or {}).get(role) for name in ("norms", "relative", "moved")]
        row += [kept.get(role, {}).get(name) for name in ("kept", "energy", "agreeing")]
        row.append(tensor.coefficients.get(role))
    cosines = sums["cosines"]
    row += [None if cosines is None else cosines[one][two] for one, two in combinations(range(len(models)), 2)]
    return row
