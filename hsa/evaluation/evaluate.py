"""`hsa.evaluate`: transcribe sets of speech with models, and score what they write."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from hsa.arguments import check_functions, check_paths, check_values
from hsa.errors import DestinationError, RequestError, shown
from hsa.evaluation.bootstrap import check_confidence
from hsa.evaluation.data import check_limit
from hsa.evaluation.decoding import chosen_device
from hsa.evaluation.extras import needed_for_evaluation
from hsa.evaluation.hypotheses import FOLDER, is_exact
from hsa.evaluation.model_scores import ModelScores
from hsa.evaluation.models import NORMALIZER, NamedModel, OpenModel, names_of, open_model, parse_model
from hsa.evaluation.normalized import check_references, naming_model
from hsa.evaluation.normalizers import NORMALIZERS
from hsa.evaluation.normalizers import normalizer as normalizer_named
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.outputs import check_output, write_scores
from hsa.evaluation.prepared import AudioDigests, GivenSet, PreparedSet, open_sets, prepare
from hsa.evaluation.report import Evaluation
from hsa.evaluation.scores import UtteranceScore, score_utterance, scores_of
from hsa.evaluation.transcription import EvaluationProgress, Transcription
from hsa.evaluation.trn import write_trn
from hsa.option_names import option
from hsa.sources.hub.client import Hub
from hsa.system import fsio
from hsa.system.types import PathLike


@fsio.map_os_errors()
def evaluate(
    models: PathLike | Sequence[PathLike],
    data: GivenSet | Sequence[GivenSet],
    *,
    output: PathLike | None = None,
    baseline: PathLike | None = None,
    normalizer: str = "auto",
    language: str | None = None,
    task: str = "transcribe",
    device: str = "auto",
    dtype: str = "auto",
    batch: int = 16,
    beams: int = 1,
    max_tokens: int | None = None,
    limit: int | None = None,
    confidence: float = 0.95,
    trn: PathLike | None = None,
    progress: EvaluationProgress | None = None,
) -> Evaluation:
    """Transcribe sets of speech with models, and score what they write.

    Args:
        models: a checkpoint directory, a hub id or `PRIMARY+PATCH.safetensors`, or several of them.
        data: a set of `hsa.data`, a path, or the text `NAME=PATH`, or several of them.
        output: a directory for transcripts, scores.csv, scores.json and report.html. Transcripts that stand there are
            not made again, and a run that was interrupted goes on.
        baseline: the model from which differences are taken, evaluated too where it is none of `models`.
        normalizer: `auto`, `whisper`, `basic`, `plain` or `none`: see `hsa.evaluation.normalizers`.
        language: the language spoken, a code such as `de`; without it a multilingual model detects it.
        task: `transcribe`, or `translate` into English.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on a CPU, the checkpoint's own on a GPU), `float32`, `float16` or `bfloat16`.
        batch: utterances that are decoded at a time.
        beams: width of the beam search; 1 is greedy decoding.
        max_tokens: tokens after which an utterance that has not ended is cut; None is 224 for a Whisper.
        limit: take the first so many utterances of each set.
        confidence: of the intervals, between 0 and 1.
        trn: a directory for NIST's trn files, which sclite scores.
        progress: called after each batch with a `Step`.

    Raises RequestError for bad arguments, SourceError for a model that cannot transcribe, DataError for a bad set and
    AudioError for bad audio, DestinationError where the output may not be written.

    Example:
        >>> found = hsa.evaluate("merged", hsa.data("test.tsv"), baseline="primary")  # doctest: +SKIP
        >>> found["merged"].wer, found["merged"].scores[0].difference.wer  # doctest: +SKIP
        (0.0453, -0.0344)
    """
    started = time.perf_counter()
    options = DecodingOptions(language, task, beams, batch, device, dtype, max_tokens)
    _check(normalizer, limit, confidence, progress)
    named, baseline_at = _named(models, baseline)
    _check_installed()
    sets = open_sets(data, limit)
    folder = None if output is None else check_output(output, [each.folder for each in named if each.folder])
    trn_folder = None if trn is None else _checked_trn(trn)
    with ExitStack() as stack:
        hub = Hub(bars=progress is not None)
        opened = _open(named, options, hub, stack)
        digests = AudioDigests()
        ready = [prepare(each, limit, digests) for each in sets]
        normalizer, normalize = _normalizer(normalizer, opened, baseline_at, options)
        check_references(ready, normalize)
        work = Transcription(opened, ready, options, _hypotheses(folder), progress)
        work.run()
        scored = [_scored(model, ready, work, normalize) for model in opened]
        notes = _notes(opened, ready, scored[0], options, normalizer)
    reference = None if baseline_at is None else scored[baseline_at]
    report = Evaluation(
        models=tuple(
            _model_scores(model, own, None if own is reference else reference, confidence)
            for model, own in zip(opened, scored, strict=True)
        ),
        sets=tuple(ready),
        baseline=None if baseline_at is None else opened[baseline_at].name,
        normalizer=normalizer,
        confidence=confidence,
        options=options,
        device=chosen_device(options.device),
        output=folder,
        decoded=work.decoded,
        audio_seconds=work.audio_seconds,
        seconds=time.perf_counter() - started,
        notes=tuple(dict.fromkeys(notes)),
        run_notes=tuple(hub.notes),
    )
    if trn_folder is not None:
        for each in report.models:
            write_trn(trn_folder, each.name, each.utterances)
    if folder is not None:
        write_scores(report, folder)
    return report


# --- before anything is decoded -------------------------------------------------------------------------------------


def _check(normalizer: str, limit: int | None, confidence: float, progress: EvaluationProgress | None) -> None:
    if normalizer not in NORMALIZERS:
        raise RequestError(f"{option('normalizer')} must be one of {', '.join(NORMALIZERS)}, got {shown(normalizer)}")
    check_limit(limit)
    check_confidence(confidence)
    check_functions(progress=progress)


def _check_installed() -> None:
    """RequestError where a library of the extra is missing, before any audio is looked at."""
    with needed_for_evaluation("jiwer"):
        import jiwer  # noqa: F401
    with needed_for_evaluation("soundfile"):
        import soundfile  # noqa: F401
    with needed_for_evaluation("soxr"):
        import soxr  # noqa: F401


def _named(models: PathLike | Sequence[PathLike], baseline: PathLike | None) -> tuple[list[NamedModel], int | None]:
    """The models, each once, and the place of the baseline, which comes first where it is none of them."""
    several = [models] if isinstance(models, (str, os.PathLike)) else models
    check_values(models=several)
    if not len(several):
        raise RequestError("there is nothing to evaluate; give a model")
    named = list({each.place: each for each in map(parse_model, several)}.values())
    if baseline is None:
        return named, None
    check_paths(baseline=baseline)
    reference = parse_model(baseline)
    places = [each.place for each in named]
    if reference.place in places:
        return named, places.index(reference.place)
    return [reference, *named], 0


def _checked_trn(trn: PathLike) -> Path:
    check_paths(trn=trn)
    folder = Path(trn).expanduser()
    if os.path.lexists(folder) and not folder.is_dir():
        raise DestinationError(f"{option('trn')} {folder} is not a directory; choose another")
    return folder


def _open(named: Sequence[NamedModel], options: DecodingOptions, hub: Hub, stack: ExitStack) -> list[OpenModel]:
    """All models, so that one that cannot do what is asked says so before another has been decoded for an hour."""
    opened = []
    for model, name in zip(named, names_of(named), strict=True):
        opened.append(open_model(model, name, hub, stack))
        opened[-1].kind.check(options)
    return opened


def _normalizer(
    name: str, models: Sequence[OpenModel], baseline_at: int | None, options: DecodingOptions
) -> tuple[str, Callable[[str], str]]:
    """One normaliser for all models, whose scores could not be compared otherwise, and its name."""
    speller = _speller(models, baseline_at)
    if name == "auto":
        name = "whisper" if speller.kind.whisper else "plain"
    language = "en" if options.task == "translate" else options.language
    return name, normalizer_named(name, language=language, model=speller.folder)


def _speller(models: Sequence[OpenModel], baseline_at: int | None) -> OpenModel:
    """The model whose normalizer.json and language count: the baseline or else the first, a Whisper where there is
    one."""
    ordered = [*([] if baseline_at is None else [models[baseline_at]]), *models]
    return next((each for each in ordered if each.kind.whisper), ordered[0])


def _hypotheses(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    path = folder / FOLDER
    with fsio.map_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


# --- afterwards -----------------------------------------------------------------------------------------------------


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
        notes.append(
            f"{', '.join(detecting)}: the language of each utterance is detected; where you know it, give "
            f"{option('language')}"
        )
    device = chosen_device(options.device)
    if not all(is_exact(each, options, device) for each in models):
        notes.append(
            "another batch size may change a word: only greedy decoding in float32 on a CPU gives the same transcripts "
            "whatever the batch"
        )
    return notes
