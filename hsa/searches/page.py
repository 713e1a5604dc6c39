"""The page report.html of a search: history, settings against score, the front, baselines with intervals, and the worst
utterances."""

from __future__ import annotations

from typing import Any

from hsa.evaluation.word_pairs import word_pairs
from hsa.searches.study import Study
from hsa.views.page import fill


def render(study: Study) -> bytes:
    """Render the page as the bytes of its file.

    Example:
        >>> Path("report.html").write_bytes(render(study))  # doctest: +SKIP
    """
    return fill("search", document(study))


def document(study: Study) -> dict[str, Any]:
    """The data of the page: all of a study, and the worst utterances aligned word by word."""
    found = study.as_dict()
    for row in found["worst"]:
        for side in ("best", "other"):
            row[f"{side}_pairs"], row[f"{side}_cut"] = word_pairs(row["reference"], row[side])
    return found
