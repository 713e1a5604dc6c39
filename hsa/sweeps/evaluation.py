"""Evaluate the points of a sweep, and the models that it merges, on sets of speech, as `hsa eval` does.

Every check that can fail early runs before the first point is written. Each patch in turn is applied to a checkpoint in
a temporary directory, where it replaces the one before.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hsa.actions.apply import apply_to
from hsa.actions.patch import PatchSources
from hsa.actions.request import Request
from hsa.engine.pipeline import Options
from hsa.errors import DestinationError, RequestError, SourceError
from hsa.evaluation.decoding import chosen_device
from hsa.evaluation.model_kinds import ModelKind, kind_of
from hsa.evaluation.models import TEMPORARY, NamedModel, OpenModel, open_model, open_written_model
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.outputs import check_output, write_scores
from hsa.evaluation.prepared import GivenSet, open_sets
from hsa.evaluation.run import EvaluationRun, check_installed, check_scoring
from hsa.evaluation.transcription import EvaluationProgress
from hsa.outputs.grid_point import GridPoint
from hsa.outputs.patch_reader import SUFFIX, open_patch
from hsa.outputs.sweep_index import SweepEntry
from hsa.sources.hub.client import Hub
from hsa.sweeps.scores import SweepScores
from hsa.system import fsio
from hsa.system.memory import PeakMemory
from hsa.system.staging import StagingDirectory
from hsa.system.threads import default_threads

FOLDER, CSV = "evaluation", "wer.csv"
"""The results of an evaluation in a sweep's directory, in addition to the points and their index."""

CONFIDENCE = 0.95
_START = b"model,place,"
"""The first bytes of wer.csv, by which a sweep recognizes its own file."""


def prepare_sets(
    data: GivenSet | Sequence[GivenSet], options: DecodingOptions, normalizer: str, limit: int | None
) -> EvaluationRun:
    """Prepare the sets of an evaluation, before any source is opened.

    Raises RequestError for bad arguments, a missing device or a missing library, DataError for a bad set, and
    AudioError for bad audio.

    Example:
        >>> prepare_sets("test.tsv", DecodingOptions(), "auto", None).sets[0].name  # doctest: +SKIP
        'test'
    """
    check_scoring(normalizer, limit, CONFIDENCE)
    check_installed()
    chosen_device(options.device)
    return EvaluationRun.of(open_sets(data, limit), limit, options, normalizer, CONFIDENCE)


@dataclass(frozen=True)
class PointEvaluation:
    """A prepared evaluation of the points of a sweep.

    `kind` is the model kind of all points, with the folder of their small files. Results are written to `folder`.
    `models` are the sources that can be evaluated; `notes` say why the others cannot. `stack` closes everything that is
    opened for the evaluation.
    """

    run: EvaluationRun
    request: Request
    sources: PatchSources
    directory: Path
    kind: ModelKind
    folder: Path
    models: tuple[OpenModel, ...]
    hub: Hub
    stack: ExitStack
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        run: EvaluationRun,
        request: Request,
        sources: PatchSources,
        directory: Path,
        hub: Hub,
        stack: ExitStack,
    ) -> PointEvaluation:
        """Check, before any point is made, that the points can transcribe and that the results can be written.

        Raises SourceError if the merges would not transcribe, RequestError if they do not support the language,
        DataError if no reference has a word, DestinationError if the directory holds files that hsa did not write.
        """
        kind = _kind_of_points(sources, request, stack)
        replace(kind, folder=sources.sources.anchor_checkpoint.path).check(run.options)
        folder = check_output(directory / FOLDER, [source.path for source in sources.sources])
        _check_csv(directory / CSV)
        models: list[OpenModel] = []
        notes = []
        for role, path in request.sources.items():
            try:
                model = open_model(NamedModel(os.fspath(path), None), role, hub, stack)
                model.kind.check(run.options)
            except (RequestError, SourceError) as error:
                notes.append(f"{role} is not evaluated beside the points: {error}")
            else:
                models.append(model)
        ordered = sorted(models, key=lambda model: model.name != request.anchor)
        run.check([*(model.kind for model in ordered), kind])
        return cls(run, request, sources, directory, kind, folder, tuple(models), hub, stack, tuple(notes))

    def scores(
        self,
        points: Sequence[GridPoint],
        entries: Mapping[str, SweepEntry],
        staging: StagingDirectory,
        progress: EvaluationProgress | None,
        *,
        full: bool,
    ) -> SweepScores:
        """Decode the models and the finished points, and write the results into the sweep's directory.

        `entries` are the index entries, by the name of the point.
        """
        started = time.perf_counter()
        models = [*self.models, *(self._checkpoint(point) if full else self._patch(point) for point in points)]
        places = [place for place, model in enumerate(self.models) if model.name == self.request.anchor]
        baseline_at = places[0] if places else None
        found = self.run.evaluate(models, baseline_at, self.folder, progress, started)
        scores = SweepScores(found, tuple(points), entries)
        write_scores(found, self.folder)
        staging.write(CSV, scores.csv(), fsio.Tally())
        staging.publish_file(CSV, self.directory / CSV)
        return scores

    def _checkpoint(self, point: GridPoint) -> OpenModel:
        named = NamedModel(str(self.directory / point.name), None)
        return open_model(named, point.name, self.hub, self.stack)

    def _patch(self, point: GridPoint) -> OpenModel:
        given = f"{os.fspath(self.request.sources[self.request.anchor])}+{self._place(point)}"
        with ExitStack() as stack:
            model = open_written_model(partial(self._apply, point), point.name, given, self.hub, stack)
        return replace(model, folder=self.kind.folder, kind=self.kind)  # all points have the same small files

    def _place(self, point: GridPoint) -> Path:
        return self.directory / f"{point.name}{SUFFIX}"

    def _apply(self, point: GridPoint, folder: Path) -> None:
        """Apply a patch to this run's open anchor, and write the checkpoint with this run's small files."""
        options = Options(self.request.threads or default_threads(), digest=False, sync=False)
        tally = fsio.Tally()
        with ExitStack() as stack:
            patch = open_patch(self._place(point), tally, stack)
            anchor, small = self.sources.sources.anchor_checkpoint, self.sources.small
            apply_to(patch, anchor, small, folder, options, tally, PeakMemory(), overwrite=False)


def _kind_of_points(sources: PatchSources, request: Request, stack: ExitStack) -> ModelKind:
    """The model kind of the points, read from the small files that each of them gets."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=TEMPORARY)))
    for name, data in sources.small.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    try:
        return kind_of(folder)
    except SourceError as error:
        anchor = sources.sources.anchor_checkpoint.path
        reason = str(error).replace(str(folder), str(anchor))
        raise SourceError(f"merges of {request.anchor} cannot be evaluated: {reason}") from error


def _check_csv(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            if file.read(len(_START)) == _START:
                return
    raise DestinationError(f"{path} exists and hsa sweep did not write it; choose another output, or move it away")
