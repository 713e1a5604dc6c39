"""Turn the entries of a manifest into a checked set of utterances: paths, ids, times and notes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

from hsa.errors import DataError, is_text, shown
from hsa.evaluation.utterance import DataSet, Utterance

MAX_UTTERANCES = 2_000_000
"""Maximum utterances of a set: at half a kilobyte each they take a gigabyte."""

PATHS_KEPT = 1024
"""Paths cached while a manifest is read, so that utterances of one recording share one path object."""


class Place(NamedTuple):
    """A position in a manifest."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}: line {self.line}"


class Audio(NamedTuple):
    """An audio file as a manifest names it: its absolute path, its text in the manifest, and the line of that text.

    `is_outside` says that the file is outside the manifest's folder.
    """

    path: Path
    written: str
    line: int
    is_outside: bool


class Collector:
    """Collects the utterances of one set as they are read. Relative audio paths are relative to `folder`.

    `limit` is the number of utterances wanted. A reader stops once `is_full` is true.

    Example:
        >>> collector = Collector(Path("/data"))
        >>> place = Place(Path("/data/test.tsv"), 2)
        >>> collector.add(place, collector.audio(place, "a.wav"), "Good morning.")
        >>> collector.finish("test", Path("/data/test.tsv")).utterances[0].audio
        PosixPath('/data/a.wav')
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = os.path.normpath(os.path.abspath(folder))
        self.notes: list[str] = []
        self._inside = self.folder.rstrip("/") + "/"
        self._utterances: list[Utterance] = []
        self._ids: set[str] = set()
        self._outside = 0
        self._first_outside = ""
        self._limit = limit
        self._paths: dict[str, Path] = {}

    @property
    def is_full(self) -> bool:
        """Whether the wanted number of utterances has been added."""
        return self._limit is not None and len(self._utterances) >= self._limit

    def audio(self, place: Place, written: str) -> Audio:
        """The audio file that a manifest names at this place. DataError if the name is empty."""
        if not written:
            raise DataError(f"{place} names no audio file")
        path = os.path.join(self.folder, written)
        may_leave = written[0] == "/" or ".." in written
        is_outside = may_leave and not os.path.normpath(path).startswith(self._inside)
        if path not in self._paths:
            if len(self._paths) >= PATHS_KEPT:
                self._paths.clear()
            self._paths[path] = Path(path)
        return Audio(self._paths[path], written, place.line, is_outside)

    def add(
        self,
        place: Place,
        audio: Audio,
        text: str,
        *,
        id: str | None = None,
        speaker: str | None = None,
        domain: str | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> None:
        """Add an utterance. The default id is the path as written, with the times if there are any. Utterances whose
        audio is outside the folder are counted for the notes.

        Raises DataError for a duplicate id, for times that do not form a valid range, and for too many utterances.
        """
        check_times(place, start, end)
        name = id or _default_id(audio.written, start, end)
        if name in self._ids:
            raise DataError(f"{place}: {_twice(name, id)}")
        if len(self._utterances) >= MAX_UTTERANCES:
            raise DataError(f"{place}: a set holds at most {MAX_UTTERANCES} utterances; split it into sets")
        self._ids.add(name)
        self._utterances.append(Utterance(name, audio.path, text, speaker or None, domain or None, start, end))
        if audio.is_outside:
            self._outside += 1
            self._first_outside = self._first_outside or f"{shown(audio.written, 200)} at line {audio.line}"

    def finish(self, name: str, path: Path) -> DataSet:
        """Return the set. Raises DataError if it is empty."""
        if not self._utterances:
            raise DataError(f"{path} holds no utterance; expected at least one with its audio and its text")
        if self._outside:
            self.notes.append(
                f"{self._outside} of {len(self._utterances)} utterances have their audio outside of {self.folder}, "
                f"first {self._first_outside}"
            )
        return DataSet(name, path, tuple(self._utterances), tuple(self.notes))


def _default_id(written: str, start: float | None, end: float | None) -> str:
    if start is None and end is None:
        return written
    return f"{written}:{start or 0.0}-{'' if end is None else end}"


def _twice(name: str, given: str | None) -> str:
    if given:
        return f"id {shown(name, 200)} occurs a second time; ids must differ within a set"
    return f"{shown(name, 200)} occurs a second time; give the rows ids, or times that differ"


def check_times(place: Place | str, start: float | None, end: float | None) -> None:
    """Raise DataError unless the times, in seconds, are finite, not negative and in order.

    Example:
        >>> check_times("line 2", 0.5, 1.25)
    """
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise DataError(f"{place}: {name} is {shown(value)}, expected seconds of at least 0")
    if end is not None and end <= (start or 0.0):
        raise DataError(f"{place}: end is {end}, expected more than the start, {start or 0.0}, in seconds")


def check_text(place: Place, value: str, what: str) -> str:
    """Return the value. DataError if it contains NUL or an unpaired surrogate, which cannot be written again.

    Example:
        >>> check_text(Place(Path("a.jsonl"), 1), "Grüße", "text")
        'Grüße'
    """
    if "\0" in value or not is_text(value):
        raise DataError(f"{place}: {what} {shown(value)} is no valid text: it holds NUL or half of a surrogate pair")
    return value
