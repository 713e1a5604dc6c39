"""The words of a reference and of a model's text side by side, as shown on report pages."""

from __future__ import annotations

from typing import NamedTuple

from hsa.evaluation.scores import alignment

MOST_WORDS = 300
"""Maximum pairs of words shown per utterance. An hour of speech has nine thousand."""

_OPERATIONS = {"equal": "=", "substitute": "s", "delete": "d", "insert": "i"}


class WordPairs(NamedTuple):
    """`pairs` are lists of an operation (=, s, d or i), the reference's word and the model's. `cut` counts the pairs
    that are left out."""

    pairs: list[list[str]]
    cut: int


def word_pairs(reference: str, hypothesis: str) -> WordPairs:
    """The first words of two normalised texts side by side, at most `MOST_WORDS` pairs.

    Raises RequestError if jiwer is not installed.

    Example:
        >>> word_pairs("a b c", "a d").pairs
        [['=', 'a', 'a'], ['d', 'b', ''], ['s', 'c', 'd']]
    """
    found = alignment(reference, hypothesis)
    shown = [[_OPERATIONS[kind], ours, theirs] for kind, ours, theirs in found[:MOST_WORDS]]
    return WordPairs(shown, len(found) - len(shown))
