"""Checks that the sources of a search are still those with which its trials were scored."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hsa.errors import SourceChanged, SourceError
from hsa.evaluation.models import open_weights
from hsa.searches.sources import SearchSources
from hsa.sources.hub.client import Hub
from hsa.sources.hub.repository import find_id
from hsa.system import fsio


@fsio.map_os_errors()
def check_unchanged(sources: SearchSources, digests: Iterable[str]) -> None:
    """Read all sources again, and compare them with digests, given in the order of the sources' numbers.

    The digests are those of `open_weights`. Raises SourceChanged if a source now has other weights or small files, or
    can no longer be read.

    Example:
        >>> check_unchanged(sources, [digest for _, digest in study.request["sources"]])  # doctest: +SKIP
    """
    hub = Hub()
    for number, digest in zip(sources.numbers, digests, strict=True):
        path, reason = sources.path(number), ""
        try:
            found = open_weights(path if find_id(path) else Path(path).expanduser(), path, hub).digest
        except SourceError as error:
            found, reason = "", f" ({error})"
        if found != digest:
            raise SourceChanged(
                f"{path} has changed since the search began{reason}, so a merge would not be the model that was scored "
                f"and is not written; all trials are kept: restore the source, or search again in another output"
            )
