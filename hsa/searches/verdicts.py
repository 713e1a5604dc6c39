"""What a reader of a search's figures must know: which models are compared, and what the comparison shows."""

from __future__ import annotations

from collections.abc import Container, Sequence

from hsa.errors import listed
from hsa.evaluation.prepared import PreparedSet
from hsa.searches.dev_sets import DevSets
from hsa.searches.study import Study
from hsa.searches.trials import Trial, best_of


def models_to_show(study: Study) -> list[Trial]:
    """The best candidate and the baselines, each model once, as far as they could be scored."""
    found = {study.best.name: study.best}
    for trial in study.baselines:
        if trial.state == "complete":
            found.setdefault(trial.name, trial)
    return list(found.values())


def best_baseline(study: Study, scores: Container[str]) -> Trial | None:
    """The best of what was scored before anything was drawn and is among `scores`, the best candidate not counted."""
    others = [trial for trial in study.baselines if trial.name != study.best.name and trial.name in scores]
    return best_of(others)


def data_notes(sets: Sequence[PreparedSet], dev: DevSets) -> list[str]:
    """How many utterances of each dev set were left out."""
    return [
        f"{dev.empty[each.name]} utterances of {each.name} have no words once normalised and were left out"
        for each in sets
        if dev.empty[each.name]
    ]


def verdict_notes(study: Study, baseline: Trial | None, tested: bool) -> list[str]:
    """What a reader of the figures must know."""
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
