"""The page report.html of a search: history, settings against score, the front, baselines with intervals, the worst
utterances."""

from __future__ import annotations

from typing import Any

from hsa.evaluation.word_pairs import word_pairs
from hsa.searches.study import Study
from hsa.views.page import fill


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
            row[f"{side}_pairs"], row[f"{side}_cut"] = word_pairs(row["reference"], row[side])
    return found
