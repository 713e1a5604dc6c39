"""The scores of an evaluation as text: a table for each set, and one of domains if there are any."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hsa.evaluation.model_scores import ModelScores
from hsa.evaluation.prepared import PreparedSet, sets_text
from hsa.evaluation.scores import Interval, Score
from hsa.views.text import TextBuffer, add_row, console_on, new_table, print_line

if TYPE_CHECKING:
    from rich.console import Console

COUNTS = ("sub", "del", "ins")
MOST_DOMAINS, MOST_IN_DOMAINS = 12, 6
"""Maximum domains with a row, and maximum models with a column. The files contain all of them."""


def render(
    models: Sequence[ModelScores],
    sets: Sequence[PreparedSet],
    *,
    normalizer: str,
    confidence: float,
    baseline: str | None,
) -> str:
    """Render the tables for the current stdout: its width, its characters, and colours only on a terminal.

    Example:
        >>> print(found.table)  # of hsa.evaluate, which calls this  # doctest: +SKIP
    """
    buffer = TextBuffer(sys.stdout)
    console = console_on(buffer, wide=False)
    print_line(console, f"{sets_text(sets)}; normalizer {normalizer}; rates in %")
    scores = models[0].scores
    groups = [each for each in scores if each.group == "set"]
    for group in [*groups, *(scores[:1] if len(groups) > 1 else ())]:
        _rows(console, models, group, confidence)
    domains = [each for each in scores if each.group == "domain"]
    if 1 < len(domains) <= MOST_DOMAINS and len(models) <= MOST_IN_DOMAINS:
        _domains(console, models, domains)
    if baseline is not None and len(models) > 1:
        _differences(console, models, baseline, confidence)
    return buffer.getvalue().rstrip("\n")


def _rows(console: Console, models: Sequence[ModelScores], group: Score, confidence: float) -> None:
    """A table of the models on one set, or on all of them."""
    named = "all sets" if group.group == "all" else group.name
    dropped = f", {group.dropped} dropped" if group.dropped else ""
    print_line(console, f"\n{named}: {group.utterances} utterances, {group.words.reference} words{dropped}")
    columns = ["WER", _level(confidence), "CER", *COUNTS]
    table = new_table("model", *columns, right=columns)
    for model in models:
        score = _of(model, group)
        words = score.words
        rates = (_percent(words.rate), _interval(score.wer), _percent(score.characters.rate))
        add_row(table, model.name, *rates, words.substitutions, words.deletions, words.insertions)
    console.print(table)


def _domains(console: Console, models: Sequence[ModelScores], domains: list[Score]) -> None:
    """WER by domain: a row for each domain, a column for each model."""
    print_line(console, "\nWER by domain")
    names = [model.name for model in models]
    table = new_table("domain", "words", *names, right=("words", *names))
    for domain in domains:
        rates = [_percent(_of(model, domain).words.rate) for model in models]
        add_row(table, domain.name, domain.words.reference, *rates)
    console.print(table)


def _differences(console: Console, models: Sequence[ModelScores], baseline: str, confidence: float) -> None:
    """The differences of the models from the baseline, on each set and on all of them."""
    print_line(console, f"\nWER minus that of {baseline}; * where the interval excludes 0")
    table = new_table("set", "model", "difference", _level(confidence), "", right=("difference", _level(confidence)))
    sets = [each for each in models[0].scores if each.group == "set"]
    for group in [*sets, *(models[0].scores[:1] if len(sets) > 1 else ())]:
        for model in models:
            found = _of(model, group).difference
            if found is not None:
                interval = found.interval
                mark = "*" if interval is not None and not interval.low <= 0 <= interval.high else ""
                name = "all sets" if group.group == "all" else group.name
                add_row(table, name, model.name, f"{100 * found.wer:+.2f}", _signed(interval), mark)
    console.print(table)


def _of(model: ModelScores, group: Score) -> Score:
    return model.scores[0] if group.group == "all" else model.score(group.group, group.name)


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f}"


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _signed(interval: Interval | None) -> str:
    return "-" if interval is None else f"[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _level(confidence: float) -> str:
    return f"{100 * confidence:g} %"
