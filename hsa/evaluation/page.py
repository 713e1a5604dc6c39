"""The page report.html of an evaluation: scores with intervals, and the worst utterances with their alignment."""

from __future__ import annotations

from typing import Any

from hsa.evaluation.model_scores import ModelScores
from hsa.evaluation.prepared import sets_text
from hsa.evaluation.report import Evaluation
from hsa.evaluation.scores import UtteranceScore
from hsa.evaluation.word_pairs import word_pairs
from hsa.views.page import fill

SHOWN = 200
"""Utterances that a page shows at least, if there are that many: the worst ones of each model, and those on which it
differs most from the baseline."""

LEAST_OF_A_MODEL = 10
"""Utterances of each of these two kinds that are shown for every model, however many models there are."""


def render(report: Evaluation) -> bytes:
    """Render the page as the bytes of its file.

    Example:
        >>> Path("report.html").write_bytes(render(report))  # doctest: +SKIP
    """
    return fill("evaluation", document(report))


def document(report: Evaluation) -> dict[str, Any]:
    """The data of the page."""
    places = worst(report)
    return {
        **report.scores_dict(),
        "summary": sets_text(report.sets),
        "utterances": [_utterance(report, place) for place in places],
        "scored": sum(not each.is_empty for each in report.models[0].utterances),
    }


def worst(report: Evaluation) -> list[int]:
    """The indices of the utterances that the page shows, sorted by the most errors of any model."""
    share = max(LEAST_OF_A_MODEL, SHOWN // (2 * len(report.models)))
    base = None if report.baseline is None else report[report.baseline]
    chosen: set[int] = set()
    for model in report.models:
        errors = _errors(model)
        chosen.update(_most(errors, share))
        if base is not None and model is not base:
            theirs = _errors(base)
            chosen.update(_most({place: abs(count - theirs[place]) for place, count in errors.items()}, share))
    most = {place: max(model.utterances[place].words.errors for model in report.models) for place in chosen}
    return sorted(chosen, key=lambda place: (-most[place], place))


def _errors(model: ModelScores) -> dict[int, int]:
    return {place: each.words.errors for place, each in enumerate(model.utterances) if not each.is_empty}


def _most(counts: dict[int, int], number: int) -> list[int]:
    """The indices with the highest counts above 0."""
    return [place for place in sorted(counts, key=lambda each: (-counts[each], each))[:number] if counts[place]]


def _utterance(report: Evaluation, place: int) -> dict[str, Any]:
    first = report.models[0].utterances[place]
    return {
        "id": first.id,
        "set": first.set,
        "speaker": first.speaker,
        "domain": first.domain,
        "words": first.words.reference,
        "heard": [_heard(model.utterances[place]) for model in report.models],
    }


def _heard(score: UtteranceScore) -> dict[str, Any]:
    """A model's transcript, as pairs of the reference's words and its own."""
    pairs, cut = word_pairs(score.reference, score.hypothesis)
    words = score.words
    return {"errors": [words.substitutions, words.deletions, words.insertions], "pairs": pairs, "cut": cut}
