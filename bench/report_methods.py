"""The report's tables of methods: beside mergekit, distances from mergekit's tensors, and word error rates."""

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


def parity_block(folder: Path, image: Image) -> list[str]:
    """How far merges lie from mergekit's: of whole files by method, of single tensors by method and settings."""
    every = newest(rows_of("parity", folder), lambda row: (row["comparison"], row["method"]))
    if not every:
        return [f"Distances from mergekit are {NOT_YET}."]
    files, functions, formulas = (
        sorted((row for row in every if row["comparison"] == of), key=lambda row: row["method"])
        for of in ("files", "functions", "formulas")
    )
    columns = ("between", "most", "ours", "theirs", "formulas")
    single = [[row["method"], row["case"], *(_distance(row, each) for each in columns)] for row in functions]
    head = ["method", "merge", "hsa to mergekit", "at most", "hsa to exact", "mergekit to exact", "both in float64"]
    parts = [
        measured_on(every, lambda row: f"{row['comparison']}, {row['method']}"),
        "The same file run by `hsa merge --config` and by mergekit, with a list over layers and with filters:",
        _by_family(files),
        "Single tensors, hsa's formulas beside mergekit's functions; *exact* is mergekit's function in float64:",
        table(head, single),
        "Methods that mergekit lacks, merged by `hsa merge`, beside their formulas in float64:",
        _by_family(formulas),
    ]
    reasons = {(row["method"], row["case"]): row["reason"] for row in functions if row.get("reason")}
    if reasons:
        parts.append("Where more than 3e-7 is allowed, this is why:")
        lines = (f"- `{method}`, {plain(case)}: {plain(reason)}." for (method, case), reason in reasons.items())
        parts.append("\n".join(lines))
    return parts


def _by_family(every: list[Row]) -> str:
    """A line for each method, and a column for each family of models."""
    families = list(dict.fromkeys(row["case"] for row in every))
    cells = {(row["method"], row["case"]): _distance(row, "between") for row in every}
    limits = {row["method"]: _distance(row, "most") for row in every}
    lines = [[name, *(cells.get((name, of), "") for of in families), limit] for name, limit in limits.items()]
    return table(["method", *families, "at most"], lines)


def _distance(row: Row, column: str) -> str:
    return show(number(row, column), ".1e")


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
