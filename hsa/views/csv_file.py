"""An inspection as CSV: one row for each head of each tensor. Floats are written so that they parse back exactly."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from hsa.inspection.inspect import Inspection, TensorInspection

COLUMNS = (
    "tensor",
    "stack",
    "layer",
    "block",
    "kind",
    "part",
    "head",
    "heads",
    "k",
    "keep",
    "lambda",
    "alpha",
    "lambda_i",
    "margin",
    "score",
    "squared_score",
    "rank",
    "selected",
    "cosine",
    "base_norm",
    "tv1_norm",
    "tv2_norm",
    "tv1_relative",
    "tv2_relative",
)
"""`selected` is 1 or 0. Empty cells are unknown. `squared_score` and the columns after `selected` need the sources."""

_GEOMETRY = COLUMNS[COLUMNS.index("cosine") :]


def render(inspection: Inspection) -> bytes:
    """The bytes of the file: RFC 4180 with a header, UTF-8."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for tensor in inspection.tensors.values():
        writer.writerows(_rows(tensor))
    return text.getvalue().encode("utf-8")


def _rows(tensor: TensorInspection) -> list[list[object]]:
    p, selected = tensor.projection, set(tensor.selected)
    columns = {} if tensor.geometry is None else tensor.geometry.as_dict()
    rows = []
    for head in range(tensor.heads):
        geometry: Sequence[object] = [columns[name][head] if name in columns else None for name in _GEOMETRY]
        row: list[object] = [tensor.name, p.stack, p.layer, p.block, p.kind, p.part, head, tensor.heads]
        row += [tensor.k, tensor.keep, tensor.lam, tensor.alpha, tensor.coefficient, tensor.margin]
        row += [tensor.scores[head], None if tensor.squared is None else tensor.squared[head], tensor.ranks[head]]
        rows.append([cell(value) for value in (*row, int(head in selected), *geometry)])
    return rows


def cell(value: object) -> object:
    """A value as a cell of a row: empty for None, and floats in a form that parses back exactly."""
    return "" if value is None else repr(value) if isinstance(value, float) else value
