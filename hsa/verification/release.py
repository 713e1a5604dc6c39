"""Verify the directory of a release: each output, and its entry in index.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from hsa.errors import HsaError, RequestError, shown
from hsa.outputs.provenance import Provenance, changed_keys
from hsa.outputs.provenance import load as load_provenance
from hsa.outputs.release_index import INDEX, README, entry_facts
from hsa.sources.safetensors import MAX_HEADER
from hsa.system.fsio import SourceFile
from hsa.system.manifest import PROVENANCE
from hsa.system.strict_json import load_json
from hsa.verification.collection import Verify, add_member_report, open_index, read_in_pieces
from hsa.verification.context import SourcePaths, VerifyContext
from hsa.verification.report import VerifyResult


def verify_release(
    directory: Path, source_paths: SourcePaths | None, context: VerifyContext, verify: Verify
) -> VerifyResult:
    """Check each output of a release with `verify`, and its entry in index.json. Raises RequestError if given
    sources."""
    if source_paths is not None:
        raise RequestError(
            f"{directory} is a release, each output of which has sources of its own: run hsa release with its recipe "
            f"again, which compares each with its sources, or verify one output"
        )
    reports = []
    entries = list(_index_entries(directory, context))
    paths = {path for path, _ in entries}
    for path, entry in entries:
        if entry.get("state") != "complete":
            context.notes.append(f"{path} is listed as {shown(entry.get('state'))}, and was not looked at")
            continue
        if not (directory / path).is_dir() or _has_link(directory, path):
            context.problems.add(path, "is listed as complete, and is no directory there")
            continue
        report = verify(directory / path, None)
        reports.append(report)
        add_member_report(path, report, context)
        with suppress(HsaError):  # the output's own verification has reported it already
            _compare_entry(path, entry, load_provenance(directory / path), context)
    unlisted = sorted(set(_outputs(directory)) - paths)
    if unlisted:
        context.notes.append(
            f"{len(unlisted)} outputs that {INDEX} does not list were not looked at, such as {shown(unlisted[0])}"
        )
    context.notes.append(f"{README} of the release was not compared, for its recipe says what it holds")
    return VerifyResult(None, sum(report.files for report in reports), None, tuple(reports))


def _index_entries(directory: Path, context: VerifyContext) -> Iterator[tuple[str, dict[str, Any]]]:
    """The path and content of each entry of index.json; repeated paths are skipped."""
    paths: set[str] = set()
    with ExitStack() as stack:
        source = open_index(directory, INDEX, context, stack)
        try:
            for entry_text in _entry_texts(source) if source is not None else ():
                entry = load_json(entry_text, str(directory / INDEX), "an entry")
                path = entry["path"]
                plain = PurePosixPath(path)
                if plain.is_absolute() or str(plain) != path or not 1 <= len(plain.parts) <= 2 or ".." in plain.parts:
                    raise ValueError(f"an entry has the path {shown(path)}; expected group/name")
                if path not in paths:
                    paths.add(path)
                    yield path, entry
        except (HsaError, KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            context.problems.add(INDEX, f"{reason}; it is no index that hsa release wrote")


def _entry_texts(source: SourceFile) -> Iterator[bytes]:
    """The JSON of each entry. The index is read in pieces, since it may be of any size.

    hsa writes it with an indent of one space per level. Raises ValueError if it is laid out otherwise, or if an entry
    is larger than any that hsa writes.
    """
    rest, ended, size = b"", False, 0
    entry_lines: list[bytes] = []
    for piece in read_in_pieces(source):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if entry_lines or line == b"  {":
                entry_lines.append(line)
                size += len(line) + 1
            if entry_lines and line in (b"  }", b"  },"):
                yield b"\n".join(entry_lines).rstrip(b",")
                entry_lines, size = [], 0
            ended = line == b"}"
        if len(rest) + size > MAX_HEADER:
            raise ValueError(f"an entry has more than {MAX_HEADER} bytes")
    if not ended or entry_lines or rest:
        raise ValueError("it does not end as an index does")


def _has_link(directory: Path, path: str) -> bool:
    parts = PurePosixPath(path).parts
    return any(directory.joinpath(*parts[: count + 1]).is_symlink() for count in range(len(parts)))


def _compare_entry(path: str, entry: Mapping[str, Any], provenance: Provenance, context: VerifyContext) -> None:
    expected = entry_facts(provenance)
    unlike = changed_keys({key: entry.get(key) for key in expected}, expected)
    if unlike:
        context.problems.add(INDEX, f"its {', '.join(unlike)} of {path} are not what the output's record says")


def _outputs(directory: Path) -> Iterator[str]:
    """Relative paths of the outputs of a release, at most two levels down."""
    with suppress(OSError):
        for depth in ("*", "*/*"):
            for place in sorted(directory.glob(f"{depth}/{PROVENANCE}")):
                yield place.parent.relative_to(directory).as_posix()
