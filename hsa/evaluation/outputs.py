"""Write the results of an evaluation: scores.csv, scores.json and report.html. Each file is written atomically."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from hsa.arguments import check_paths
from hsa.errors import DestinationError
from hsa.evaluation.model_scores import COLUMNS, score_row
from hsa.evaluation.page import render as render_page
from hsa.evaluation.report import KIND, Evaluation
from hsa.system.destinations import check_tree
from hsa.system.fsio import Tally
from hsa.system.staging import STAGING, StagingDirectory
from hsa.system.types import PathLike
from hsa.views.csv_file import cell

JSON, CSV, PAGE = "scores.json", "scores.csv", "report.html"
EVALUATION_STAGING = f".eval{STAGING}"

_START = f'{{\n "kind": "{KIND}",'.encode()
"""The first bytes of scores.json, by which a run recognizes an earlier run's files among files of these names."""


def check_output(output: PathLike, sources: Sequence[Path]) -> Path:
    """The directory of an evaluation with its links resolved. It may contain anything except files of these names that
    another program wrote; DestinationError if it may not be written.

    Example:
        >>> check_output("evaluation", [Path("merged")])  # doctest: +SKIP
        PosixPath('/home/anna/evaluation')
    """
    check_paths(output=output)
    folder = check_tree(output, [source.resolve() for source in sources])
    present = [name for name in (JSON, CSV, PAGE) if os.path.lexists(folder / name)]
    if present and not _is_ours(folder / JSON):
        raise DestinationError(
            f"{folder / present[0]} exists and hsa eval did not write it; choose another output, or move it away"
        )
    return folder


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_START)) == _START


def write_scores(report: Evaluation, folder: Path) -> None:
    """Write the three files, scores.json first. Raises MachineError, and DestinationError if another run is writing
    there.

    Example:
        >>> write_scores(report, Path("evaluation"))  # doctest: +SKIP
    """
    files = {JSON: scores_json(report), CSV: scores_csv(report), PAGE: render_page(report)}
    with StagingDirectory(folder / EVALUATION_STAGING, folder, sync=True) as staging:
        for name, data in files.items():
            staging.write(name, data, Tally())
        for name in files:
            staging.publish_file(name, folder / name)


def scores_json(report: Evaluation) -> bytes:
    """The bytes of scores.json. They depend only on what is evaluated, not on whether the run was resumed."""
    return (json.dumps(report.scores_dict(), indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def scores_csv(report: Evaluation) -> bytes:
    """The bytes of scores.csv: a row for each model and group, RFC 4180, UTF-8."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("model", *COLUMNS))
    for model in report.models:
        for score in model.scores:
            writer.writerow([model.name, *(cell(value) for value in score_row(score).values())])
    return text.getvalue().encode("utf-8", "backslashreplace")
