"""The index of a sweep's directory: what is where, with the heads selected and how far from the fine-tunes it lies.

It is written from what stands in the directory, and never read for it.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hsa.architectures.base import PRESETS, Architecture
from hsa.errors import RequestError
from hsa.methods.grid_point import GridPoint
from hsa.methods.hsa import HsaSettings
from hsa.methods.selection import count_heads, narrowest
from hsa.outputs.distances import Distances
from hsa.outputs.patch_reader import Patch, is_patch
from hsa.outputs.provenance import Record, SourceRecord
from hsa.sources.roles import Role
from hsa.system.dtypes import BITS
from hsa.system.manifest import PROVENANCE
from hsa.system.staging import REPLACED, STAGING

JSON, CSV = "index.json", "index.csv"
KIND = "hsa-sweep"
_START = f'{{\n "kind": "{KIND}",'.encode()
"""What an index begins with, so that a sweep can tell its own from another file of that name."""


@dataclass(frozen=True)
class SweepEntry:
    """One point: its file or directory in the sweep's, its parameters, heads and distances.

    `rows_bytes` are those of the merged rows; `blake3` is the digest of a patch's tensors, or of a checkpoint's
    provenance. `distances` are relative L2 changes of the targets, by stack and of `all`.
    """

    place: str
    targets: str
    k: float
    lam: float
    alpha: float
    selected_heads: int
    total_heads: int
    min_margin: float | None
    min_margin_tensor: str | None
    rows_bytes: int
    blake3: str
    distances: Mapping[str, Distances]
    selected: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(
        cls, point: GridPoint, place: str, record: Record, blake3: str, distances: Mapping[str, Distances]
    ) -> SweepEntry:
        heads, narrow = count_heads(record.targets), narrowest(record.targets)
        return cls(
            place=place,
            targets=point.targets,
            k=point.k,
            lam=point.lam,
            alpha=point.alpha,
            selected_heads=heads.selected,
            total_heads=heads.total,
            min_margin=narrow.margin if narrow else None,
            min_margin_tensor=narrow.name if narrow else None,
            rows_bytes=sum(math.prod(t.shape) // t.heads * len(t.selected) * BITS[t.code] // 8 for t in record.targets),
            blake3=blake3,
            distances=distances,
            selected={target.name: target.selected for target in record.targets},
        )

    @property
    def order(self) -> tuple[str, float, float, float, str]:
        return (self.targets, self.k, self.lam, self.alpha, self.place)

    def as_dict(self) -> dict[str, Any]:
        """The entry with lambda and lists under their names in JSON."""
        document = {field.name: getattr(self, field.name) for field in fields(self)}
        document["lambda"] = document.pop("lam")
        document["distances"] = {
            stack: {"from_primary": each.from_primary, "from_secondary": each.from_secondary}
            for stack, each in self.distances.items()
        }
        document["selected"] = {name: list(heads) for name, heads in self.selected.items()}
        return document


def render(
    entries: Iterable[SweepEntry], sources: Mapping[Role, SourceRecord], architecture: Architecture
) -> dict[str, bytes]:
    """Both index files. Nothing in them depends on when, where or in which order the points were made."""
    ordered = sorted(entries, key=lambda entry: entry.order)
    source_records = {role: source.as_dict() for role, source in sources.items()}
    for each in source_records.values():
        del each["targets_blake3"]  # it differs from preset to preset, and stands in every point
    document = {"kind": KIND, "sources": source_records, "points": [entry.as_dict() for entry in ordered]}
    text = json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    columns = [
        (stack, direction)
        for stack in (*architecture.all_stacks, "all")
        for direction in ("from_primary", "from_secondary")
    ]
    shown = ["place", "targets", "k", "lambda", "alpha", "selected_heads", "total_heads"]
    shown += ["min_margin", "min_margin_tensor", "rows_bytes", "blake3"]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*shown, *(f"{stack}_{direction}" for stack, direction in columns)])
    for entry in ordered:
        values = entry.as_dict()
        distances = [values["distances"].get(stack, {}).get(direction, "") for stack, direction in columns]
        writer.writerow([*(values[name] for name in shown), *distances])
    return {JSON: text.encode("ascii"), CSV: table.getvalue().encode("utf-8")}


def is_index(path: Path) -> bool:
    """Whether a file is an index that a sweep wrote, by its first bytes."""
    with suppress(OSError):
        if path.is_file():  # opening a pipe would wait for a writer
            with path.open("rb") as file:
                return file.read(len(_START)) == _START
    return False


def is_point(path: Path) -> bool:
    """Whether a directory entry is what a sweep left that was killed before its index: a point, or one being made."""
    if path.name.startswith(tuple(f".{preset}" for preset in PRESETS)):
        return path.name.endswith((STAGING, REPLACED))
    if not path.name.startswith(PRESETS):
        return False
    return (path / PROVENANCE).is_file() or is_patch(path)


def holds_points(directory: Path) -> bool:
    """Whether a directory is a sweep's: it holds the index of one, or a point."""
    with suppress(OSError):
        return is_index(directory / JSON) or any(map(is_point, sorted(directory.iterdir())))
    return False


def point_of(record: Record) -> GridPoint:
    """The grid point with a record's parameters. Raises RequestError where they are those of none."""
    config = HsaSettings.from_dict(record.parameters)
    values = [value for value in (config.k, config.lam, config.alpha) if not isinstance(value, Mapping)]
    if len(values) < 3:
        raise RequestError("its parameters are given per tensor")
    return GridPoint(config.targets, *map(float, values))


def entry_of(point: GridPoint, patch: Patch) -> SweepEntry:
    """The entry of a patch."""
    return SweepEntry.of(point, patch.source.path.name, patch.record, patch.contents.tensors, patch.contents.distances)
