"""The scores of an evaluation as text: a table for each set, and one of domains where there are any."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hsa.evaluation.report import Evaluation, ModelScores, sets_text
from hsa.evaluation.scores import Interval, Score
from hsa.views.text import TextBuffer, add_row, console_on, new_table, print_line

if TYPE_CHECKING:
    from rich.console import Console

COUNTS = ("sub", "del", "ins")
DIFFERENCE = "difference"
MOST_DOMAINS, MOST_IN_DOMAINS = 12, 6
"""Domains that get a row, and models that get a column beside them; of more the files tell."""


def render(report: Evaluation) -> str:
    """The tables for stdout as it is now: its width, its letters, colours on a terminal alone.

    Example:
        >>> print(render(report))  # doctest: +SKIP
    """
    buffer = TextBuffer(sys.stdout)
    console = console_on(buffer, wide=False)
    print_line(console, f"{sets_text(report.sets)}; normalizer {report.normalizer}; rates in %")
    sets = report.models[0].scores
    groups = [each for each in sets if each.group == "set"]
    for group in groups:
        _rows(console, report, group)
    if len(groups) > 1:
        _rows(console, report, sets[0])
    domains = [each for each in sets if each.group == "domain"]
    if 1 < len(domains) <= MOST_DOMAINS and len(report.models) <= MOST_IN_DOMAINS:
        _domains(console, report, domains)
    if report.baseline is not None:
        print_line(console, f"{DIFFERENCE}: WER minus that of {report.baseline}; * where its interval does not hold 0")
    return buffer.getvalue().rstrip("\n")


def _rows(console: Console, report: Evaluation, group: Score) -> None:
    """A table of the models on one set, or on all of them."""
    named = "all sets" if group.group == "all" else group.name
    dropped = f", {group.dropped} dropped" if group.dropped else ""
    print_line(console, f"\n{named}: {group.utterances} utterances, {group.words.reference} words{dropped}")
    level = f"{100 * report.confidence:g} %"
    numbers = ["WER", level, "CER", *COUNTS]
    columns = [*numbers, *([DIFFERENCE] if report.baseline is not None else [])]
    table = new_table("model", *columns, right=columns)
    for model in report.models:
        score = _of(model, group)
        words = score.words
        values = [_percent(words.rate), _interval(score.wer), _percent(score.characters.rate)]
        values += [str(words.substitutions), str(words.deletions), str(words.insertions)]
        add_row(table, model.name, *values, *([_difference(score)] if DIFFERENCE in columns else []))
    console.print(table)


def _domains(console: Console, report: Evaluation, domains: list[Score]) -> None:
    """WER by domain: a row for each domain, a column for each model."""
    print_line(console, "\nWER by domain")
    names = [model.name for model in report.models]
    table = new_table("domain", "words", *names, right=("words", *names))
    for domain in domains:
        rates = [_percent(_of(model, domain).words.rate) for model in report.models]
        add_row(table, domain.name, domain.words.reference, *rates)
    console.print(table)


def _of(model: ModelScores, group: Score) -> Score:
    return model.scores[0] if group.group == "all" else model.score(group.group, group.name)


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f}"


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _difference(score: Score) -> str:
    if score.difference is None:
        return "-"
    found, interval = score.difference, score.difference.interval
    if interval is None:
        return f"{100 * found.wer:+.2f}"
    clear = "" if interval.low <= 0 <= interval.high else "*"
    return f"{100 * found.wer:+.2f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]{clear}"
