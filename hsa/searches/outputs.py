"""The output of a search. Files of other programs are not replaced, and only one run at a time writes it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from hsa.errors import DestinationError, ProvenanceError
from hsa.evaluation.hypotheses import FOLDER as HYPOTHESES
from hsa.option_names import option
from hsa.outputs.provenance import load
from hsa.searches.best import CHOSEN
from hsa.searches.report_files import FILES, RESULT
from hsa.searches.transcripts import TRANSCRIPTS
from hsa.system import fsio
from hsa.system.destinations import check_destination, check_tree
from hsa.system.manifest import PROVENANCE
from hsa.system.types import PathLike

BEST, LOCK = "best", ".lock"
"""The directory of the best candidate, and the file that is locked by the run that writes to an output."""

_START = b'{\n "format": 1,\n "objective": {\n'
"""The first bytes of search.json, by which a search recognizes an earlier search's files among files of these names."""


def open_output(output: PathLike, sources: Sequence[Path], stack: ExitStack) -> Path:
    """Create and lock the output of a search. The lock is held until `stack` is closed, so only one run writes to it.

    Returns the directory with links resolved. Raises DestinationError if it may not be written, if it has other
    programs' files that the search would replace, or if another search has locked it; MachineError.

    Example:
        >>> with ExitStack() as stack:  # doctest: +SKIP
        ...     folder = open_output("search", [Path("m1"), Path("m2")], stack)
    """
    folder = check_tree(output, sources)
    check_replaced(folder, sources)
    with fsio.map_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    stack.callback(os.close, fd)
    if not fsio.hold(fd):
        raise DestinationError(
            f"another search runs in {folder}; wait for it to end, or give another {option('output')}"
        )
    return folder


def check_replaced(folder: Path, sources: Sequence[Path]) -> None:
    """Raise DestinationError if a search would replace a report or a `best/` that no search wrote.

    The reports belong to a search if search.json does, which is written before the others and before `best/`.
    """
    for name in (TRANSCRIPTS, HYPOTHESES):
        if fsio.exists(folder / name) and not (folder / name).is_dir():
            raise _foreign(folder / name)
    check_reports(folder)
    check_best(folder, sources)


def check_reports(folder: Path) -> None:
    """Raise DestinationError if a file has the name of a report but no search wrote it."""
    present = [folder / name for name in FILES if fsio.exists(folder / name)]
    for path in present:
        if path.is_symlink() or not path.is_file():
            raise _foreign(path)
    if present and not _is_of_search(folder / RESULT):
        raise _foreign(present[0])


def check_best(folder: Path, sources: Sequence[Path]) -> None:
    """Raise DestinationError if `best/` cannot be replaced, or if no search wrote it."""
    best = folder / BEST
    if fsio.exists(best) and not best.is_dir():
        raise _foreign(best)
    if best.is_dir() and os.listdir(best) and not (_is_of_search(folder / RESULT) and _was_chosen(best)):
        raise _foreign(best)
    check_destination(best, sources, overwrite=True)


def _is_of_search(path: Path) -> bool:
    """Whether a file is the search.json of a search."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_START)) == _START


def _was_chosen(checkpoint: Path) -> bool:
    """Whether a checkpoint is the best candidate of a search, by the fields of its card."""
    if not (checkpoint / PROVENANCE).is_file():
        return False
    try:
        card = load(checkpoint).record.parameters.get("card")
    except ProvenanceError:
        return False
    return isinstance(card, dict) and CHOSEN in str(card.get("limitations"))


def _foreign(path: Path) -> DestinationError:
    return DestinationError(
        f"{path} exists and hsa search did not write it; choose another {option('output')}, or move it away"
    )
