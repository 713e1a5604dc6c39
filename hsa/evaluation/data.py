"""Open a set of speech: a table, a Kaldi directory, an audio folder, or a directory with transcripts.tsv."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from hsa.arguments import check_paths
from hsa.errors import DataError, MachineError, RequestError, listed, shown
from hsa.evaluation.audio_folder import read_audio_folder
from hsa.evaluation.collector import Collector
from hsa.evaluation.files import kind_of
from hsa.evaluation.kaldi import check_files, read_kaldi
from hsa.evaluation.tables import METADATA, TRANSCRIPTS, read_table
from hsa.evaluation.utterance import DataSet, Utterance
from hsa.option_names import option
from hsa.system.descriptors import reason
from hsa.system.fsio import MACHINE_ERRNOS
from hsa.system.types import PathLike

__all__ = ["DataSet", "Utterance", "data", "parse_set"]

_Read = Callable[[int | None], Collector]
"""Reads a manifest, or only its first utterances."""

_NAME = re.compile(r"[^/\0]{1,100}")


def data(path: PathLike, *, name: str | None = None, limit: int | None = None) -> DataSet:
    """Read a set of utterances with their references; no audio is opened.

    `path` is a table or a directory. A table (.tsv, .csv, .jsonl) has a column file, path, audio or file_name, and one
    named text, sentence, transcript or transcription. The columns id, speaker, domain, start and end (seconds) are
    optional. A directory is Kaldi's (wav.scp, text, optional segments and utt2spk), one with metadata.csv or
    metadata.jsonl, or one with transcripts.tsv (file, text). Relative audio paths are relative to the table or the
    directory.

    `name` defaults to that of the table without its ending, or that of the directory. With a `limit`, only that many
    utterances are read and the rest is not looked at. A few rows of a huge table then take little time and memory.

    Raises DataError, which names file and line, RequestError for a bad argument and MachineError if reading fails.

    Example:
        >>> hsa.data("test.tsv").utterances[0].id
        'clip_000.wav'
    """
    check_paths(data=path)
    manifest = Path(os.path.abspath(path))
    check_limit(limit)
    read, named_by = _reader(manifest)
    name = _checked_name(named_by if name is None else name)
    return read(limit).finish(name, manifest)


def check_limit(limit: int | None) -> None:
    """Raise RequestError unless a number of utterances is None or at least 1.

    Example:
        >>> check_limit(3)
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise RequestError(f"{option('limit')} must be a whole number of at least 1, got {shown(limit)}")


def parse_set(argument: str, limit: int | None = None) -> DataSet:
    """Read the set that `NAME=PATH` or `PATH` names on the command line, or its first `limit` utterances. A path whose
    first part contains = is written ./a=b.

    Example:
        >>> parse_set("noisy=data/test.tsv").name  # doctest: +SKIP
        'noisy'
    """
    name, equals, path = argument.partition("=")
    if not equals or "/" in name:
        return data(argument, limit=limit)
    if not name or not path:
        raise RequestError(f"a set is given as NAME=PATH or PATH, got {shown(argument)}")
    return data(path, name=name, limit=limit)


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.isprintable() or name in (".", ".."):
        raise RequestError(
            f"the name of a set is {shown(name)}, expected 1 to 100 printable characters without /; "
            f"give one as NAME=PATH"
        )
    return name


def _reader(manifest: Path) -> tuple[_Read, str]:
    """The reader for a manifest, and the name of its set."""
    mode = _mode(manifest)
    if stat.S_ISDIR(mode):
        return _directory_reader(manifest), manifest.name or "data"
    if not stat.S_ISREG(mode):
        raise DataError(f"{manifest} is {kind_of(mode)}, expected a table or a directory with a set of utterances")
    if manifest.name in (TRANSCRIPTS, *METADATA):
        return lambda limit: read_table(manifest, limit=limit), manifest.parent.name or "data"
    return lambda limit: read_table(manifest, limit=limit), manifest.stem


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        kind = MachineError if error.errno in MACHINE_ERRNOS else DataError
        raise kind(f"{shown(path, 300)[1:-1]} cannot be read as a set of utterances: {reason(error)}") from error
    except ValueError as error:
        raise DataError(f"{shown(path)} is no path of a set of utterances: {error}") from error


def _directory_reader(folder: Path) -> _Read:
    found = [name for name in ("wav.scp", *METADATA, TRANSCRIPTS) if os.path.lexists(folder / name)]
    if len(found) != 1:
        kinds = "wav.scp and text (Kaldi), metadata.csv or metadata.jsonl (an audio folder), or transcripts.tsv"
        which = f"has {listed(found)}; name the one to read" if found else f"has none of {kinds}"
        raise DataError(f"{folder} {which}, or give a table that ends in .tsv, .csv or .jsonl")
    if found == ["wav.scp"]:
        check_files(folder)
        return lambda limit: read_kaldi(folder, limit=limit)
    if found == [TRANSCRIPTS]:
        return lambda limit: read_table(folder / TRANSCRIPTS, limit=limit)
    return lambda limit: read_audio_folder(folder / found[0], limit=limit)
