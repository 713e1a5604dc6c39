"""A set of speech: utterances with their references, as the readers of manifests return them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Utterance:
    """One reference and its audio.

    `id` is unique in its set, `audio` is an absolute path, and `text` is the reference as written. `start` and `end`
    are seconds in the file. Without them, the audio is the whole file.

    Example:
        >>> Utterance("utt_000", Path("/clips/utt_000.flac"), "Good morning.").speaker is None
        True
    """

    id: str
    audio: Path
    text: str
    speaker: str | None = None
    domain: str | None = None
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class DataSet:
    """The utterances of one manifest, in its order. `notes` are plain sentences about the reader's observations.

    Example:
        >>> DataSet("test", Path("/clips"), (), ()).name
        'test'
    """

    name: str
    path: Path
    utterances: tuple[Utterance, ...]
    notes: tuple[str, ...]
