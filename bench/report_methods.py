"""The report's tables of methods: side by side with mergekit, and word error rates."""

from __future__ import annotations

from pathlib import Path

from cases import CAVEATS
from figures import NOT_YET, Image, divided, measured_on, number, of_shape, plain, rows_of, show, span, table
from rows import Row, newest

OURS, MERGEKIT = "hsa merge", "mergekit"


def methods_block(folder: Path, image: Image) -> list[str]:
    """Each method of ours and of mergekit, with the ratio of their medians."""
    every = newest(rows_of("methods", folder), lambda row: (row["shape"], row["dtype"], row["method"]))
    if not every:
        return [f"Methods beside mergekit are {NOT_YET}."]
    lines = []
    for row in every:
        ours = _of(every, row, OURS)
        times = divided(number(row, "median_s"), number(ours, "median_s"))
        lines.append(
            [of_shape(row), row["method"], row["program"], row.get("rounds"), show(number(row, "median_s")),
             span(row, "min_s", "max_s"), show(times) if row is not ours else "",
             show(divided(number(row, "peak_bytes"), 2.0**20), ".0f"),
             show(divided(number(row, "bytes_read_of_one"), number(row, "model_bytes")))]
        )  # fmt: skip
    head = ["model", "method", "program", "rounds", "median s", "min to max s", "times hsa merge", "peak MiB"]
    return [measured_on(every, of_shape), table([*head, "times the first model's bytes read"], lines)]


def _of(every: list[Row], row: Row, program: str) -> Row | None:
    same = ("shape", "dtype", "method", "run")
    return next(
        (each for each in every if each["program"] == program and all(each[key] == row[key] for key in same)), None
    )


def wer_methods_block(folder: Path, image: Image) -> list[str]:
    """A line for each method and model, and a column for each set of clips."""
    every = newest(rows_of("wer_methods", folder), lambda row: row["model"])
    if not every:
        return [f"Word error rates of methods are {NOT_YET}."]
    parts = [measured_on(every, lambda row: row["model"])]
    for model in dict.fromkeys(row["model"] for row in every):
        held = [row for row in every if row["model"] == model]
        sets = list(dict.fromkeys(row["set"] for row in held))
        cells = {(row["method"], row["set"]): _rate(row) for row in held}
        lines = {row["method"]: [row["method"], row.get("settings"), row.get("models")] for row in held}
        clips = ", ".join(f"{name}: {next(row['clips'] for row in held if row['set'] == name)} clips" for name in sets)
        parts.append(f"**{plain(model)}** ({clips}); WER in % with 95 % intervals:")
        parts.append(
            table(
                ["model or method", "settings", "fine-tunes", *sets],
                [[*line, *(cells.get((method, name), "") for name in sets)] for method, line in lines.items()],
            )
        )
    return [*parts, CAVEATS]


def _rate(row: Row) -> str:
    low, high = (show(number(row, column)) for column in ("wer_low", "wer_high"))
    return f"{show(number(row, 'wer'))} ({low} to {high})"
