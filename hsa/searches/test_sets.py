"""Test sets: decoded once, after the search, with the best candidate, the baselines and the fine-tunes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hsa.errors import AudioError, DataError
from hsa.evaluation.hypotheses import FOLDER, Hypotheses, Transcript, describe, plain_name
from hsa.evaluation.models import OpenModel
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.prepared import PreparedSet
from hsa.evaluation.scores import UtteranceScore, score_utterance
from hsa.evaluation.utterance import Utterance
from hsa.searches.pools import Pool, run_all
from hsa.searches.tasks import Transcribe
from hsa.searches.trials import Trial
from hsa.system import fsio
from hsa.system.digests import digest_of

BATCHES = 64
"""Maximum batches that are given to the workers together. Their transcripts are stored when all of them are done."""


class TestSets:
    """Transcripts of models on sets, stored in `folder` under a key of weights, audio and decoding, as by `hsa eval`.

    `anchor` is the model whose files are used to decode the candidates. Its digest is that of its small files.
    """

    __test__ = False  # tells pytest that this is not a test class

    def __init__(
        self,
        pool: Pool,
        anchor: OpenModel,
        sets: Sequence[PreparedSet],
        options: DecodingOptions,
        normalize: Callable[[str], str],
        folder: Path,
    ) -> None:
        self._pool, self._anchor, self._sets = pool, anchor, sets
        self._options, self._normalize = options, normalize
        self._folder = folder / FOLDER
        with fsio.map_write_errors(self._folder):
            self._folder.mkdir(exist_ok=True)

    def scores_of(self, trials: Sequence[Trial]) -> tuple[dict[str, list[UtteranceScore]], dict[str, str]]:
        """The scores of each complete trial's model, by name, and the reasons why other models have none, by name.

        A model has none if its texts cannot be normalised. Raises the errors of decoding.
        """
        found: dict[str, list[UtteranceScore]] = {}
        failures: dict[str, str] = {}
        for trial in trials:
            try:
                found[trial.name] = self.scores(trial)
            except AudioError:
                raise
            except DataError as error:
                failures[trial.name] = str(error)
        return found, failures

    def scores(self, trial: Trial) -> list[UtteranceScore]:
        """The scores of a complete trial's model on every utterance of all sets, in the sets' order.

        Raises DataError, which names the utterance, for a text that cannot be normalised, and the errors of decoding.
        """
        found: list[UtteranceScore] = []
        for each in self._sets:
            texts = self._texts(trial, each)
            found += [
                score_utterance(utterance, texts[utterance.id], set_name=each.name, normalize=self._normalize)
                for utterance in each.utterances
            ]
        return found

    def _texts(self, trial: Trial, data: PreparedSet) -> Mapping[str, str]:
        model = replace(self._anchor, digest=digest_of(f"{self._anchor.digest} {trial.result.weights}".encode("ascii")))
        description = describe(model, data.digest, len(data.order), self._options, self._pool.device)
        kept = Hypotheses(self._folder, plain_name(trial.name, data.name), description, data.order, self._options.batch)
        with kept.appending():
            while kept.missing:
                # With one worker, each batch is stored at once; several workers need several batches to share.
                count = BATCHES if self._pool.size > 1 else 1
                batches = _batches(kept.missing[: count * self._options.batch], self._options.batch)
                tasks = [Transcribe(trial.candidate, data.digest, batch) for batch in batches]
                for batch, texts in zip(batches, run_all(self._pool, tasks), strict=True):
                    kept.add([Transcript(each.id, text) for each, text in zip(batch, texts, strict=True)])
        return kept.texts


def _batches(utterances: Sequence[Utterance], size: int) -> list[tuple[Utterance, ...]]:
    rest = iter(utterances)
    return list(iter(lambda: tuple(itertools.islice(rest, size)), ()))


def failure_notes(best: str, failures: Mapping[str, str]) -> list[str]:
    """Notes on the models that are not compared on the test sets, with the reasons from `TestSets.scores_of`.

    Example:
        >>> failure_notes("trial 9", {"base": "what it wrote for utterance 'a' of set 'test': ..."})
        ["base is left out of the comparison on the test sets: what it wrote for utterance 'a' of set 'test': ..."]
    """
    if best in failures:
        why = failures[best]
        return [f"{best} could not be scored on the test sets, so the figures are those of the dev sets alone: {why}"]
    return [f"{name} is left out of the comparison on the test sets: {why}" for name, why in failures.items()]
