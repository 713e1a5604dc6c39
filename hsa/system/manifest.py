"""Read and write `hsa_merge.json` as a file: its bytes, its own digest, and the names of the files that it lists.

`hsa.outputs.provenance` defines what the record means. This module has what must be known before an output is replaced.
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
"""The versions of the format that are read."""

DIGEST = "digest"

MAX_PROVENANCE = 8 << 20
"""The largest provenance file that is read, in bytes. With all attention tensors merged, large-v3's is under 1 MB."""

MAX_PROVENANCE_MARKS = 1 << 19
"""The most brackets, braces and commas of a provenance file: each head has two, for its score and where it is selected.
Files just under both limits take at most 230 MiB and 5 s to read and check (measured, 2 cores)."""

BLANK_DIGEST = "0" * 64
"""A placeholder for a digest that is not known yet, of the same length."""

LONGEST_NUMBER = 1.2345678901234567e-100
"""A placeholder for a number that is not known yet: no number is written with more digits."""


def read_bytes(directory: Path) -> bytes:
    """Read an output's provenance file; ProvenanceError if it is missing, or too large to be read."""
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
    """Parse the bytes of a provenance file, and check its digest and formatting.

    Raises ProvenanceError for a document of another format, and if any byte is not what was written.
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
    """Return the names of an output's files by its own record, including the record's own file.

    Raises ProvenanceError if the record is missing, damaged or of another version: such a record lists nothing.
    """
    path = directory / PROVENANCE
    files = parse(read_bytes(directory), str(path)).get("files")
    if not isinstance(files, dict):
        raise ProvenanceError(f"{path}: files must be an object, found {shown(files)}; it is no provenance of hsa")
    return frozenset((*files, PROVENANCE))


def check_fits(document: Mapping[str, Any], heads: int) -> None:
    """Raise RequestError if a document would be larger than `parse` accepts, before anything is computed.

    Its length is an upper bound, from the line breaks and spaces that `render` puts at each mark.
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
    """Raise ProvenanceError unless the document's own digest is right."""
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
    """Serialize the document in its only valid form, so that a reader can detect any other bytes."""
    return (json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def document_digest(document: Mapping[str, Any]) -> str:
    """Return BLAKE3 of the document's canonical form (sorted keys, no spaces), without its own digest."""
    rest = {key: value for key, value in document.items() if key != DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return digest_of(text.encode("ascii"))
