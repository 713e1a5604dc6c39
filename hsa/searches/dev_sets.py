"""The utterances on which candidates are scored: all sets in one shuffled order, in blocks, with their references."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hsa.errors import DataError
from hsa.evaluation.normalized import normalized_reference
from hsa.evaluation.prepared import PreparedSet
from hsa.evaluation.scores import UtteranceScore, score_utterance
from hsa.evaluation.utterance import Utterance
from hsa.system.digests import digest_of


@dataclass(frozen=True)
class Item:
    """An utterance of a set; `words` is the number of words in its normalised reference."""

    set: str
    utterance: Utterance
    words: int


@dataclass(frozen=True)
class DevSets:
    """Utterances of all sets in the order of decoding. `empty` counts those of each set with an empty reference."""

    names: tuple[str, ...]
    items: tuple[Item, ...]
    block: int
    empty: Mapping[str, int]
    digest: str
    normalize: Callable[[str], str]

    @property
    def words(self) -> dict[str, int]:
        """The number of words in the references of each set."""
        return {name: sum(item.words for item in self.items if item.set == name) for name in self.names}

    def blocks(self) -> list[tuple[int, int]]:
        """The half-open ranges of utterances that are decoded at a time: `block` of them each. The first block is split
        into two halves, so that a much worse candidate is stopped early."""
        count = len(self.items)
        ends = [self.block // 2, *range(self.block, count, self.block), count]
        edges = sorted({0, *(end for end in ends if end <= count)})
        return list(itertools.pairwise(edges))

    def errors(self, number: int, text: str) -> int:
        """The word errors of a model's text for an utterance."""
        return self.scored(number, text).words.errors

    def scored(self, number: int, text: str) -> UtteranceScore:
        item = self.items[number]
        return score_utterance(item.utterance, text, set_name=item.set, normalize=self.normalize)

    def rates(self, errors: Sequence[int]) -> dict[str, float]:
        """The word error rate of each set, from the errors of the first utterances; 0 for a set without any of them."""
        seen = list(zip(self.items, errors, strict=False))
        found = {}
        for name in self.names:
            words = sum(item.words for item, _ in seen if item.set == name)
            found[name] = sum(error for item, error in seen if item.set == name) / words if words else 0.0
        return found


def make_dev_sets(sets: Sequence[PreparedSet], normalize: Callable[[str], str], block: int, seed: int) -> DevSets:
    """Make dev sets of all utterances that have a reference. Their order depends only on the seed and their ids.

    Raises DataError for a set without a reference, and for a reference that cannot be normalised.
    """
    items: list[Item] = []
    empty: dict[str, int] = {}
    for each in sets:
        found = [Item(each.name, utterance, _words(utterance, each.name, normalize)) for utterance in each.utterances]
        scored = [item for item in found if item.words]
        if not scored:
            raise DataError(
                f"{each.path}: all {len(found)} references are empty once normalised, expected at least one with a "
                f"word; look at the texts, or choose another normalizer"
            )
        empty[each.name] = len(found) - len(scored)
        items += scored
    items.sort(key=lambda item: digest_of(f"{seed}\n{item.set}\n{item.utterance.id}".encode("utf-8", "surrogatepass")))
    about = "\n".join(f"{each.name} {each.digest}" for each in sets)
    references = "\n".join(normalize(item.utterance.text) for item in items)
    digest = digest_of(f"{about}\n{references}".encode("utf-8", "surrogatepass"))
    return DevSets(tuple(each.name for each in sets), tuple(items), block, empty, digest, normalize)


def _words(utterance: Utterance, set_name: str, normalize: Callable[[str], str]) -> int:
    return len(normalized_reference(utterance, set_name, normalize).split())
