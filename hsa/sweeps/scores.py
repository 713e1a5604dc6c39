"""The word error rates of a sweep: for every point of its grid, and for the models that it merges."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hsa.evaluation.model_scores import ModelScores, score_row
from hsa.evaluation.prepared import sets_text
from hsa.evaluation.report import Evaluation
from hsa.evaluation.scores import Interval, Score
from hsa.outputs.grid_point import GridPoint, decimal_text
from hsa.outputs.sweep_index import SweepEntry
from hsa.views.csv_file import cell
from hsa.views.text import TextBuffer, add_row, console_on, new_table, print_line

if TYPE_CHECKING:
    from rich.console import Console

RATES = ("wer", "wer_low", "wer_high", "difference", "difference_low", "difference_high")
"""The columns of a row over all sets. Each set has the same columns, prefixed with its name."""


@dataclass(frozen=True)
class SweepScores:
    """The word error rates of a sweep's points.

    `evaluation` is the result of `hsa.evaluate`, with the sources under their roles and the `points` of the grid under
    their names. Differences are relative to the anchor, the model that a merge changes. `entries` are the index
    entries.

    Example:
        >>> report = hsa.sweep("whisper-small", "m1", "m2", "sweep", lam=[0.1, 0.3], data="dev.tsv")  # doctest: +SKIP
        >>> report.scores.best()  # doctest: +SKIP
        ('encoder-qkv_k0.6_lambda0.3_alpha0.2',)
    """

    evaluation: Evaluation
    points: tuple[GridPoint, ...]
    entries: Mapping[str, SweepEntry]

    def __getitem__(self, name: str) -> ModelScores:
        """The scores of a point by its name, or of a model by its role. Raises RequestError if there is none."""
        return self.evaluation[name]

    def best(self, data: str | None = None) -> tuple[str, ...]:
        """The names of the points with the lowest word error rate on a set, or on all sets; several if they tie."""
        rates = {point.name: _score(self[point.name], data).words.rate for point in self.points}
        lowest = min(rates.values())
        return tuple(name for name, rate in rates.items() if rate == lowest)

    @property
    def sets(self) -> tuple[str, ...]:
        """The names of the sets that have words to score."""
        return tuple(each.name for each in self.evaluation.models[0].scores if each.group == "set")

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the rates."""
        chosen = (
            f"the best of {len(self.points)} points looks better than it is on the speech that chose it; report its "
            f"rate on other speech"
        )
        found = self.evaluation
        return (*found.run_notes, *found.notes, *((chosen,) if len(self.points) > 1 else ()))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each model and point: its axis values, its word error rates on all sets and on each set, and their
        differences from the anchor's. Missing values are None."""
        keys = dict.fromkeys(key for point in self.points for key in point.values)
        points = {point.name: point for point in self.points}
        rows = []
        for model in self.evaluation.models:
            point, entry = points.get(model.name), self.entries.get(model.name)
            row: dict[str, Any] = {"model": model.name, "place": None if entry is None else entry.place}
            row |= {key: None if point is None else point.values.get(key) for key in keys}
            row["blake3"] = None if entry is None else entry.blake3
            for data in (None, *self.sets):
                found = score_row(_score(model, data))
                row |= {name if data is None else f"{data}_{name}": found[name] for name in RATES}
            rows.append(row)
        return rows

    def csv(self) -> bytes:
        """The rows in the format of wer.csv: RFC 4180, UTF-8."""
        rows = self.rows()
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([cell(value) for value in row.values()] for row in rows)
        return text.getvalue().encode("utf-8", "backslashreplace")

    def as_dict(self) -> dict[str, Any]:
        """The scores as `hsa sweep --json` prints them."""
        return {
            "rows": self.rows(),
            "best": list(self.best()),
            "best_by_set": {name: list(self.best(name)) for name in self.sets},
            "evaluation": self.evaluation.as_dict(),
        }

    @property
    def table(self) -> str:
        """The scores as text, as `hsa sweep` prints them: a table for each set, with the best points marked."""
        found = self.evaluation
        buffer = TextBuffer(sys.stdout)
        console = console_on(buffer, wide=True)  # at any width, so that no column name is wrapped
        print_line(console, f"{sets_text(found.sets)}; normalizer {found.normalizer}; rates in %")
        constant = {key: next(iter(values)) for key, values in self._values().items() if len(values) == 1}
        if constant:
            print_line(console, f"every point has {', '.join(f'{key} {_text(v)}' for key, v in constant.items())}")
        if found.baseline is not None:
            print_line(console, "* marks a difference whose interval excludes 0")
        for data in (*self.sets, *((None,) if len(self.sets) > 1 else ())):
            self._print(console, data)
        return buffer.getvalue().rstrip("\n")

    def _values(self) -> dict[str, dict[Any, None]]:
        """The values of each axis, in the order of the grid."""
        values: dict[str, dict[Any, None]] = {}
        for point in self.points:
            for key, value in point.values.items():
                values.setdefault(key, {})[value] = None
        return values

    def _print(self, console: Console, data: str | None) -> None:
        """The table of one set, or of all of them."""
        found, best = self.evaluation, self.best(data)
        varied = [key for key, values in self._values().items() if len(values) > 1]
        first = _score(found.models[0], data)
        dropped = f", {first.dropped} dropped" if first.dropped else ""
        label = "all sets" if data is None else data
        print_line(console, f"\n{label}: {first.utterances} utterances, {first.words.reference} words{dropped}")
        level = f"{100 * found.confidence:g} %"
        differences = () if found.baseline is None else (f"minus {found.baseline}", level)
        numbers = (*varied, "WER", level, *differences)
        table = new_table("model", *numbers, *(("",) if differences else ()), right=numbers)
        points = {point.name: point for point in self.points}
        for model in found.models:
            point, score = points.get(model.name), _score(model, data)
            is_best = model.name in best and len(points) > 1
            name = model.name if point is None else "best point" if is_best else "point"
            values = [None if point is None else _text(point.values[key]) for key in varied]
            rates = (f"{100 * score.words.rate:.2f}", _interval(score.wer, "{:.1f}"))
            add_row(table, name, *values, *rates, *(_difference(score) if differences else ()))
        console.print(table)


def _score(model: ModelScores, data: str | None) -> Score:
    return model.scores[0] if data is None else model.score("set", data)


def _difference(score: Score) -> Iterator[str]:
    """The difference of a score from the baseline's, its interval, and a mark if the interval excludes 0."""
    found = score.difference
    if found is not None:
        interval = found.interval
        yield f"{100 * found.wer:+.2f}"
        yield _interval(interval, "{:+.1f}")
        yield "*" if interval is not None and not interval.low <= 0 <= interval.high else ""


def _interval(interval: Interval | None, form: str) -> str:
    return "-" if interval is None else f"[{form.format(100 * interval.low)}, {form.format(100 * interval.high)}]"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else decimal_text(value)
