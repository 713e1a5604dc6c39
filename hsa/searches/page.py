"""The page report.html of a search: history, settings against score, the front, baselines with intervals, the worst
utterances."""

from __future__ import annotations

from typing import Any

from hsa.evaluation.scores import alignment
from hsa.searches.study import Study
from hsa.views.page import fill

MOST_WORDS = 300
"""Pairs of words of an utterance that are shown. An hour of speech has nine thousand."""

_OPERATIONS = {"equal": "=", "substitute": "s", "delete": "d", "insert": "i"}


def render(study: Study) -> bytes:
    """The page: the file's bytes.

    Example:
        >>> Path("report.html").write_bytes(render(study))  # doctest: +SKIP
    """
    return fill("search", document(study))


def document(study: Study) -> dict[str, Any]:
    """What the page is made from: all of a study, and the worst utterances word beside word."""
    found = study.as_dict()
    for row in found["worst"]:
        for side in ("best", "other"):
            row[f"{side}_pairs"] = _pairs(row["reference"], row[side])
    return found


def _pairs(reference: str, hypothesis: str) -> list[list[str]]:
    pairs = alignment(reference, hypothesis)
    return [[_OPERATIONS[kind], ours, theirs] for kind, ours, theirs in pairs[:MOST_WORDS]]
