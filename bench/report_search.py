"""The report's tables of searches: beside the loop that people write, with and without racing, and by workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cases import CAVEATS
from figures import MIB, NOT_YET, Image, divided, measured_on, number, plain, rows_of, show, span, table
from rows import Row, newest

SEARCH, LOOP = "hsa search", "the loop"
WITH, WITHOUT = "with racing", "without racing"
ONE = "one process"
MOST_OF_LOOP, MOST_OUTSIDE, LEAST_WORKERS = 0.5, 0.05, 1.6
"""Limits: the search's time as a fraction of the loop's, the share of its time that is not decoding, and the speed-up
of two workers."""


def search_block(folder: Path, image: Image) -> list[str]:
    """A table for each measured case, and whether its limits are met."""
    every = newest(rows_of("search", folder), lambda row: (row["model"], row["set"], row["case"]))
    if not every:
        return [f"Searches are {NOT_YET}."]
    parts = [measured_on(every, lambda row: f"{row['model']} {row['case']}")]
    for case, (title, part) in CASES.items():
        rows = [row for row in every if row["case"] == case]
        for model, data in dict.fromkeys((row["model"], row["set"]) for row in rows):
            group = [row for row in rows if (row["model"], row["set"]) == (model, data)]
            first = group[0]
            what = (
                f"{plain(first['candidates'])} {title}, {plain(first['clips'])} clips of {plain(data)}, {plain(model)}"
            )
            parts += [f"**{what}:**", *part(group)]
    return [*parts, CAVEATS]


def beside_loop(rows: Sequence[Row]) -> list[str]:
    lines = [
        [row["way"], row["rounds"], show(number(row, "seconds"), ".1f"), span(row, "min_s", "max_s", ".1f"),
         share(_within(row)), share(_outside(row)), show(divided(number(row, "peak_bytes"), MIB), ".0f"), row["best"],
         rate(row), row["decoded"], row["raced"], row["note"]]
        for row in rows
    ]  # fmt: skip
    head = [
        "",
        "rounds",
        "seconds",
        "min to max",
        "not decoding (share of the trials' time)",
        "(of the whole program's)",
        "peak MiB",
    ]
    parts = [table([*head, "best merge", "WER % (95 %)", "decoded", "not decoded (racing)", "note"], lines)]
    search, loop = _of(rows, SEARCH), _of(rows, LOOP)
    times = divided(number(search, "seconds"), number(loop, "seconds"))
    wer, most, outside = number(search, "wer"), number(loop, "wer_high"), _within(search)
    if times is not None and wer is not None and most is not None and outside is not None:
        whole = share(_outside(search))
        said = (
            f"the search's time is {times:.2f} of the loop's (limit {MOST_OF_LOOP}): {met(times <= MOST_OF_LOOP)}",
            f"its best has {wer:.2f} % (limit {most:.2f} %, the end of the interval of the loop's best): "
            f"{met(wer <= most)}",
            f"{share(outside)} of the time of its trials ({whole} of the whole program's, start and writing included) "
            f"is neither decoding nor scoring (limit {share(MOST_OUTSIDE)}): {met(outside <= MOST_OUTSIDE)}",
        )
        parts.append("\n".join(f"- {text}" for text in said))
    return parts


def racing(rows: Sequence[Row]) -> list[str]:
    lines = [
        [row["way"], show(number(row, "seconds"), ".1f"), share(_outside(row)), row["decoded"], row["raced"],
         row["best"], rate(row), row["note"]]
        for row in rows
    ]  # fmt: skip
    head = ["", "seconds", "not decoding", "decoded", "not decoded (racing)", "winner", "WER % (95 %)", "note"]
    parts = [table(head, lines)]
    one, other = _of(rows, WITH), _of(rows, WITHOUT)
    if one is not None and other is not None:
        times = divided(number(one, "seconds"), number(other, "seconds"))
        same = one["best"] == other["best"]
        winner = "the same winner as" if same else "another winner than"
        parts.append(f"- racing took {show(times)} of the time and found {winner} decoding everything: {met(same)}")
    return parts


def workers(rows: Sequence[Row]) -> list[str]:
    one = per_minute(_of(rows, ONE))
    head = ["", "workers", "torch threads of each", "rounds", "seconds", "trials per minute", "speed-up"]
    lines, said = [], []
    for row in rows:
        rate_of = per_minute(row)
        times = divided(rate_of, one)
        lines.append(
            [row["way"], row["workers"], row["threads"], row["rounds"], show(number(row, "seconds"), ".1f"),
             show(rate_of), show(times)]
        )  # fmt: skip
        if row["way"] != ONE and times is not None:
            said.append(
                f"- {plain(row['way'])}: {times:.2f} times the trials per minute of one process (at least "
                f"{LEAST_WORKERS}): {met(times >= LEAST_WORKERS)}"
            )
    return [table(head, lines), *(["\n".join(said)] if said else [])]


CASES: dict[str, tuple[str, Callable[[Sequence[Row]], list[str]]]] = {
    "search": ("candidates", beside_loop),
    "racing": ("recorded settings", racing),
    "workers": ("candidates of a grid without racing", workers),
}


def met(is_met: bool) -> str:
    return "met." if is_met else "**missed**."


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def rate(row: Row) -> str:
    return f"{show(number(row, 'wer'))} ({span(row, 'wer_low', 'wer_high')})"


def per_minute(row: Row | None) -> float | None:
    candidates = number(row, "candidates")
    return None if candidates is None else divided(60 * candidates, number(row, "seconds"))


def _of(rows: Sequence[Row], way: str) -> Row | None:
    return next((row for row in rows if row["way"] == way), None)


def _within(row: Row | None) -> float | None:
    """The share of the time of trials that is not decoding."""
    return _left(number(row, "trials_s"), number(row, "decoding_s"))


def _outside(row: Row | None) -> float | None:
    """The share of the whole time that is not decoding."""
    return _left(number(row, "seconds"), number(row, "decoding_s"))


def _left(whole: float | None, part: float | None) -> float | None:
    return 1.0 - part / whole if whole and part is not None else None
