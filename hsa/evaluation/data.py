"""Open a set of speech: a table, a Kaldi directory, an audio folder, or a directory with transcripts.tsv."""

from __future__ import annotations

from hsa.errors import DataError
from hsa.evaluation.utterance import DataSet, Utterance
from hsa.system.types import PathLike

__all__ = ["DataSet", "Utterance", "data", "parse_set"]


def data(path: PathLike, *, name: str | None = None) -> DataSet:
    """Read a set of utterances with their references. Raises DataError, which names file and line."""
    raise DataError(f"{path}: no reader of this kind of file yet")


def parse_set(argument: str) -> DataSet:
    """The set that `NAME=PATH` or `PATH` names on the command line."""
    name, equals, path = argument.partition("=")
    if equals and "/" not in name:
        return data(path, name=name)
    return data(argument)
