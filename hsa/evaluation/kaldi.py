"""Read a Kaldi data directory: wav.scp and text, and segments and utt2spk if they exist.

Only file names are read from wav.scp. Kaldi also runs commands from it; here a command is refused and never run.
Source: https://kaldi-asr.org/doc/data_prep.html
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from hsa.errors import DataError, listed, shown
from hsa.evaluation.collector import MAX_UTTERANCES, Audio, Collector, Place
from hsa.evaluation.lines import read_lines
from hsa.evaluation.tables import seconds

_SPACES = re.compile(r"[ \t]+")

WHOLE = "-1"
"""The end that Kaldi writes for a segment that extends to the end of the recording."""


class _Segment(NamedTuple):
    place: Place
    recording: str
    start: float | None
    end: float | None


def read_kaldi(folder: Path, *, limit: int | None = None) -> Collector:
    """Read the utterances of a Kaldi data directory, in the order of its file text.

    Recordings and segments without a text are left out and counted in the notes. With a `limit`, only that many
    utterances are read. Entries of other utterances are then neither kept nor counted.

    Raises DataError, which names file and line, for a command in wav.scp, a text without audio, or an utterance that is
    missing from an existing utt2spk.

    Example:
        >>> read_kaldi(Path("data/test")).finish("test", Path("data/test"))  # doctest: +SKIP
    """
    collector = Collector(folder, limit)
    wanted = None if limit is None else _first_names(folder / "text", limit)
    segments = _segments(folder / "segments", wanted) if os.path.lexists(folder / "segments") else None
    heard = wanted if wanted is None or segments is None else {each.recording for each in segments.values()}
    recordings = _recordings(folder / "wav.scp", collector, heard)
    speakers = _speakers(folder / "utt2spk", wanted) if os.path.lexists(folder / "utt2spk") else None
    used: set[str] = set()
    count = 0
    for place, utterance, text in _entries(folder / "text", "a text", may_be_empty=True):
        segment = _segment(place, utterance, segments)
        recording = recordings.get(segment.recording)
        if recording is None:
            raise DataError(f"{segment.place}: {shown(segment.recording, 200)} is not in wav.scp")
        if speakers is not None and utterance not in speakers:
            raise DataError(f"{place}: {shown(utterance, 200)} has no speaker in utt2spk")
        collector.add(
            place,
            recording,
            text,
            id=utterance,
            speaker=speakers[utterance] if speakers is not None else None,
            start=segment.start,
            end=segment.end,
        )
        used.add(segment.recording)
        count += 1
        if collector.is_full:
            return collector
    _note_unused(collector, recordings, used, segments, count)
    return collector


def _first_names(path: Path, limit: int) -> set[str]:
    return {name for _, name, _ in islice(_entries(path, "a text", may_be_empty=True), limit)}


def _note_unused(
    collector: Collector,
    recordings: dict[str, Audio],
    used: set[str],
    segments: dict[str, _Segment] | None,
    count: int,
) -> None:
    unused = len(recordings) - len(used)
    if unused:
        collector.notes.append(f"{unused} of {len(recordings)} recordings in wav.scp have no text and are left out")
    if segments is not None and len(segments) > count:
        collector.notes.append(f"{len(segments) - count} of {len(segments)} segments have no text and are left out")


def _segment(place: Place, utterance: str, segments: dict[str, _Segment] | None) -> _Segment:
    if segments is None:
        return _Segment(place, utterance, None, None)
    if utterance not in segments:
        raise DataError(f"{place}: {shown(utterance, 200)} is not in segments")
    return segments[utterance]


def _recordings(path: Path, collector: Collector, wanted: Collection[str] | None) -> dict[str, Audio]:
    recordings: dict[str, Audio] = {}
    for place, name, value in _entries(path, "a file"):
        if value.startswith("|") or value.endswith("|"):
            raise DataError(
                f"{place} is a command, {shown(value)}; commands are never run: write the audio to a file and name that"
            )
        if wanted is not None and name not in wanted:
            continue
        if name in recordings:
            raise DataError(f"{place}: {shown(name, 200)} occurs a second time")
        recordings[name] = collector.audio(place, value)
    return recordings


def _segments(path: Path, wanted: Collection[str] | None) -> dict[str, _Segment]:
    segments: dict[str, _Segment] = {}
    for place, name, value in _entries(path, "a recording, a start and an end"):
        if wanted is not None and name not in wanted:
            continue
        fields = _SPACES.split(value)
        if len(fields) != 3:
            raise DataError(f"{place} has {len(fields) + 1} fields, expected utterance, recording, start and end")
        if name in segments:
            raise DataError(f"{place}: {shown(name, 200)} occurs a second time")
        recording, start, end = fields
        until = None if end in (WHOLE, "-1.0") else seconds(place, "end", end)
        segments[name] = _Segment(place, recording, seconds(place, "start", start), until)
    return segments


def _speakers(path: Path, wanted: Collection[str] | None) -> dict[str, str]:
    speakers: dict[str, str] = {}
    for place, name, value in _entries(path, "a speaker"):
        if wanted is not None and name not in wanted:
            continue
        if _SPACES.search(value):
            raise DataError(f"{place} has more than two fields, expected an utterance and a speaker")
        if name in speakers:
            raise DataError(f"{place}: {shown(name, 200)} occurs a second time")
        speakers[name] = value
    return speakers


def _entries(path: Path, what: str, *, may_be_empty: bool = False) -> Iterator[tuple[Place, str, str]]:
    """Yield the first field of each line and the rest of the line."""
    for number, line in read_lines(path):
        if number > MAX_UTTERANCES:
            raise DataError(f"{path} has more than {MAX_UTTERANCES} lines, expected fewer; split it into sets")
        fields = _SPACES.split(line.strip(" \t\r\n"), maxsplit=1)
        if fields == [""]:
            continue
        if len(fields) == 1 and not may_be_empty:
            raise DataError(f"{Place(path, number)} has one field, {shown(fields[0])}, expected a name and {what}")
        yield Place(path, number), fields[0], fields[1] if len(fields) > 1 else ""


FILES = ("wav.scp", "text")
"""The files that a Kaldi directory must have."""


def check_files(folder: Path) -> None:
    """Raise DataError if a directory with wav.scp lacks a required file."""
    lacking = [name for name in FILES if not os.path.lexists(folder / name)]
    if lacking:
        raise DataError(f"{folder} has no file {listed(lacking)}, expected {listed(FILES)} in a Kaldi directory")
