"""Write hypotheses and references as NIST's trn files, which sclite scores.

    sclite -s -e utf-8 -i spu_id -r MODEL.ref.trn trn -h MODEL.hyp.trn trn

sclite gives a substitution the weight 4 and a deletion or an insertion 3, and counts the errors of the cheapest
alignment. That can be more errors than the smallest number, which the error rates here count. If almost every word of
an utterance is wrong, sclite may prefer a deletion and an insertion to substitutions.
Source: https://github.com/usnistgov/SCTK, doc/infmts.htm
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from hsa.errors import DestinationError, HsaError, MachineError, RequestError, shown
from hsa.evaluation.scores import UtteranceScore
from hsa.option_names import option
from hsa.system.descriptors import reason
from hsa.system.fsio import MACHINE_ERRNOS
from hsa.system.staging import hidden_sibling
from hsa.system.types import PathLike

UNKNOWN = "unknown"
"""The speaker of utterances that have no speaker."""

MARKS = str.maketrans("(){};@*", "（）｛｝；＠＊")  # noqa: RUF001
"""Special characters of a trn file, and the wide characters that replace them: the format has no escapes."""

_MACHINE = {*MACHINE_ERRNOS, errno.ENOSPC, errno.EDQUOT}
_NO_ID = re.compile(r"[\s(){};@*\x00-\x1f\x7f]")
_NO_FILE_NAME = re.compile(r"[^\w.+-]")


def write_trn(folder: PathLike, model_name: str, utterances: Sequence[UtteranceScore]) -> tuple[Path, Path]:
    """Write FOLDER/MODEL.ref.trn and MODEL.hyp.trn, one line per utterance: "text (speaker-set_id)".

    Texts are the normalised ones. Utterances with an empty normalised reference are left out, as from the scores. In
    `model_name`, all but letters, digits, dots, hyphens and plus signs become underscores; `check_trn_names` rejects
    names that become equal. Existing files are replaced atomically. Raises DestinationError if they cannot be written,
    MachineError if the disk is full or fails.

    Example:
        >>> write_trn("trn", "merged", scores)  # doctest: +SKIP
        (PosixPath('trn/merged.ref.trn'), PosixPath('trn/merged.hyp.trn'))
    """
    folder = Path(folder)
    kept = [score for score in utterances if not score.is_empty]
    names = _names(kept)
    stem = _stem(model_name)
    files = (folder / f"{stem}.ref.trn", folder / f"{stem}.hyp.trn")
    texts = ([score.reference for score in kept], [score.hypothesis for score in kept])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _problem(folder, error) from error
    for file, lines in zip(files, texts, strict=True):
        _write(file, (f"{text.translate(MARKS)} ({name})\n" for text, name in zip(lines, names, strict=True)))
    return files


def check_trn_names(model_names: Iterable[str]) -> None:
    """Raise RequestError if the files of two models would have the same name, so that one would replace the other.

    Example:
        >>> check_trn_names(["merged", "primary"])
    """
    models: dict[str, str] = {}
    for name in model_names:
        stem = _stem(name)
        if stem in models:
            raise RequestError(
                f"the trn files of {shown(models[stem], 200)} and {shown(name, 200)} would have one name, "
                f"{stem}.hyp.trn; rename one of the models, or give each a run and a {option('trn')} of its own"
            )
        models[stem] = name


def _stem(model_name: str) -> str:
    """The prefix of the names of a model's files."""
    return _NO_FILE_NAME.sub("_", model_name).lstrip(".") or "model"


def _write(path: Path, lines: Iterable[str]) -> None:
    part = hidden_sibling(path, ".hsa-part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise _problem(path, error) from error


def _problem(path: Path, error: OSError) -> HsaError:
    text = f"{path}: the trn file cannot be written: {reason(error)}"
    if error.errno in _MACHINE:
        return MachineError(f"{text}; make room on the disk, or choose another directory")
    return DestinationError(f"{text}; choose another directory")


def _names(scores: Iterable[UtteranceScore]) -> list[str]:
    """A unique name for each utterance, ignoring case. sclite takes the part before the first hyphen as the speaker."""
    names: list[str] = []
    numbers: dict[str, int] = {}  # the last suffix tried for a repeated name
    for score in scores:
        speaker = _NO_ID.sub("_", score.speaker or UNKNOWN).replace("-", "_")
        plain = name = f"{speaker}-{_NO_ID.sub('_', f'{score.set}_{score.id}')}"
        while name.casefold() in numbers:
            numbers[plain.casefold()] += 1
            name = f"{plain}.{numbers[plain.casefold()]}"
        numbers[name.casefold()] = 1
        names.append(name)
    return names
