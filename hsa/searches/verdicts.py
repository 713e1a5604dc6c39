"""The conclusions for readers of a search's report: the models to compare, and notes on the comparison."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from hsa.errors import listed
from hsa.evaluation.prepared import PreparedSet
from hsa.searches.study import Study
from hsa.searches.trials import Trial, best_of


def models_to_show(study: Study) -> list[Trial]:
    """The best candidate and the baselines, each model once, if they could be scored."""
    found = {study.best.name: study.best}
    for trial in study.baselines:
        if trial.state == "complete":
            found.setdefault(trial.name, trial)
    return list(found.values())


def best_baseline(study: Study, scores: Container[str]) -> Trial | None:
    """The best baseline among `scores`, other than the best candidate. None if there is none."""
    others = [trial for trial in study.baselines if trial.name != study.best.name and trial.name in scores]
    return best_of(others)


def data_notes(kind: str, sets: Sequence[PreparedSet], empty: Mapping[str, int]) -> list[str]:
    """Notes of the readers of the dev or test sets, and the number of empty references of each set, by its name.

    Example:
        >>> data_notes("test", sets, {"noisy": 2})  # doctest: +SKIP
        ['2 of 60 utterances of the test set noisy have an empty reference once normalised and are not scored']
    """
    counts = [
        f"{empty[each.name]} of {len(each.utterances)} utterances of the {kind} set {each.name} have an empty "
        f"reference once normalised and are not scored"
        for each in sets
        if empty[each.name]
    ]
    return [*counts, *(note for each in sets for note in each.notes)]


def verdict_notes(study: Study, baseline: Trial | None, tested: bool) -> list[str]:
    """Notes that a reader of the figures must know."""
    notes = []
    best = study.best
    if baseline is not None and baseline.value < best.value:
        notes.append(
            f"{baseline.name} scores better on the dev sets than every merge that was tried; no merge was better"
        )
    if not study.test:
        remedy = "" if tested else "; give test sets for an estimate without this bias"
        notes.append(
            f"the settings were chosen on the dev sets, so the best candidate's figures there are optimistic{remedy}"
        )
    for name in dict.fromkeys(row.set for row in study.test):
        rows = [row for row in study.test if row.set == name and row.verdict == "no difference shown"]
        if rows:
            notes.append(
                f"on {name} no difference was shown between {best.name} and {listed((row.model for row in rows), 'or')}"
            )
    return notes
