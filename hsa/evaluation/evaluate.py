"""`hsa.evaluate`: transcribe sets of speech with models, and score their transcripts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from hsa.arguments import check_functions, check_paths, check_values
from hsa.errors import DestinationError, RequestError
from hsa.evaluation.models import NamedModel, OpenModel, names_of, open_model, parse_model
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.outputs import check_output, write_scores
from hsa.evaluation.prepared import GivenSet, open_sets
from hsa.evaluation.report import Evaluation
from hsa.evaluation.run import EvaluationRun, check_installed, check_scoring
from hsa.evaluation.transcription import EvaluationProgress
from hsa.evaluation.trn import check_trn_names, write_trn
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
    """Transcribe sets of speech with models, and score their transcripts.

    Args:
        models: a checkpoint directory, a hub id or `PRIMARY+PATCH.safetensors`, or several of them.
        data: a set of `hsa.data`, a path, or the text `NAME=PATH`, or several of them.
        output: a directory for transcripts, scores.csv, scores.json and report.html. Transcripts that are already
            there are reused, and an interrupted run resumes.
        baseline: the model from which differences are taken. It is evaluated too if it is not among `models`.
        normalizer: `auto`, `whisper`, `basic`, `plain` or `none`: see `hsa.evaluation.normalizers`.
        language: the language spoken, a code such as `de`; without it a multilingual model detects it.
        task: `transcribe`, or `translate` into English.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on a CPU, the checkpoint's own on a GPU), `float32`, `float16` or `bfloat16`.
        batch: number of utterances decoded at a time.
        beams: width of the beam search; 1 is greedy decoding.
        max_tokens: maximum tokens of an utterance, after which it is cut; None is 224 for a Whisper.
        limit: use only this many utterances of each set, from its start.
        confidence: of the intervals, between 0 and 1.
        trn: a directory for NIST's trn files, which sclite scores.
        progress: called after each batch with a `Step`.

    Raises RequestError for bad arguments, SourceError for a model that cannot transcribe, DataError for a bad set,
    AudioError for bad audio, and DestinationError if the output may not be written.

    Example:
        >>> found = hsa.evaluate("merged", hsa.data("test.tsv"), baseline="m1")
        >>> found["merged"].wer == found["merged"].scores[0].words.rate
        True
    """
    started = time.perf_counter()
    options = DecodingOptions(language, task, beams, batch, device, dtype, max_tokens)
    check_scoring(normalizer, limit, confidence)
    check_functions(progress=progress)
    named, baseline_at = _named(models, baseline)
    check_installed()
    sets = open_sets(data, limit)
    folder = None if output is None else check_output(output, [each.folder for each in named if each.folder])
    names = names_of(named)
    trn_folder = None if trn is None else _checked_trn(trn, names)
    with ExitStack() as stack:
        hub = Hub(bars=progress is not None)
        opened = _open(named, names, options, hub, stack)
        run = EvaluationRun.of(sets, limit, options, normalizer, confidence)
        report = run.evaluate(opened, baseline_at, folder, progress, started, hub.notes)
    if trn_folder is not None:
        for each in report.models:
            write_trn(trn_folder, each.name, each.utterances)
    if folder is not None:
        write_scores(report, folder)
    return report


def _named(models: PathLike | Sequence[PathLike], baseline: PathLike | None) -> tuple[list[NamedModel], int | None]:
    """The distinct models, and the index of the baseline, which is put first if it is not among them."""
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


def _checked_trn(trn: PathLike, names: Sequence[str]) -> Path:
    check_paths(trn=trn)
    check_trn_names(names)
    folder = Path(trn).expanduser()
    if os.path.lexists(folder) and not folder.is_dir():
        raise DestinationError(f"{option('trn')} {folder} is not a directory; choose another")
    return folder


def _open(
    named: Sequence[NamedModel], names: Sequence[str], options: DecodingOptions, hub: Hub, stack: ExitStack
) -> list[OpenModel]:
    """Open all models first, so that an unsuitable one fails before another has been decoded for an hour."""
    opened = []
    for model, name in zip(named, names, strict=True):
        opened.append(open_model(model, name, hub, stack))
        opened[-1].kind.check(options)
    return opened
