"""A prepared set: the length of its audio, a digest of the transcripts' inputs, and the order of decoding."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from hsa.errors import AudioError, RequestError, shown
from hsa.evaluation.audio import AudioHeader, check_audio, duration, read_header
from hsa.evaluation.data import data as read_data
from hsa.evaluation.data import parse_set
from hsa.evaluation.files import open_regular
from hsa.evaluation.utterance import DataSet, Utterance
from hsa.option_names import option
from hsa.system.types import PathLike

_READ = 1 << 20

GivenSet = DataSet | PathLike
"""A set as a caller gives it: already read, a path, or the text NAME=PATH."""


@dataclass(frozen=True)
class PreparedSet:
    """The utterances of a set that are evaluated.

    `seconds` maps each utterance's id to the length of its audio. `digest` is the BLAKE3 of ids, audio bytes and times.
    `order` lists the longest utterances first: a batch then has utterances of similar length, and a batch that needs
    too much memory fails at once.
    """

    name: str
    path: Path
    utterances: tuple[Utterance, ...]
    order: tuple[Utterance, ...]
    seconds: dict[str, float]
    digest: str
    notes: tuple[str, ...]


def open_sets(given: GivenSet | Sequence[GivenSet], limit: int | None = None) -> list[DataSet]:
    """Read every set, or the first `limit` utterances of each. RequestError if there are none, or two have one name.

    Example:
        >>> [each.name for each in open_sets(["noisy=test.tsv", "clean"])]
        ['noisy', 'clean']
    """
    several = [given] if isinstance(given, (DataSet, str, os.PathLike)) else list(given)
    if not several:
        raise RequestError(f"there is nothing to evaluate on; give {option('data')} a set")
    sets = [_open(each, limit) for each in several]
    names: dict[str, DataSet] = {}
    for each in sets:
        if each.name in names:
            raise RequestError(
                f"two sets are named {shown(each.name)}, {names[each.name].path} and {each.path}; give one a name of "
                f"its own: NAME=PATH"
            )
        names[each.name] = each
        if not each.utterances:
            raise RequestError(f"{each.path} holds no utterances; there is nothing to evaluate on")
    return sets


def _open(given: GivenSet, limit: int | None) -> DataSet:
    if isinstance(given, DataSet):
        return given
    return parse_set(given, limit) if isinstance(given, str) else read_data(given, limit=limit)


class AudioDigests:
    """The BLAKE3 digests and headers of audio files, each read once for all sets."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}
        self._headers: dict[Path, AudioHeader] = {}

    def seconds(self, utterance: Utterance) -> float:
        """The length of an utterance's audio in seconds. AudioError if it cannot be determined."""
        if utterance.audio not in self._headers:
            self._headers[utterance.audio] = read_header(utterance)
        return duration(utterance, self._headers[utterance.audio])

    def of(self, path: Path) -> str:
        """The digest of a file. AudioError if the file cannot be read."""
        if path not in self._known:
            digest = blake3()
            fd = open_regular(path, "an audio file", AudioError)
            try:
                while data := os.read(fd, _READ):
                    digest.update(data)
            finally:
                os.close(fd)
            self._known[path] = digest.hexdigest()
        return self._known[path]


def prepare(data: DataSet, limit: int | None, digests: AudioDigests) -> PreparedSet:
    """Read the audio headers and digests of a set, or of its first `limit` utterances. Raises AudioError."""
    utterances = data.utterances[:limit]
    check_audio(utterances)
    seconds = {each.id: digests.seconds(each) for each in utterances}
    return PreparedSet(
        data.name,
        data.path,
        utterances,
        tuple(sorted(utterances, key=lambda each: -seconds[each.id])),  # stable: equals keep the manifest's order
        seconds,
        _digest(utterances, digests),
        data.notes,
    )


def _digest(utterances: Sequence[Utterance], digests: AudioDigests) -> str:
    """BLAKE3 of one JSON line for each utterance, without a final line break."""
    digest = blake3()
    for number, each in enumerate(utterances):
        line = json.dumps([each.id, digests.of(each.audio), each.start, each.end])
        digest.update(("\n" * (number > 0) + line).encode("utf-8"))
    return digest.hexdigest()


def sets_text(sets: Sequence[PreparedSet]) -> str:
    """A short description of sets.

    Example:
        >>> sets_text(sets)  # doctest: +SKIP
        '2 sets, 120 utterances, 9.3 minutes of speech'
    """
    utterances = sum(len(each.utterances) for each in sets)
    seconds = sum(sum(each.seconds.values()) for each in sets)
    sets_named = f"{len(sets)} sets" if len(sets) > 1 else f"set {sets[0].name}"
    speech = f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"
    return f"{sets_named}, {utterances} utterance{'s' * (utterances != 1)}, {speech} of speech"
