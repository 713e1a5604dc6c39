"""Test sets: decoded once, after the search, with the best candidate, the baselines and the fine-tunes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hsa.errors import AudioError, DataError
from hsa.evaluation.decoding import chosen_device
from hsa.evaluation.hypotheses import FOLDER, Hypotheses, Transcript, describe, plain_name
from hsa.evaluation.models import OpenModel
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.prepared import PreparedSet
from hsa.evaluation.scores import UtteranceScore, score_utterance
from hsa.searches.candidates import Candidate
from hsa.searches.evaluators import Decoder
from hsa.searches.resident_model import ResidentModel
from hsa.system import fsio


class TestSets:
    """Transcripts of models on sets, kept in `folder` under a key of weights, audio and decoding, as `hsa eval` does.

    `anchor` is the model whose files the candidates are decoded with. `on_batch` is called with a number of utterances.
    """

    __test__ = False  # no class of tests, whatever its name says to pytest

    def __init__(
        self,
        resident: ResidentModel,
        decoder: Decoder,
        anchor: OpenModel,
        sets: Sequence[PreparedSet],
        options: DecodingOptions,
        normalize: Callable[[str], str],
        folder: Path,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self._resident, self._decoder, self._anchor = resident, decoder, anchor
        self._sets, self._options, self._normalize = sets, options, normalize
        self._folder, self._on_batch = folder / FOLDER, on_batch
        with fsio.map_write_errors(self._folder):
            self._folder.mkdir(exist_ok=True)

    def scores_of(self, candidates: Iterable[Candidate]) -> tuple[dict[str, list[UtteranceScore]], dict[str, str]]:
        """The scores of each candidate by its name; and, by name, why the others have none.

        A candidate has none where the normaliser cannot read what it wrote. Raises what putting a candidate raises.
        """
        found: dict[str, list[UtteranceScore]] = {}
        failures: dict[str, str] = {}
        for candidate in candidates:
            try:
                found[candidate.name] = self.scores(candidate)
            except AudioError:
                raise
            except DataError as error:
                failures[candidate.name] = str(error)
        return found, failures

    def scores(self, candidate: Candidate) -> list[UtteranceScore]:
        """The scores of a candidate on every utterance of all sets, in the sets' order.

        Raises DataError for a text that cannot be normalised, which names the utterance, and what putting it raises.
        """
        weights = self._resident.put(candidate)
        self._decoder.begin_model(weights.encoder)
        found: list[UtteranceScore] = []
        for each in self._sets:
            texts = self._texts(candidate, weights.whole, each)
            found += [
                score_utterance(utterance, texts[utterance.id], set_name=each.name, normalize=self._normalize)
                for utterance in each.utterances
            ]
        return found

    def _texts(self, candidate: Candidate, weights: str, data: PreparedSet) -> Mapping[str, str]:
        model = replace(self._anchor, digest=weights)
        description = describe(model, data.digest, len(data.order), self._options, chosen_device(self._options.device))
        kept = Hypotheses(
            self._folder, plain_name(candidate.name, data.name), description, data.order, self._options.batch
        )
        with kept.appending():
            while batch := kept.missing[: self._options.batch]:
                texts = self._decoder.transcribe((data.digest, batch[0].id), batch)
                kept.add([Transcript(each.id, text) for each, text in zip(batch, texts, strict=True)])
                if self._on_batch is not None:
                    self._on_batch(len(batch))
        return kept.texts


def failure_notes(best: str, failures: Mapping[str, str]) -> list[str]:
    """Which models are not compared on the test sets, and why, by what `TestSets.scores_of` gives.

    Example:
        >>> failure_notes("trial 9", {"base": "what it wrote for utterance 'a' of set 'test': ..."})
        ["base is left out of the comparison on the test sets: what it wrote for utterance 'a' of set 'test': ..."]
    """
    if best in failures:
        why = failures[best]
        return [f"{best} could not be scored on the test sets, so the figures are those of the dev sets alone: {why}"]
    return [f"{name} is left out of the comparison on the test sets: {why}" for name, why in failures.items()]
