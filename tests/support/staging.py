"""What the tests of destinations share: a staged output, and an earlier one in its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import provenance_bytes, snapshot

import hsa
from hsa.errors import DestinationError
from hsa.system import fsio
from hsa.system.manifest import PROVENANCE
from hsa.system.publish import StagedOutput

Triple = dict[str, Path]


def refused(triple: Triple, output: str | Path, *, watched: Path, match: str) -> None:
    """The output is refused with and without overwrite, and nothing below `watched` changes."""
    before = snapshot(watched)
    for overwrite in (False, True):
        with pytest.raises(DestinationError, match=match):
            hsa.merge(**triple, output=output, overwrite=overwrite)
    assert snapshot(watched) == before


def thesis(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "thesis.tex").write_text("Years of work.\n")
    (directory / "figures").mkdir()
    (directory / "figures" / "one.pdf").write_bytes(b"%PDF-1.7\n")
    (directory / "latest").symlink_to("figures")
    return directory


def stage(destination: Path, content: bytes, *, overwrite: bool = False) -> None:
    """A smallest output, staged and published."""
    with StagedOutput(destination, overwrite=overwrite, sync=True) as staging:
        staging.write("model.safetensors", content, fsio.Tally())
        staging.write(PROVENANCE, provenance_bytes("model.safetensors"), fsio.Tally())
        staging.publish()
