"""What searches have found, as the tables of docs/findings.md, and whether the best merges are as good as claimed.

    python bench/findings.py SEARCH [SEARCH ...] [--page docs/findings.md] [--least 10]

SEARCH is the output of a `hsa search` with one dev set and test sets. For each the page gets a table of the best that
every method reached on the dev set, beside its defaults; a table of the test sets, decoded once after the search, with
paired intervals; and what the search cost. Ends with 1 where a best is less than `--least` percent (relative) below
the best of all baselines and defaults on the dev set, or has a higher rate than one of them on a test set.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import markdown

BEGINS, ENDS = "<!-- findings -->", "<!-- /findings -->"
LEAST = 10.0
"""Percent by which the best must be below the best baseline on the dev set."""


@dataclass(frozen=True)
class Findings:
    """The document that a search writes as search.json."""

    study: Mapping[str, Any]

    @property
    def trials(self) -> list[dict[str, Any]]:
        """All trials that were decoded to the end, in their order."""
        return [trial for trial in self.study["trials"] if trial["state"] == "complete"]

    @property
    def best(self) -> dict[str, Any]:
        return next(trial for trial in self.trials if trial["name"] == self.study["best"])

    @property
    def dev(self) -> str:
        """The name of the dev set."""
        (name,) = self.best["wer"]
        return str(name)

    @property
    def best_baseline(self) -> dict[str, Any]:
        """The best of base, the fine-tunes, their average and the methods' defaults on the dev set."""
        return min((trial for trial in self.trials if trial["kind"] != "sampled"), key=_value)

    @property
    def gain(self) -> float:
        """By how many percent the best is below the best baseline on the dev set."""
        return 100.0 * (1.0 - _value(self.best) / _value(self.best_baseline))

    @property
    def shown_worse(self) -> list[str]:
        """The baselines than which the best was shown to be worse on a test set."""
        return [f"{row['model']} on {row['set']}" for row in self.study["test"] if row["verdict"] == "worse"]

    @property
    def higher(self) -> list[str]:
        """The baselines that have a lower word error rate than the best on a test set, whatever the interval."""
        return [f"{row['model']} on {row['set']}" for row in self.study["test"] if (row["difference"] or 0.0) > 0.0]


def _value(trial: Mapping[str, Any]) -> float:
    (value,) = trial["values"]
    return float(value)


def read(folder: Path) -> Findings:
    """The findings of a search's output. SystemExit where it has no document, several dev sets or no test sets."""
    study = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    if len(study["trials"][0]["wer"]) != 1 or not study["test"]:
        raise SystemExit(f"{folder} has several dev sets or no test sets, expected one dev set and test sets")
    return Findings(study)


def page(found: Sequence[Findings]) -> str:
    """The part of docs/findings.md between the marks."""
    return "\n\n".join(part for each in found for part in _parts(each))


def _parts(found: Findings) -> list[str]:
    study, savings = found.study, found.study["savings"]
    decoded = sum(trial["decoded"] for trial in study["trials"])
    words = next(row["words"] for row in study["dev"])
    best = found.best
    return [
        f"### Chosen on {found.dev}",
        f"Best: **{best['method']}** with {_settings(best)}, {_percent(_value(best))} on {found.dev} ({words} words). "
        f"The best baseline there is {found.best_baseline['name']} with {_percent(_value(found.best_baseline))}, so "
        f"the best is {found.gain:.1f} % below it. The command:",
        f"```\n{_neutral(study['command'])}\n```",
        "The best that each method reached on the dev set:",
        _methods(found),
        "The test sets, decoded once after the search. WERs in %; a difference is the best minus the model, in points.",
        _tests(found),
        f"Cost: {len(study['trials'])} models, {study['seconds']:.0f} s of trials, {study['merging']:.0f} s of them "
        f"for merging; {decoded} utterances decoded, {savings['raced']} not decoded because of racing.",
    ]


def _methods(found: Findings) -> str:
    lines = []
    for method in dict.fromkeys(trial["method"] for trial in found.study["trials"] if trial["method"]):
        tried = [trial for trial in found.study["trials"] if trial["method"] == method]
        complete = [trial for trial in tried if trial["state"] == "complete"]
        best = min(complete, key=_value, default=None)
        default = next((trial for trial in complete if trial["name"] == f"{method} defaults"), None)
        lines.append(
            [
                method,
                "" if default is None else _percent(_value(default)),
                "" if best is None else _percent(_value(best)),
                "" if best is None else _settings(best),
                len(tried),
                sum(trial["state"] == "stopped" for trial in tried),
            ]
        )
    lines.sort(key=lambda line: float(str(line[2]).removesuffix(" %") or "inf"))
    return markdown(("method", "defaults", "best", "settings of the best", "tried", "stopped by racing"), lines)


def _tests(found: Findings) -> str:
    rows = found.study["test"]
    sets = list(dict.fromkeys(row["set"] for row in rows))
    by_model: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["set"]] = row
    lines = []
    for model, of_sets in by_model.items():
        cells: list[object] = [model]
        for name in sets:
            row = of_sets.get(name)
            cells += ["", ""] if row is None else [_interval(row["wer"], row["interval"]), _difference(row)]
        lines.append(cells)
    head = ["model", *(title for name in sets for title in (f"{name}, WER", "difference"))]
    return markdown(head, lines)


def _difference(row: Mapping[str, Any]) -> str:
    if row["difference"] is None:
        return ""
    sure = "" if row["verdict"] == "no difference shown" else " *"
    low, high = (100.0 * end for end in row["difference_interval"])
    return f"{100.0 * row['difference']:+.2f} ({low:+.2f} to {high:+.2f}){sure}"


def _interval(wer: float, interval: Sequence[float]) -> str:
    return f"{100.0 * wer:.2f} ({100.0 * interval[0]:.2f} to {100.0 * interval[1]:.2f})"


def _percent(share: float) -> str:
    return f"{100.0 * share:.2f} %"


def _settings(trial: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in trial["settings"].items()) or "its defaults"


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _neutral(command: str) -> str:
    """The command with names of models in the place of their paths."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in command.split(" "))


def verdicts(found: Sequence[Findings], least: float) -> list[str]:
    """What is less than claimed; empty where all is as claimed."""
    missed = []
    for each in found:
        if each.gain < least:
            missed.append(f"{each.dev}: the best is {each.gain:.1f} % below the best baseline, less than {least:g} %")
        missed += [f"{each.dev}: the best is worse than {name}" for name in each.shown_worse]
        missed += [f"{each.dev}: the best has a higher rate than {name}" for name in each.higher]
    return list(dict.fromkeys(missed))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searches", type=Path, nargs="+", metavar="SEARCH")
    parser.add_argument("--page", type=Path, help="the Markdown file to write into (default: print)")
    parser.add_argument("--least", type=float, default=LEAST)
    options = parser.parse_args(arguments)
    found = [read(folder) for folder in options.searches]
    text = page(found)
    if options.page is None:
        print(text)
    else:
        before, begins, rest = options.page.read_text(encoding="utf-8").partition(BEGINS)
        _, ends, after = rest.partition(ENDS)
        if not ends:
            raise SystemExit(f"{options.page} has no {BEGINS} with an {ENDS} after it")
        options.page.write_text(f"{before}{begins}\n{text}\n{ends}{after}", encoding="utf-8")
    missed = verdicts(found, options.least)
    print("\n".join(missed) or "all is as claimed", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
