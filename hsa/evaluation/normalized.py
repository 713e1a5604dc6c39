"""Normalise the texts of utterances, and name the source of a text that cannot be normalised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hsa.errors import DataError, listed, shown
from hsa.evaluation.prepared import PreparedSet
from hsa.evaluation.utterance import Utterance
from hsa.option_names import option

Normalize = Callable[[str], str]


def normalized_reference(utterance: Utterance, set_name: str, normalize: Normalize) -> str:
    """Return the normalised reference, with one space between words. DataError, which names the utterance, if it cannot
    be normalised.

    Example:
        >>> normalized_reference(Utterance("a", Path("/a.wav"), "Good  morning!"), "test", normalizer("plain"))
        'good morning'
    """
    whose = f"the reference of {_named(utterance, set_name)}"
    return _normalized(utterance.text, whose, normalize, ", or correct the text")


def normalized_hypothesis(text: str, utterance: Utterance, set_name: str, normalize: Normalize) -> str:
    """Return the normalised text that a model wrote for an utterance, like `normalized_reference`.

    Example:
        >>> utterance = Utterance("a", Path("/a.wav"), "Good morning!")
        >>> normalized_hypothesis("Good evening.", utterance, "test", normalizer("plain"))
        'good evening'
    """
    return _normalized(text, f"what it wrote for {_named(utterance, set_name)}", normalize)


def check_references(sets: Sequence[PreparedSet], normalize: Normalize) -> dict[str, int]:
    """Count the references of each set that have no word after normalisation, by the set's name.

    Raises DataError, before hours are spent on decoding, if a reference cannot be normalised. Also raises it if no
    reference of a set has a word, because such a set has no score.

    Example:
        >>> check_references(sets, normalizer("plain"))  # doctest: +SKIP
        {'clean': 0, 'noisy': 2}
    """
    empty = {
        data.name: sum(not normalized_reference(each, data.name, normalize) for each in data.utterances)
        for data in sets
    }
    wordless = [data.name for data in sets if empty[data.name] == len(data.utterances)]
    if wordless:
        raise DataError(
            f"no reference of {listed(wordless, 'or')} has a word once normalised; look at the texts, choose another "
            f"{option('normalizer')}, or leave the set out"
        )
    return empty


@contextmanager
def naming_model(name: str, *, are_kept: bool) -> Iterator[None]:
    """Name the model in a DataError about its texts. `are_kept` says that its transcripts are in a directory, so
    another run need not decode them again.

    Example:
        >>> with naming_model("merged", are_kept=True):
        ...     score_utterance(utterance, text, set_name="test", normalize=normalizer("basic"))  # doctest: +SKIP
    """
    try:
        yield
    except DataError as error:
        kept = "transcripts stay" if are_kept else f"{option('output')} keeps transcripts"
        raise DataError(f"{name} cannot be scored: {error}, or leave the model out; {kept}") from error


def _normalized(text: str, whose: str, normalize: Normalize, remedy: str = "") -> str:
    try:
        return " ".join(normalize(text).split())
    except DataError as error:
        raise DataError(f"{whose}: {error}{remedy}") from error


def _named(utterance: Utterance, set_name: str) -> str:
    return f"utterance {shown(utterance.id, 200)} of set {shown(set_name, 200)}"
