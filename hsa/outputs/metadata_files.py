"""Writes the files beside the weights: configs, tokenizer files, index, card, and the provenance with all digests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from hsa.outputs.record import Record
from hsa.sources.checkpoint import CONFIG
from hsa.system import fsio
from hsa.system.digests import digest_of
from hsa.system.manifest import PROVENANCE
from hsa.system.publish import StagedOutput

CARD = "README.md"


def write_metadata_files(
    staging: StagedOutput,
    record: Record,
    small_files: Mapping[str, bytes],
    weights: Mapping[str, str | None],
    *,
    digest: bool,
    tally: fsio.Tally,
) -> None:
    """Write the small files, the card, and last the provenance, which contains the digests of all other files.

    `weights` are the weights files that are already written, with their digests (None where left out).
    """
    for name, data in metadata_files(record, small_files, weights, digest=digest):
        staging.write(name, data, tally)


def metadata_files(
    record: Record, small_files: Mapping[str, bytes], weights: Mapping[str, str | None], *, digest: bool
) -> Iterator[tuple[str, bytes]]:
    """The files that `write_metadata_files` writes, in its order: name and bytes."""
    from hsa.outputs import card

    config = json.loads(small_files[CONFIG])
    files = {**small_files, CARD: card.render(record, [*small_files, *weights, CARD, PROVENANCE], config)}
    digests = dict(weights)
    for name, data in files.items():
        yield name, data
        digests[name] = digest_of(data) if digest else None
    yield PROVENANCE, record.with_files(digests)
