"""Read and write `hsa_merge.json` as a file: its bytes, its own digest, and the names of the files that it lists.

What the record in it means is `hsa.outputs.provenance`'s subject. Here is what must be known before an output is
replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hsa.errors import HeaderError, ProvenanceError, RequestError, shown
from hsa.system.digests import digest_of
from hsa.system.fsio import SourceFile, Tally
from hsa.system.strict_json import count_marks, load_json

PROVENANCE = "hsa_merge.json"
"""The file that marks a directory as an output of this program."""

FORMAT = 2
"""The version of the format that is written."""

FORMATS = (1, 2)
"""Those that are read."""

DIGEST = "digest"

MAX_PROVENANCE = 8 << 20
"""Bytes; the largest provenance that is read. Of large-v3 with every attention tensor merged it has under 1 MB."""

MAX_PROVENANCE_MARKS = 1 << 19
"""Brackets, braces and commas of one: each head has two, for its score and where it is selected. Files just under both
limits take at most 230 MiB and 5 s to read and check (measured, 2 cores)."""

BLANK_DIGEST = "0" * 64
"""Stands for a digest that is not known yet, at its length."""

LONGEST_NUMBER = 1.2345678901234567e-100
"""Stands for a number that is not known yet: none is written with more digits."""


def read_bytes(directory: Path) -> bytes:
    """The bytes of an output's provenance; ProvenanceError where there is none, or a larger one than is read."""
    path = directory / PROVENANCE
    if not path.is_file():
        raise ProvenanceError(f"{directory} holds no {PROVENANCE}; expected an output of hsa")
    source = SourceFile(path, "output", Tally())
    try:
        if source.size > MAX_PROVENANCE:
            raise ProvenanceError(f"{path} has {source.size} bytes, at most {MAX_PROVENANCE} are read")
        return source.read(source.size)
    finally:
        source.close()


def parse(text: bytes, where: str) -> dict[str, Any]:
    """The document in the bytes of a provenance file, its digest and its way of writing checked.

    Raises ProvenanceError for a document of another format, and where any byte is not what was written.
    """
    try:
        document = load_json(text, where, "provenance", MAX_PROVENANCE_MARKS)
    except HeaderError as error:
        raise ProvenanceError(str(error)) from error
    if type(document.get("format")) is not int or document["format"] not in FORMATS:
        raise ProvenanceError(
            f"{where}: format is {shown(document.get('format'))}, this version reads "
            f"{' and '.join(map(str, FORMATS))}; use the version of hsa that wrote it"
        )
    check_digest(document, where)
    if render(document) != text:
        raise ProvenanceError(f"{where}: its bytes are not as hsa writes them; something rewrote or damaged it")
    return document


def listed_files(directory: Path) -> frozenset[str]:
    """The names of the files of an output by its own record, the record's file included.

    Raises ProvenanceError where there is no record, or one that is damaged or of another version: it lists nothing.
    """
    path = directory / PROVENANCE
    files = parse(read_bytes(directory), str(path)).get("files")
    if not isinstance(files, dict):
        raise ProvenanceError(f"{path}: files must be an object, found {shown(files)}; it is no provenance of hsa")
    return frozenset((*files, PROVENANCE))


def check_fits(document: Mapping[str, Any], heads: int) -> None:
    """RequestError where a document would be larger than what `parse` reads, before anything is computed.

    Its length is bounded from above, by the line breaks and spaces that `render` puts at each mark.
    """
    text = b"" if heads > MAX_PROVENANCE_MARKS // 2 else json.dumps(document, separators=(",", ":")).encode("ascii")
    mark_count = max(count_marks(text), 2 * heads)
    size = len(text) + 12 * mark_count
    if mark_count > MAX_PROVENANCE_MARKS or size > MAX_PROVENANCE:
        raise RequestError(
            f"{PROVENANCE} of this merge would list {heads} heads in up to {size} bytes with {mark_count} brackets, "
            f"braces and commas, and at most {MAX_PROVENANCE} and {MAX_PROVENANCE_MARKS} are read again; choose fewer "
            f"target tensors, fewer heads, or larger weights files"
        )


def check_digest(document: Mapping[str, Any], where: str) -> None:
    """ProvenanceError unless the document's own digest is right."""
    try:
        expected = document_digest(document)
    except (ValueError, RecursionError) as error:
        raise ProvenanceError(f"{where}: {error}; it is no provenance that hsa wrote") from error
    if document.get(DIGEST) != expected:
        raise ProvenanceError(
            f"{where}: its digest is {shown(document.get(DIGEST))} and its content gives {expected}; something changed "
            f"or damaged it"
        )


def render(document: Mapping[str, Any]) -> bytes:
    """The one way the document is written, so that a reader can tell any other bytes from it."""
    return (json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def document_digest(document: Mapping[str, Any]) -> str:
    """BLAKE3 of the document's canonical form (sorted keys, no spaces), its own digest left out."""
    rest = {key: value for key, value in document.items() if key != DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return digest_of(text.encode("ascii"))
