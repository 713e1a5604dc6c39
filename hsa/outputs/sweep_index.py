"""The index of a sweep's directory: its points, with their selected heads and their distances from the fine-tunes.

It is written from the files in the directory. A sweep never reads it to learn what is there.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsa.architectures.base import Architecture
from hsa.errors import RequestError
from hsa.methods.copied import untouched_groups
from hsa.methods.tensors import TensorRecord
from hsa.option_names import LETTERS
from hsa.outputs.grid_point import GridPoint, name_starts
from hsa.outputs.patch_format import Distances
from hsa.outputs.patch_reader import Patch, is_patch
from hsa.outputs.record import Record
from hsa.outputs.record_checks import settings_of_record
from hsa.outputs.source_record import SourceRecord
from hsa.sources.roles import Role
from hsa.system.dtypes import BITS
from hsa.system.manifest import PROVENANCE
from hsa.system.staging import REPLACED, STAGING

JSON, CSV = "index.json", "index.csv"
KIND = "hsa-sweep"
_START = f'{{\n "kind": "{KIND}",'.encode()
"""The first bytes of an index, by which a sweep recognizes its own among files of that name."""


@dataclass(frozen=True)
class SweepEntry:
    """One point: its file or directory within the sweep's directory, its values, heads and distances.

    `values` are those of the grid's axes, by their names in records. `counts` and `margins` describe the merge as the
    method reports it. `rows_bytes` is the size of the merged rows, and `selected` lists the merged groups (heads) of
    each target. `blake3` is the digest of a patch's tensors, or of a checkpoint's provenance. `distances` are relative
    L2 changes of the targets, by stack and for `all`.
    """

    place: str
    values: Mapping[str, Any]
    counts: Mapping[str, Any]
    margins: Mapping[str, Any]
    rows_bytes: int
    blake3: str
    distances: Distances
    selected: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, point: GridPoint, place: str, record: Record, blake3: str, distances: Distances) -> SweepEntry:
        summary, merged = (
            record.method.recorded_summary(record.targets),
            {t.name: _merged(record, t) for t in record.targets},
        )
        return cls(
            place=place,
            values=point.values,
            counts=summary.counts(),
            margins=summary.margins(),
            rows_bytes=sum(
                math.prod(t.shape) // t.partition.groups * len(merged[t.name]) * BITS[t.code] // 8
                for t in record.targets
            ),
            blake3=blake3,
            distances=distances,
            selected=merged,
        )

    @property
    def order(self) -> tuple[Any, ...]:
        return (self.values.get("method", ""), *self.values.values(), self.place)

    def as_dict(self) -> dict[str, Any]:
        """The entry as JSON.

        Keys that are Python keywords come last. Earlier versions wrote them there, and `verify` compares an index byte
        by byte."""
        last = {key: value for key, value in self.values.items() if key in LETTERS.values()}
        document = {"place": self.place, **{key: value for key, value in self.values.items() if key not in last}}
        distances = {
            stack: {f"from_{role}": value for role, value in by_role.items()}
            for stack, by_role in self.distances.items()
        }
        return {
            **document,
            **self.counts,
            **self.margins,
            "rows_bytes": self.rows_bytes,
            "blake3": self.blake3,
            "distances": distances,
            "selected": {name: list(groups) for name, groups in self.selected.items()},
            **last,
        }


def _merged(record: Record, target: TensorRecord) -> tuple[int, ...]:
    """The groups of a target that differ from the anchor's."""
    groups = target.partition.groups
    return tuple(sorted(set(range(groups)) - untouched_groups(record.method, groups, target.decision)))


def render(
    entries: Iterable[SweepEntry], sources: Mapping[Role, SourceRecord], architecture: Architecture
) -> dict[str, bytes]:
    """Render both index files. Nothing in them depends on when, where or in which order the points were made."""
    ordered = sorted(entries, key=lambda entry: entry.order)
    source_records = {role: source.as_dict() for role, source in sources.items()}
    for each in source_records.values():
        del each["targets_blake3"]  # it depends on the preset, and every point contains it
    document = {"kind": KIND, "sources": source_records, "points": [entry.as_dict() for entry in ordered]}
    text = json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    roles = dict.fromkeys(role for entry in ordered for by_role in entry.distances.values() for role in by_role)
    directions = [f"from_{role}" for role in roles]
    columns = [(stack, direction) for stack in (*architecture.all_stacks, "all") for direction in directions]
    shown = ["place", *dict.fromkeys(key for entry in ordered for key in entry.values)]
    shown += dict.fromkeys(key for entry in ordered for key in (*entry.counts, *entry.margins))
    shown += ["rows_bytes", "blake3"]
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
    """Whether a directory entry was left by a sweep killed before it wrote its index: a point, or one in progress."""
    starts = name_starts()
    if path.name.startswith(tuple(f".{start}" for start in starts)):
        return path.name.endswith((STAGING, REPLACED))
    if not path.name.startswith(starts):
        return False
    return (path / PROVENANCE).is_file() or is_patch(path)


def holds_points(directory: Path) -> bool:
    """Whether a directory belongs to a sweep: it contains the index of one, or a point."""
    with suppress(OSError):
        return is_index(directory / JSON) or any(map(is_point, sorted(directory.iterdir())))
    return False


def point_of(record: Record) -> GridPoint:
    """The grid point with a record's parameters. Raises RequestError if they do not describe a point."""
    settings = settings_of_record(record)
    if any(settings.per_tensor()):
        raise RequestError("its parameters are given per tensor")
    return GridPoint(settings)


def entry_of(point: GridPoint, patch: Patch) -> SweepEntry:
    """The entry of a patch."""
    return SweepEntry.of(point, patch.source.path.name, patch.record, patch.contents.tensors, patch.contents.distances)
