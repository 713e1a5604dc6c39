"""The index of a release tree: `README.md`, which the Hub shows, and `index.json`, for programs.

Both are made only from the recipe and from the provenance of the outputs in the tree: no time, no path of this machine,
no message of a run. So the same tree has the same index, however many runs made it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from hsa.architectures.base import Architecture
from hsa.architectures.registry import default
from hsa.errors import DestinationError, listed
from hsa.methods.all_settings import summary
from hsa.methods.markdown import code, escape, fence, table
from hsa.methods.registry import AnyMethod, method_named
from hsa.methods.settings import DEFAULT_METHOD
from hsa.outputs import card
from hsa.outputs.provenance import Provenance
from hsa.outputs.release_index import FORMAT, INDEX, KIND, README, entry_facts, is_index
from hsa.releases.recipe import Recipe, RecipeEntry
from hsa.sources.identity import Identity, is_hub_id
from hsa.sources.roles import Role
from hsa.system import fsio
from hsa.system.staging import STAGING, StagingDirectory, hidden_sibling

MARKER = "<!-- Written by hsa release, which writes it anew: change the recipe, not this file. -->"
PATIENCE = 10.0
"""Seconds to wait for another run that is writing the index of the same tree."""

MAX_LINE = 1 << 16
"""The most bytes of a README line in memory at a time, while searching for the marker."""


EntryState = Literal["complete", "missing", "other", "damaged"]
"""The state of an entry in the tree: as the recipe says; not there; built differently from the recipe; damaged."""

_STATE_TEXT = {
    "missing": "not built yet",
    "other": "made otherwise than the recipe says, and left as it is",
    "damaged": "damaged, and left as it is",
}


@dataclass(frozen=True)
class Row:
    """An entry, its state, and its provenance if it is complete."""

    entry: RecipeEntry
    state: EntryState
    provenance: Provenance | None


def render(recipe: Recipe, rows: Sequence[Row]) -> dict[str, bytes]:
    """The bytes of both files, by name."""
    document = {
        "kind": KIND,
        "format": FORMAT,
        "title": recipe.title,
        "entries": [_entry_dict(row) for row in rows],
    }
    text = json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    return {INDEX: text.encode("ascii"), README: _readme(recipe, rows).encode("utf-8")}


def check_place(tree: Path) -> None:
    """Raise DestinationError if the tree holds a README.md or index.json that is not an earlier index."""
    for name, is_own in ((README, _is_readme), (INDEX, is_index)):
        path = tree / name
        if not (path.is_symlink() or path.exists()):
            continue
        if path.is_symlink() or not path.is_file() or not is_own(path):
            raise DestinationError(
                f"{path} is no index that hsa release wrote and would be replaced by one; move it away, or choose "
                f"another tree"
            )


def write(tree: Path, files: Mapping[str, bytes], *, sync: bool) -> bool:
    """Replace each file atomically, unless all are current. Return whether anything was written.

    Raises MachineError, or DestinationError if another run does not release the index.
    """
    check_place(tree)
    staging_path = hidden_sibling(tree / "index", STAGING)
    is_current = all(_has_bytes(tree / name, data) for name, data in files.items())
    if is_current and not fsio.exists(staging_path):
        return False
    tally, deadline = fsio.Tally(), time.monotonic() + PATIENCE
    while True:
        try:
            staging = StagingDirectory(staging_path, tree / INDEX, sync=sync)
            break
        except DestinationError:
            if time.monotonic() > deadline or not staging_path.is_dir():  # waiting does not remove a file of that name
                raise
            time.sleep(0.05)
    with staging:  # clears what a killed run left there
        if is_current:
            return False
        for name, data in files.items():
            staging.write(name, data, tally)
        for name in files:
            staging.publish_file(name, tree / name)
    return True


def _has_bytes(path: Path, data: bytes) -> bool:
    with suppress(OSError):
        return path.stat().st_size == len(data) and path.read_bytes() == data
    return False


def _is_readme(path: Path) -> bool:
    marker = MARKER.encode()
    with path.open("rb") as file:
        return any(line.rstrip(b"\r\n") == marker for line in iter(lambda: file.readline(MAX_LINE), b""))


def _entry_dict(row: Row) -> dict[str, Any]:
    entry = row.entry
    state = {"path": entry.path, "group": entry.group, "name": entry.name, "state": row.state}
    if row.provenance is None:
        return state
    return {**state, **entry_facts(row.provenance)}


def _readme(recipe: Recipe, rows: Sequence[Row]) -> str:
    complete = [row for row in rows if row.provenance is not None]
    families = list(dict.fromkeys(row.provenance.record.architecture for row in complete if row.provenance))
    families = families or [default()]
    methods = list(dict.fromkeys(map(_method, complete))) or [method_named(DEFAULT_METHOD)]
    composed = listed(dict.fromkeys(method.known_as or method.title for method in methods))
    title = recipe.title or f"{listed(family.title for family in families)} models composed with {composed}"
    citations = [text for text in dict.fromkeys(map(_citation, complete)) if text]
    tags = dict.fromkeys(tag for method in methods for tag in method.tags)
    sections = [_metadata(complete, families, tuple(tags)), MARKER, f"# {escape(title)}", _introduction(complete)]
    for group in dict.fromkeys(row.entry.group for row in complete):
        members = [row for row in complete if row.entry.group == group]
        sections += [f"## {escape(group)}", _table(members, citations)]
    incomplete = [row for row in rows if row.provenance is None]
    if incomplete:
        lines = [f"- `{code(row.entry.path)}`: {_STATE_TEXT[row.state]}" for row in incomplete]
        sections += ["## Not complete", "\n".join(lines)]
    if citations:
        sections.append("## Citations")
    for number, text in enumerate(citations, 1):
        sections.append(f"{number}.\n\n```bibtex\n{fence(text)}\n```")
    return "\n\n".join(sections) + "\n"


def _method(row: Row) -> AnyMethod:
    """The method of a complete entry."""
    assert row.provenance is not None
    return row.provenance.record.method


def _citation(row: Row) -> str:
    """The citation for a complete entry; empty if there is none."""
    return row.entry.card.get("citation", _method(row).citation)


def _heads(row: Row) -> str:
    """The number of heads that a complete entry merged; empty if its method merges whole tensors."""
    assert row.provenance is not None
    counts = entry_facts(row.provenance)
    return f"{counts['selected_heads']} of {counts['total_heads']}" if "selected_heads" in counts else ""


def _introduction(rows: Sequence[Row]) -> str:
    merged = "merged heads" if not rows or any(map(_heads, rows)) else "merged tensors"
    return f"""Each directory is a complete checkpoint that transformers loads, with a model card (`README.md`) and
its provenance (`hsa_merge.json`): sources, parameters, {merged}, and a digest of every file. `{INDEX}` says the
same as this page to programs."""


def _table(rows: Sequence[Row], citations: Sequence[str]) -> str:
    """The table of a group's models, with a column for every role and every number that any of them has."""
    records = [row.provenance.record for row in rows if row.provenance is not None]
    roles = tuple(dict.fromkeys(role for record in records for role in record.sources))
    numbers = [name for record in records for name, value in summary(record.parameters).items() if _is_number(value)]
    names = tuple(dict.fromkeys(numbers))
    heads = ("heads merged",) if any(map(_heads, rows)) else ()
    head = ("model", "role", *roles, *names, *heads, "adaptation context", "citation")
    return table(head, [_cells(row, roles, names, citations, heads=bool(heads)) for row in rows])


def _cells(
    row: Row, roles: Sequence[Role], names: Sequence[str], citations: Sequence[str], *, heads: bool
) -> tuple[str, ...]:
    assert row.provenance is not None
    entry, record, citation = row.entry, row.provenance.record, _citation(row)
    return (
        f"[{escape(entry.name)}]({entry.path}/{README})",
        escape(entry.card.get("role", "")),
        *(_source(record.sources[role].identity) if role in record.sources else "" for role in roles),
        *(_number(record.parameters[name]) if name in record.parameters else "" for name in names),
        *((_heads(row),) if heads else ()),
        escape(entry.card.get("adaptation_context", "")),
        str(1 + citations.index(citation)) if citation else "",
    )


def _source(identity: Identity) -> str:
    """The identity as text, and as a link for a repository on the Hub, whose name needs no escaping in a link."""
    revision = identity.revision
    text = f"`{code(identity.id)}`" + (f" at `{code(revision[:12])}`" if revision else "")
    if not is_hub_id(identity.id):
        return text
    place = f"/tree/{quote(revision, safe='')}" if revision else ""
    return f"[{text}](https://huggingface.co/{identity.id}{place})"


def _is_number(value: Any) -> bool:
    """Whether a parameter is a number or has numbers per tensor."""
    return isinstance(value, (int, float, dict)) and not isinstance(value, bool)


def _number(value: Any) -> str:
    return "per tensor" if isinstance(value, dict) else f"{value:g}"


def _metadata(rows: Sequence[Row], families: Sequence[Architecture], method_tags: Sequence[str]) -> str:
    sources = [
        source.identity.id for row in rows if row.provenance for source in row.provenance.record.sources.values()
    ]
    licenses = {row.entry.card["license"] for row in rows if "license" in row.entry.card}
    extra: dict[str, str | list[str]] = {"license": licenses.pop()} if len(licenses) == 1 else {}
    tags = [tag for family in families for tag in family.tags]
    return card.metadata(filter(is_hub_id, sources), extra, families[0].model_class({}).task, tags, method_tags)
