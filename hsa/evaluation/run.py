"""A run over prepared sets: decode models and score their transcripts. `hsa eval` and `hsa sweep` share it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsa.errors import RequestError, shown
from hsa.evaluation.bootstrap import check_confidence
from hsa.evaluation.data import check_limit
from hsa.evaluation.decoding import chosen_device
from hsa.evaluation.extras import needed_for_evaluation
from hsa.evaluation.hypotheses import FOLDER, is_exact
from hsa.evaluation.model_kinds import ModelKind
from hsa.evaluation.model_scores import ModelScores
from hsa.evaluation.models import NORMALIZER, OpenModel
from hsa.evaluation.normalized import check_references, naming_model
from hsa.evaluation.normalizers import NORMALIZERS
from hsa.evaluation.normalizers import normalizer as normalizer_named
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.prepared import AudioDigests, PreparedSet, prepare
from hsa.evaluation.report import Evaluation
from hsa.evaluation.scores import UtteranceScore, score_utterance, scores_of
from hsa.evaluation.transcription import EvaluationProgress, Transcription
from hsa.evaluation.utterance import DataSet
from hsa.option_names import option
from hsa.system import fsio

MOST_NAMED = 4
"""Maximum models that a note names."""


def check_scoring(normalizer: str, limit: int | None, confidence: float) -> None:
    """Raise RequestError for an unknown normaliser, a limit below 1, or an invalid confidence.

    Example:
        >>> check_scoring("auto", None, 0.95)
    """
    if normalizer not in NORMALIZERS:
        raise RequestError(f"{option('normalizer')} must be one of {', '.join(NORMALIZERS)}, got {shown(normalizer)}")
    check_limit(limit)
    check_confidence(confidence)


def check_installed() -> None:
    """Raise RequestError if a library of the extra is missing, before any audio is read.

    Example:
        >>> check_installed()
    """
    with needed_for_evaluation("jiwer"):
        import jiwer  # noqa: F401
    with needed_for_evaluation("soundfile"):
        import soundfile  # noqa: F401
    with needed_for_evaluation("soxr"):
        import soxr  # noqa: F401


@dataclass(frozen=True)
class EvaluationRun:
    """Prepared sets, and the settings for decoding and scoring models on them. `normalizer` may be `auto`.

    Example:
        >>> run = EvaluationRun.of(open_sets("test.tsv"), None, DecodingOptions(), "auto", 0.95)  # doctest: +SKIP
        >>> run.check([model.kind for model in models])  # doctest: +SKIP
        >>> run.evaluate(models, 0).models[1].wer  # doctest: +SKIP
        0.0453
    """

    sets: tuple[PreparedSet, ...]
    options: DecodingOptions
    normalizer: str
    confidence: float

    @classmethod
    def of(
        cls, sets: Sequence[DataSet], limit: int | None, options: DecodingOptions, normalizer: str, confidence: float
    ) -> EvaluationRun:
        """Read the audio headers of sets, or of the first `limit` utterances of each. Raises AudioError."""
        digests = AudioDigests()
        ready = tuple(prepare(each, limit, digests) for each in sets)
        return cls(ready, options, normalizer, confidence)

    def check(self, kinds: Sequence[ModelKind]) -> None:
        """Raise DataError if a set has no reference with a word, once normalised as for these models (baseline
        first)."""
        _, normalize = self._normalizer(kinds)
        check_references(self.sets, normalize)

    def evaluate(
        self,
        models: Sequence[OpenModel],
        baseline_at: int | None,
        folder: Path | None = None,
        progress: EvaluationProgress | None = None,
        started: float | None = None,
        run_notes: Sequence[str] = (),
    ) -> Evaluation:
        """Decode models and score them.

        `baseline_at` is the index of the model from which differences are taken. Transcripts are kept in `folder`,
        which may be new. `started` is the start time of the run, by `time.perf_counter`. `run_notes` are notes about
        this run.

        Raises the same DataError as `check`, and the errors of loading and decoding.
        """
        started = time.perf_counter() if started is None else started
        ordered = [*([] if baseline_at is None else [models[baseline_at]]), *models]
        normalizer, normalize = self._normalizer([each.kind for each in ordered])
        check_references(self.sets, normalize)
        work = Transcription(models, self.sets, self.options, _hypotheses(folder), progress)
        work.run()
        scored = [_scored(model, self.sets, work, normalize) for model in models]
        reference = None if baseline_at is None else scored[baseline_at]
        return Evaluation(
            models=tuple(
                _model_scores(model, own, None if own is reference else reference, self.confidence)
                for model, own in zip(models, scored, strict=True)
            ),
            sets=self.sets,
            baseline=None if baseline_at is None else models[baseline_at].name,
            normalizer=normalizer,
            confidence=self.confidence,
            options=self.options,
            device=chosen_device(self.options.device),
            output=folder,
            decoded=work.decoded,
            audio_seconds=work.audio_seconds,
            seconds=time.perf_counter() - started,
            notes=tuple(dict.fromkeys(_notes(models, self.sets, scored[0], self.options, normalizer))),
            run_notes=tuple(run_notes),
        )

    def _normalizer(self, kinds: Sequence[ModelKind]) -> tuple[str, Callable[[str], str]]:
        """The normaliser for all models, and its name. With several normalisers, scores could not be compared.

        The normalizer.json and language of the first Whisper are used, or else those of the first model.
        """
        speller = next((each for each in kinds if each.whisper), kinds[0])
        name = self.normalizer
        if name == "auto":
            name = "whisper" if speller.whisper else "plain"
        language = "en" if self.options.task == "translate" else self.options.language
        return name, normalizer_named(name, language=language, model=speller.folder)


def _hypotheses(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    path = folder / FOLDER
    with fsio.map_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def _scored(
    model: OpenModel, sets: Sequence[PreparedSet], work: Transcription, normalize: Callable[[str], str]
) -> list[UtteranceScore]:
    with naming_model(model.name, are_kept=work.folder is not None):
        return [
            score_utterance(each, work.texts[model.name, data.name][each.id], set_name=data.name, normalize=normalize)
            for data in sets
            for each in data.utterances
        ]


def _model_scores(
    model: OpenModel,
    own: Sequence[UtteranceScore],
    baseline: Sequence[UtteranceScore] | None,
    confidence: float,
) -> ModelScores:
    return ModelScores(model, scores_of(own, confidence=confidence, baseline=baseline), tuple(own))


def _notes(
    models: Sequence[OpenModel],
    sets: Sequence[PreparedSet],
    scored: Sequence[UtteranceScore],
    options: DecodingOptions,
    normalizer: str,
) -> list[str]:
    notes = [note for data in sets for note in data.notes]
    empty = sum(each.is_empty for each in scored)
    if empty:
        notes.append(f"{empty} of {len(scored)} utterances have an empty reference once normalised and are not scored")
    spellings = [each for each in models if each.kind.english and (each.folder / NORMALIZER).is_file()]
    if normalizer == "whisper" and not spellings and any(each.kind.english for each in models):
        notes.append(f"no model has a {NORMALIZER}, so that British and American spellings count as different words")
    detecting = [each.name for each in models if each.kind.multilingual and options.language is None]
    if detecting:
        several = len(detecting) > MOST_NAMED
        named = f"all {len(detecting)} multilingual models" if several else ", ".join(detecting)
        notes.append(
            f"{named}: the language of each utterance is detected; where you know it, give {option('language')}"
        )
    device = chosen_device(options.device)
    if not all(is_exact(each, options, device) for each in models):
        notes.append(
            "another batch size may change a word: only greedy decoding in float32 on a CPU gives the same transcripts "
            "whatever the batch"
        )
    return notes
