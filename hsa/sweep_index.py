"""The index of a sweep's directory: what is where, with the heads selected and how far from the fine-tunes it lies."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hsa.checkpoint import MAX_TEXT, ROLES, Role
from hsa.errors import DestinationError, HeaderError
from hsa.fsio import Source, Tally
from hsa.grid import GridPoint
from hsa.header import load_json
from hsa.patch_reader import Patch
from hsa.provenance import SourceRecord

JSON, CSV = "index.json", "index.csv"
FORMAT = 1
STACKS = ("encoder", "decoder", "all")


@dataclass(frozen=True)
class Entry:
    """One point: its parameters, its file or directory in the sweep's, its heads, and the digest over its rows.

    `distances` are relative L2 changes of the targets by stack (and `all`), from primary and from secondary.
    """

    name: str
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
    rows_blake3: str
    distances: Mapping[str, tuple[float, float]]
    selected: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, point: GridPoint, patch: Patch, place: str) -> Entry:
        record = patch.record
        narrow = min((t for t in record.targets if t.margin is not None), key=lambda t: t.margin or 0.0, default=None)
        return cls(
            name=point.name,
            place=place,
            targets=point.targets,
            k=point.k,
            lam=point.lam,
            alpha=point.alpha,
            selected_heads=sum(len(target.selected) for target in record.targets),
            total_heads=sum(target.heads for target in record.targets),
            min_margin=narrow.margin if narrow else None,
            min_margin_tensor=narrow.name if narrow else None,
            rows_bytes=sum(entry.stop - entry.start for entry in patch.header.entries if entry.name in patch.rows),
            rows_blake3=patch.contents.tensors,
            distances={s: (d.from_primary, d.from_secondary) for s, d in patch.contents.distances.items()},
            selected={target.name: target.selected for target in record.targets},
        )

    @property
    def point(self) -> GridPoint:
        return GridPoint(self.targets, self.k, self.lam, self.alpha)  # type: ignore[arg-type]

    @property
    def order(self) -> tuple[str, float, float, float]:
        return (self.targets, self.k, self.lam, self.alpha)

    def as_dict(self) -> dict[str, Any]:
        """The entry with lambda and lists under their names in JSON."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        found["lambda"] = found.pop("lam")
        found["distances"] = {
            stack: {"from_primary": one, "from_secondary": two} for stack, (one, two) in self.distances.items()
        }
        found["selected"] = {name: list(heads) for name, heads in self.selected.items()}
        return found

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Entry:
        """The entry of `as_dict`; raises KeyError, TypeError, ValueError or AttributeError for anything else."""
        given = dict(entry)
        given["lam"] = given.pop("lambda")
        given["distances"] = {s: (d["from_primary"], d["from_secondary"]) for s, d in given["distances"].items()}
        given["selected"] = {name: tuple(heads) for name, heads in given["selected"].items()}
        found = cls(**given)
        if found.point.name != found.name:
            raise ValueError(f"{found.name!r:.80} is not the name of its parameters")
        return found


def render(entries: Iterable[Entry], sources: Mapping[Role, SourceRecord]) -> dict[str, bytes]:
    """Both index files. Nothing in them depends on when, where or in which order the points were made."""
    listed = sorted(entries, key=lambda entry: entry.order)
    document = {
        "format": FORMAT,
        "sources": _known(sources),
        "points": [entry.as_dict() for entry in listed],
    }
    text = json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    columns = [f"{stack}_{way}" for stack in STACKS for way in ("from_primary", "from_secondary")]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    shown = (
        "place",
        "targets",
        "k",
        "lambda",
        "alpha",
        "selected_heads",
        "total_heads",
        "min_margin",
        "min_margin_tensor",
    )
    writer.writerow([*shown, *columns, "rows_bytes", "rows_blake3"])
    for entry in listed:
        known = entry.as_dict()
        distances = [
            known["distances"].get(stack, {}).get(way, "")
            for stack in STACKS
            for way in ("from_primary", "from_secondary")
        ]
        writer.writerow([*(known[name] for name in shown), *distances, entry.rows_bytes, entry.rows_blake3])
    return {JSON: text.encode("ascii"), CSV: table.getvalue().encode("utf-8")}


def read(directory: Path, sources: Mapping[Role, SourceRecord]) -> list[Entry]:
    """The entries of a directory's index, none where there is no index.

    Raises DestinationError where it is no sweep's, or that of other sources.
    """
    path = directory / JSON
    if not path.is_file():
        return []
    source = Source(path, "index", Tally())
    try:
        if source.size > MAX_TEXT:
            raise DestinationError(f"{path} has {source.size} bytes, at most {MAX_TEXT} are read")
        document = load_json(source.read(source.size), str(path), "index")
        if document["format"] != FORMAT:
            raise ValueError(f"format is {document['format']!r:.40}, this version reads {FORMAT}")
        entries = [Entry.from_dict(entry) for entry in document["points"]]
        if document["sources"] != _known(sources):
            raise DestinationError(f"{path} lists merges of other sources; choose another output for these")
        return entries
    except (HeaderError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DestinationError(f"{path} is no index of a sweep ({error}); choose another output") from error
    finally:
        source.close()


def _known(sources: Mapping[Role, SourceRecord]) -> dict[str, Any]:
    """Who the sources are, but for the digests of targets, which differ from preset to preset."""
    known: dict[str, Any] = {role: sources[role].as_dict() for role in ROLES}
    for entry in known.values():
        del entry["targets_blake3"]
    return known
