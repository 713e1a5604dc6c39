"""The files that a search writes besides `best/`: trials.csv, search.json, report.md and report.html."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hsa.evaluation.scores import Interval
from hsa.methods.markdown import code, escape, fence, table
from hsa.searches.comparisons import Comparison
from hsa.searches.objectives import OWN, PARETO
from hsa.searches.page import render
from hsa.searches.study import Study
from hsa.searches.trials import Trial
from hsa.system import fsio

_VERDICTS = {
    "better": "best is better",
    "worse": "best is worse",
    "no difference shown": "no difference shown",
}

FILES = RESULT, TRIALS, REPORT, PAGE = "search.json", "trials.csv", "report.md", "report.html"


def write_report_files(study: Study) -> None:
    """Write all four files, each atomically. search.json is written first and marks the others. Raises MachineError."""
    _write(study.output / RESULT, _encoded(json.dumps(study.as_dict(), indent=1, ensure_ascii=False) + "\n"))
    _write(study.output / TRIALS, _encoded(trials_csv(study)))
    _write(study.output / REPORT, _encoded(report(study)))
    _write(study.output / PAGE, render(study))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    with fsio.map_write_errors(path):
        part.write_bytes(data)
        os.replace(part, path)


def trials_csv(study: Study) -> str:
    """A row for each trial: its scores, its cost, and the drawn values."""
    sets = sorted({name for trial in study.trials for name in trial.rates})
    drawn = sorted({name for trial in study.trials for name in trial.drawn})
    head = ["number", "name", "method", "state", "objective", *(f"wer {name}" for name in sets)]
    head += ["utterances", "decoded", "seconds", "weights", "settings", *drawn, "failure"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for trial in study.trials:
        scores = [_number(trial.value) if trial.values else "", *(_number(trial.rates.get(name)) for name in sets)]
        result = trial.result
        cost = [len(result.errors), result.decoded, round(result.seconds, 3), result.weights[:16]]
        settings = json.dumps(dict(trial.settings), ensure_ascii=False)
        row = [trial.number, trial.name, trial.method or "", trial.state, *scores, *cost, settings]
        writer.writerow([*row, *(trial.drawn.get(name, "") for name in drawn), result.failure or ""])
    return text.getvalue()


def report(study: Study) -> str:
    """The report in Markdown."""
    best = study.best
    percent = study.objective.kind != OWN
    parts = [
        "# Search of merges",
        f"Best by {study.objective.text}: **{escape(best.name)}**, method `{best.method}`, "
        f"{_value(best, percent)}. Command to reproduce it:",
        f"```\n{fence(study.command)}\n```",
        _bullets([*study.notes, *study.warnings]),
    ]
    if study.test:
        parts += ["## Test sets", _comparison_text(), _comparisons(study.test)]
    if study.dev:
        parts += [
            "## Dev sets",
            "The settings were chosen on these sets, so the figures of the best candidate are optimistic here.",
            _comparisons(study.dev),
        ]
    if study.objective.kind == PARETO:
        parts += [
            "## Front",
            "No other candidate is better on one set and no worse on all others.",
            _trials(study.front),
        ]
    parts += ["## Baselines", _trials(study.baselines), "## Best trials", _trials(_ranked(study)[:15])]
    for method, shares in study.importance.items():
        rows = [(f"`{code(name)}`", f"{100 * share:.0f} %") for name, share in shares.items()]
        parts += [f"## Importance of the settings of {method}", table(("setting", "share"), rows)]
    if study.worst:
        parts += ["## Worst utterances of the best candidate", _worst(study)]
    parts += ["## Cost", _cost(study)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _comparison_text() -> str:
    return (
        "Decoded once, after the search. The difference is the best candidate's word error rate minus the model's, in "
        "points, with the interval of a paired bootstrap; where that contains 0, no difference was shown."
    )


def _comparisons(rows: Sequence[Comparison]) -> str:
    cells = [
        (
            escape(row.set),
            escape(row.model),
            f"{100 * row.score.words.rate:.2f} {_interval(row.score.wer)}",
            ""
            if row.difference is None
            else f"{100 * row.difference.wer:+.2f} {_interval(row.difference.interval, '+')}",
            _VERDICTS.get(row.verdict or "", ""),
        )
        for row in sorted(rows, key=lambda row: row.set)
    ]
    return table(("set", "model", "WER %", "best minus model, points", ""), cells)


def _interval(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return ""
    return f"({100 * interval.low:{sign}.2f} to {100 * interval.high:{sign}.2f})"


def _trials(trials: Iterable[Trial]) -> str:
    rows = []
    for trial in trials:
        percent = bool(trial.rates)
        sets = ", ".join(f"{escape(name)} {100 * rate:.2f}" for name, rate in trial.rates.items())
        failure = escape(trial.result.failure or "")
        settings = ", ".join(f"{name} {_setting(value)}" for name, value in trial.settings.items())
        rows.append(
            (
                str(trial.number),
                escape(trial.name),
                _value(trial, percent) if trial.values else "failed",
                sets or failure,
                escape(settings),
            )
        )
    return table(("trial", "model", "objective", "WER % by set", "settings"), rows)


def _setting(value: Any) -> str:
    return "by layer" if isinstance(value, dict) else json.dumps(value, ensure_ascii=False)


def _ranked(study: Study) -> list[Trial]:
    return sorted((trial for trial in study.trials if trial.state == "complete"), key=lambda trial: trial.value)


def _value(trial: Trial, percent: bool) -> str:
    return " / ".join(f"{100 * value:.2f} %" if percent else f"{value:.6g}" for value in trial.values)


def _worst(study: Study) -> str:
    rows = [
        (
            escape(row.set),
            escape(row.id),
            escape(row.reference),
            f"{escape(row.best)} ({row.best_errors})",
            f"{escape(row.other)} ({row.other_errors})",
        )
        for row in study.worst
    ]
    return table(("set", "utterance", "reference", "best (errors)", "best baseline (errors)"), rows)


def _cost(study: Study) -> str:
    share = study.merging / study.seconds if study.seconds else 0.0
    lines = [
        f"{len(study.trials)} models took {study.seconds:.0f} s in all workers together; {100 * share:.1f} % of that "
        f"was merging."
    ]
    spared = study.savings
    if study.objective.kind == PARETO:
        lines.append("For a Pareto front no candidate is stopped early.")
    if spared is not None:
        whole = spared.decoded + spared.raced + spared.equal
        lines.append(
            f"{spared.decoded} of {whole} utterances were decoded: racing skipped {spared.raced}, and {spared.equal} "
            f"were known from models with the same weights."
        )
    return " ".join(lines)


def _bullets(notes: Sequence[str]) -> str:
    return "\n".join(f"- {escape(note)}" for note in notes)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"
