"""The candidates' transcripts of the dev sets of a search, stored in its output."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hsa.system import fsio
from hsa.system.digests import digest_of

TRANSCRIPTS = "transcripts"

ABOUT = ("dev", "seed", "decoding", "anchor", "versions")
"""The parts of a request that determine texts besides the weights: the utterances and their audio, their order, the
decoding options, the small files with which all candidates are decoded, and the versions of the libraries."""


class Transcripts:
    """The texts of candidates, one file for each digest of weights: `{"key": ..., "weights": ..., "texts": [...]}`.

    `request` is that of the search. Its parts in `ABOUT` determine the texts besides the weights. Texts are in the
    order of the search. A file is only replaced by one with more of them.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any]) -> None:
        self._folder = folder / TRANSCRIPTS
        about = {name: request[name] for name in ABOUT}
        self._key = digest_of(json.dumps(about, sort_keys=True).encode("utf-8"))
        with fsio.map_write_errors(self._folder):
            self._folder.mkdir(exist_ok=True)

    def put(self, weights: str, texts: Sequence[str]) -> None:
        if not weights or len(texts) <= len(self.get(weights)):
            return
        path = self._path(weights)
        document = {"key": self._key, "weights": weights, "texts": list(texts)}
        data = json.dumps(document, ensure_ascii=False)
        part = path.with_suffix(".part")
        with fsio.map_write_errors(part):
            part.write_bytes(data.encode("utf-8", "surrogatepass"))
            os.replace(part, path)

    def get(self, weights: str) -> tuple[str, ...]:
        """The texts of the model with these weights; empty if they are unknown."""
        try:
            document = json.loads(self._path(weights).read_bytes().decode("utf-8", "surrogatepass"))
        except (OSError, ValueError):
            return ()
        if not isinstance(document, dict) or [document.get(key) for key in ("key", "weights")] != [self._key, weights]:
            return ()
        texts = document.get("texts")
        return tuple(texts) if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else ()

    def _path(self, weights: str) -> Path:
        return self._folder / f"{self._key[:8]}-{weights[:32]}.json"
