"""Transcripts on disk: JSON lines, one file for each model and set, found again by a key.

The first line is an object with everything that determines the transcripts, and the key, which is its BLAKE3. Batches
are appended to `NAME.jsonl.partial`, which is renamed when the last one is written: a file without `.partial` is
complete. A run that was killed resumes after the last whole batch, so its batches are those of an uninterrupted run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, overload

from hsa.errors import DestinationError
from hsa.evaluation.models import OpenModel
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.utterance import Utterance
from hsa.option_names import option
from hsa.system import fsio
from hsa.system.digests import digest_of

FORMAT = 1
FOLDER = "hypotheses"
PARTIAL = ".partial"
KEY_SHOWN = 16
"""Digits of the key in a file name: enough to tell the files of one directory apart."""

T = TypeVar("T")

_UNPLAIN = re.compile(r"[^A-Za-z0-9_.+-]+")


@dataclass(frozen=True)
class Transcript:
    """The unmodified text that a model wrote for one utterance."""

    id: str
    text: str

    def line(self) -> bytes:
        return _line({"id": self.id, "text": self.text})


def describe(
    model: OpenModel, set_digest: str, utterances: int, options: DecodingOptions, device: str
) -> dict[str, Any]:
    """Everything that determines the transcripts of a model and a set. Names and references have no effect and are left
    out.

    The batch size is left out if it has no effect.
    """
    return {
        "format": FORMAT,
        "model": model.digest,
        "data": set_digest,
        "utterances": utterances,
        "language": options.language,
        "task": options.task,
        "beams": options.beams,
        "max_tokens": options.max_tokens,
        "batch": None if is_exact(model, options, device) else options.batch,
        "device": device.partition(":")[0],
        "dtype": _dtype(model, options, device),
        "versions": {name: version(name) for name in ("torch", "transformers", "soxr", "soundfile")},
    }


def is_exact(model: OpenModel, options: DecodingOptions, device: str) -> bool:
    """Whether the transcripts do not depend on the batch size: greedy decoding in float32 on a CPU.

    Example:
        >>> is_exact(model, DecodingOptions(beams=5), "cpu")  # doctest: +SKIP
        False
    """
    return device == "cpu" and _dtype(model, options, device) == "float32" and options.beams == 1


def _dtype(model: OpenModel, options: DecodingOptions, device: str) -> str:
    if options.dtype != "auto":
        return options.dtype
    return "float32" if device == "cpu" else model.dtype


def key_of(description: Mapping[str, Any]) -> str:
    """BLAKE3 of a description."""
    return digest_of(json.dumps(description, sort_keys=True).encode("utf-8"))


class Hypotheses:
    """The transcripts of one model and one set, kept in `folder`, or only in memory if it is None.

    `order` lists the utterances in the order of decoding. `batch` is the number of utterances decoded at a time.
    """

    def __init__(
        self, folder: Path | None, name: str, description: Mapping[str, Any], order: Sequence[Utterance], batch: int
    ) -> None:
        self.key = key_of(description)
        self._head = {"key": self.key, **description}
        self._order, self._batch = order, batch
        self._folder = folder
        self._name = f"{name}.{self.key[:KEY_SHOWN]}.jsonl"
        self.texts: dict[str, str] = {}
        self._is_whole = False
        self._load()

    @property
    def missing(self) -> Rest[Utterance]:
        """The utterances that are still to be decoded, in order."""
        return Rest(self._order, len(self.texts))

    @contextmanager
    def appending(self) -> Iterator[Hypotheses]:
        """Open the file for writing and lock it. DestinationError if another run holds the lock."""
        if self._folder is None or self._is_whole:
            yield self
            return
        path = self._folder / f"{self._name}{PARTIAL}"
        with fsio.map_write_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            with fsio.map_write_errors(path):
                _lock(fd, path)
                self._begin(fd)
            self._fd, self._path = fd, path
            yield self
            if not self.missing:
                with fsio.map_write_errors(path):
                    fsio.sync(fd)
                    fsio.rename(path, self._folder / self._name)
                self._is_whole = True
        finally:
            os.close(fd)

    def add(self, transcripts: Sequence[Transcript]) -> None:
        """Keep the transcripts of the next batch."""
        expected = [each.id for each in self.missing[: len(transcripts)]]
        assert [each.id for each in transcripts] == expected
        self.texts.update((each.id, each.text) for each in transcripts)
        if self._folder is not None:
            with fsio.map_write_errors(self._path):
                _write(self._fd, b"".join(each.line() for each in transcripts))

    def _load(self) -> None:
        """Load the transcripts of an earlier run with the same key, whatever its names for the model and the set."""
        if self._folder is None:
            return
        ending = f".{self.key[:KEY_SHOWN]}.jsonl"
        for name in sorted(os.listdir(self._folder)):
            if name.endswith((ending, f"{ending}{PARTIAL}")):
                texts = self._read((self._folder / name).read_bytes())
                if len(texts) > len(self.texts):
                    self.texts = texts
                    self._name = name.removesuffix(PARTIAL)
                    self._is_whole = len(texts) == len(self._order) and not name.endswith(PARTIAL)

    def _read(self, data: bytes) -> dict[str, str]:
        """The transcripts of whole batches in a file; none if its first line belongs to another key."""
        head, *lines = data.split(b"\n")[:-1] or [b""]  # an unfinished last line is dropped
        if head + b"\n" != _line(self._head):
            return {}
        texts: dict[str, str] = {}
        for utterance, line in zip(self._order, lines, strict=False):
            text = _text_of(line, utterance.id)
            if text is None:
                break
            texts[utterance.id] = text
        if len(texts) < len(self._order):
            whole = len(texts) // self._batch * self._batch
            texts = dict(list(texts.items())[:whole])
        return texts

    def _begin(self, fd: int) -> None:
        """Truncate the file after the known transcripts. Rewrite them if the file does not begin with them."""
        lines = [_line(self._head), *(Transcript(*item).line() for item in self.texts.items())]
        known = b"".join(lines)
        if os.pread(fd, len(known), 0) != known:
            os.ftruncate(fd, 0)
            _write(fd, known)
        os.ftruncate(fd, len(known))
        os.lseek(fd, 0, os.SEEK_END)


class Rest(Sequence[T]):
    """A view of a sequence without its first items. Slicing it copies no more than the slice.

    Example:
        >>> Rest("abcdef", 2)[:3]
        ['c', 'd', 'e']
    """

    def __init__(self, items: Sequence[T], first: int) -> None:
        self._items, self._first = items, first

    def __len__(self) -> int:
        return len(self._items) - self._first

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[T]: ...

    def __getitem__(self, place: int | slice) -> T | Sequence[T]:
        places = range(self._first, len(self._items))[place]
        if isinstance(places, int):
            return self._items[places]
        return [self._items[at] for at in places]


def plain_name(*names: str) -> str:
    """A file name made from the names of models and sets.

    Example:
        >>> plain_name("org/model", "noisy test")
        'org-model.noisy-test'
    """
    return ".".join(_UNPLAIN.sub("-", name).strip(".-")[:60] or "-" for name in names)


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _text_of(line: bytes, id: str) -> str | None:
    """The text of a line that belongs to this utterance; None for any other line."""
    try:
        document = json.loads(line)
    except ValueError:
        return None
    text = document.get("text") if isinstance(document, dict) and document.get("id") == id else None
    return text if isinstance(text, str) else None


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _lock(fd: int, path: Path) -> None:
    if not fsio.hold(fd):
        raise DestinationError(f"another run writes {path}; wait for it to end, or give another {option('output')}")
