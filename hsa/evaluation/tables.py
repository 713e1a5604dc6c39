"""Read tables of utterances: .tsv, .csv and .jsonl, with a column for the audio and one for the text.

Cells of .tsv are read literally, including quotation marks, as Common Voice writes them; .csv is RFC 4180.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hsa.errors import DataError, listed, shown
from hsa.evaluation.collector import Collector, Place, check_text
from hsa.evaluation.lines import read_lines

AUDIO = ("file", "path", "audio", "file_name")
TEXT = ("text", "sentence", "transcript", "transcription")
OPTIONAL = ("id", "speaker", "domain", "start", "end")

METADATA = ("metadata.csv", "metadata.jsonl")
"""Names of the tables of an audio folder."""

MAX_ROW_LINES = 1000
"""Maximum lines of one row of a .csv, whose quoted cells may contain line breaks."""

MAX_COLUMNS = 1000
"""Maximum columns of a table."""


TRANSCRIPTS = "transcripts.tsv"
"""A table with the columns file and text. Its header row is optional."""


def read_table(path: Path, audio: Sequence[str] = AUDIO, *, limit: int | None = None) -> Collector:
    """Read the utterances of a table, whose format is that of its file ending. `audio` are the accepted names of the
    audio column. With a `limit`, only that many utterances are read.

    A table of two columns may lack a header row if its first row names an existing file; the notes then say so.

    Raises DataError, which names the line, if a column is missing or duplicate, and for a bad row.

    Example:
        >>> read_table(Path("test.tsv")).finish("test", Path("test.tsv"))  # doctest: +SKIP
    """
    kind = path.suffix.lower()
    collector = Collector(path.parent, limit)
    if kind == ".jsonl":
        _add_objects(collector, path, audio)
    elif kind in _ROWS:
        _add_rows(collector, path, _ROWS[kind](path), audio)
    else:
        raise DataError(f"{path} ends in {shown(kind)}, expected a table that ends in .tsv, .csv or .jsonl")
    return collector


# --- .tsv and .csv ----------------------------------------------------------------------------------------------


def _tsv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in read_lines(path):
        cells = line.rstrip("\r\n").split("\t")
        if cells != [""]:
            yield number, cells


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield rows with the number of their first line."""
    last = 0  # the last line of the previous row
    now = 0

    def lines() -> Iterator[str]:
        nonlocal now
        for number, line in read_lines(path):
            if number - last > MAX_ROW_LINES:
                raise DataError(
                    f"{Place(path, last + 1)} begins a row of more than {MAX_ROW_LINES} lines: close its quotes"
                )
            now = number
            yield line

    reader = csv.reader(lines(), strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{Place(path, now)} is no row of a .csv: {error}; write cells as RFC 4180 says") from error
        if cells is None:
            return
        if cells:
            yield last + 1, cells
        last = now


_ROWS: dict[str, Callable[[Path], Iterator[tuple[int, list[str]]]]] = {".tsv": _tsv_rows, ".csv": _csv_rows}


def _add_rows(
    collector: Collector, path: Path, rows: Iterator[tuple[int, list[str]]], audio_names: Sequence[str]
) -> None:
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path} is empty, expected a row of column names and then utterances")
    number, cells = first
    names = [cell.strip().casefold() for cell in cells]
    headless = _is_headless(collector, path, cells, {*audio_names, *TEXT, *OPTIONAL} & set(names))
    if headless:
        names = ["file", "text"]
        if path.name != TRANSCRIPTS:
            collector.notes.append(f"{path} has no column names: its two columns are taken as file and text")
    columns = _columns(Place(path, number), names, audio_names)
    if headless:
        _add_row(collector, Place(path, number), cells, columns, len(names))
    while not collector.is_full and (row := next(rows, None)) is not None:
        number, cells = row
        _add_row(collector, Place(path, number), cells, columns, len(names))


def _is_headless(collector: Collector, path: Path, cells: list[str], column_names: set[str]) -> bool:
    """Whether a table has no header row: two cells, neither a column's name, the first an existing file."""
    if len(cells) != 2 or column_names or path.name in METADATA:
        return False
    return path.name == TRANSCRIPTS or os.path.isfile(os.path.join(collector.folder, cells[0]))


def _columns(place: Place, names: list[str], audio_names: Sequence[str]) -> dict[str, int]:
    if len(names) > MAX_COLUMNS:
        raise DataError(f"{place} has {len(names)} columns, at most {MAX_COLUMNS} are read")
    places = {"audio": _only(place, names, audio_names), "text": _only(place, names, TEXT)}
    for name in OPTIONAL:
        if names.count(name) > 1:
            raise DataError(f"{place} names the column {name} {names.count(name)} times")
        if name in names:
            places[name] = names.index(name)
    return places


def _only(place: Place, names: Sequence[str], allowed: Sequence[str]) -> int:
    """The index of the only column that has one of these names."""
    found = [number for number, name in enumerate(names) if name in allowed]
    if len(found) != 1:
        which = (
            f"{listed([names[number] for number in found])} are given" if found else f"found {shown(list(names), 200)}"
        )
        raise DataError(f"{place}: expected one column named {listed(allowed, 'or')}, {which}")
    return found[0]


def _add_row(collector: Collector, place: Place, cells: list[str], columns: dict[str, int], width: int) -> None:
    if len(cells) != width:
        raise DataError(f"{place} has {len(cells)} cells, expected {width}, as many as there are columns")
    row = {name: cells[number] for name, number in columns.items()}
    _add(collector, place, row.pop("audio"), row.pop("text"), row)


# --- .jsonl -------------------------------------------------------------------------------------------------------


def _add_objects(collector: Collector, path: Path, audio_names: Sequence[str]) -> None:
    audio = text = None
    for number, line in read_lines(path):
        if not line.strip():
            continue
        place = Place(path, number)
        row = _object(place, line)
        if audio is None or text is None:
            names = list(row)
            audio, text = (names[_only(place, names, allowed)] for allowed in (audio_names, TEXT))
        for name in (audio, text):
            if not isinstance(row.get(name), str):
                raise DataError(f"{place}: {name} is {shown(row.get(name))}, expected a text")
        if "\\u" in line:  # only an escape can add NUL or an unpaired surrogate
            for name in (audio, text, *OPTIONAL):
                if isinstance(row.get(name), str):
                    check_text(place, row[name], name)
        _add(collector, place, row[audio], row[text], row)
        if collector.is_full:
            return


def _object(place: Place, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{place} is not valid JSON ({reason}), expected one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{place} is {shown(row)}, expected a JSON object")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in pairs:
        if name in row:
            raise ValueError(f"it names {shown(name)} twice")
        row[name] = value
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which JSON does not have")


# --- both ---------------------------------------------------------------------------------------------------------


def _add(collector: Collector, place: Place, audio: str, text: str, row: Mapping[str, Any]) -> None:
    collector.add(
        place,
        collector.audio(place, audio),
        text,
        id=_word(place, row, "id"),
        speaker=_word(place, row, "speaker"),
        domain=_word(place, row, "domain"),
        start=seconds(place, "start", row.get("start")),
        end=seconds(place, "end", row.get("end")),
    )


def _word(place: Place, row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= 64:
        return str(value)
    raise DataError(f"{place}: {name} is {shown(value)}, expected a text")


def seconds(place: Place, name: str, value: object) -> float | None:
    """Parse seconds from a number or its text; None if there is none. Raises DataError for anything else.

    Example:
        >>> seconds(Place(Path("a.tsv"), 2), "start", "1.25")
        1.25
    """
    if value is None or value == "":
        return None
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            pass
        else:
            if not isinstance(value, str) or "_" not in value:  # Python would accept 1_000
                return number
    raise DataError(f"{place}: {name} is {shown(value)}, expected seconds such as 1.25")
