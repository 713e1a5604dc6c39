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

from hsa.architectures.base import Architecture
from hsa.errors import RequestError
from hsa.methods.selection import count_heads, narrowest
from hsa.option_names import LETTERS
from hsa.outputs.distances import Distances
from hsa.outputs.grid_point import GridPoint, name_starts
from hsa.outputs.patch_reader import Patch, is_patch
from hsa.outputs.provenance import Record, SourceRecord
from hsa.outputs.record_checks import config_of_record
from hsa.sources.roles import Role
from hsa.system.dtypes import BITS
from hsa.system.manifest import PROVENANCE
from hsa.system.staging import REPLACED, STAGING

JSON, CSV = "index.json", "index.csv"
KIND = "hsa-sweep"
NO_KEYS = ("place", "values")
"""Fields of an entry that `as_dict` puts first, or takes apart."""

_START = f'{{\n "kind": "{KIND}",'.encode()
"""What an index begins with, so that a sweep can tell its own from another file of that name."""


@dataclass(frozen=True)
class SweepEntry:
    """One point: its file or directory in the sweep's, its values, heads and distances.

    `values` are those of the grid's axes, by their names in records. `rows_bytes` are those of the merged rows;
    `blake3` is the digest of a patch's tensors, or of a checkpoint's provenance. `distances` are relative L2 changes of
    the targets, by stack and of `all`.
    """

    place: str
    values: Mapping[str, Any]
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
            values=point.values,
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
    def order(self) -> tuple[Any, ...]:
        return (self.values.get("method", ""), *self.values.values(), self.place)

    def as_dict(self) -> dict[str, Any]:
        """The entry as JSON. A name that is none in Python comes last: earlier versions wrote it there, and `verify`
        compares an index byte by byte."""
        last = {key: value for key, value in self.values.items() if key in LETTERS.values()}
        document = {"place": self.place, **{key: value for key, value in self.values.items() if key not in last}}
        document |= {field.name: getattr(self, field.name) for field in fields(self) if field.name not in NO_KEYS}
        document |= last
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
    shown = ["place", *dict.fromkeys(key for entry in ordered for key in entry.values)]
    shown += ["selected_heads", "total_heads", "min_margin", "min_margin_tensor", "rows_bytes", "blake3"]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*shown, *(f"{stack}_{direction}" for stack, direction in columns)])
    for entry in ordered:
        values = entry.as_dict()
        distances = [values["distances"].get(stack, {}).get(direction, "") for stack, direction in columns]
        writer.writerow([*(values.get(name, "") for name in shown), *distances])
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
    starts = name_starts()
    if path.name.startswith(tuple(f".{start}" for start in starts)):
        return path.name.endswith((STAGING, REPLACED))
    if not path.name.startswith(starts):
        return False
    return (path / PROVENANCE).is_file() or is_patch(path)


def holds_points(directory: Path) -> bool:
    """Whether a directory is a sweep's: it holds the index of one, or a point."""
    with suppress(OSError):
        return is_index(directory / JSON) or any(map(is_point, sorted(directory.iterdir())))
    return False


def point_of(record: Record) -> GridPoint:
    """The grid point with a record's parameters. Raises RequestError where they are those of none."""
    settings = config_of_record(record)
    if any(settings.per_tensor()):
        raise RequestError("its parameters are given per tensor")
    return GridPoint(settings)


def entry_of(point: GridPoint, patch: Patch) -> SweepEntry:
    """The entry of a patch."""
    return SweepEntry.of(point, patch.source.path.name, patch.record, patch.contents.tensors, patch.contents.distances)
