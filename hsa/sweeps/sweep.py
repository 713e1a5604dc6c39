"""`hsa.sweep`: many merges of the same sources, which are opened and planned once, and an index of the results.

Running a killed sweep again resumes it: `hsa.sweeps.resume` finds the points that exist already.
`hsa.sweeps.evaluation` decodes speech with the points.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsa.actions.keywords import SWEEP, Arguments, split
from hsa.actions.patch import open_patch_sources
from hsa.actions.request import Request
from hsa.actions.signatures import declared_keywords
from hsa.arguments import check_flags, check_functions, check_values
from hsa.errors import RequestError, one_line, shown
from hsa.findings import counted
from hsa.methods.registry import method_named
from hsa.methods.settings import check_value
from hsa.methods.tensors import Summary
from hsa.option_names import option
from hsa.outputs.grid_point import GridPoint, axes
from hsa.outputs.merge_warnings import raise_if_strict
from hsa.outputs.report import NO_DIGESTS
from hsa.outputs.sweep_index import SweepEntry
from hsa.sources.hub.client import Hub
from hsa.sweeps import grid
from hsa.sweeps.points import PASS_POINTS, PointMaker, WholePointMaker
from hsa.sweeps.resume import SWEEP_STAGING, ExistingPoints, check_directory
from hsa.sweeps.whole_points import has_patches, open_whole_sources, require_full
from hsa.system import fsio
from hsa.system.memory import PeakMemory
from hsa.system.signals import deferred
from hsa.system.staging import StagingDirectory
from hsa.system.types import Progress

if TYPE_CHECKING:
    from hsa.evaluation.prepared import GivenSet
    from hsa.evaluation.run import EvaluationRun
    from hsa.evaluation.transcription import EvaluationProgress
    from hsa.sweeps.scores import SweepScores


EVALUATION_DEFAULTS = {"normalizer": "auto", "limit": None, "language": None, "device": "auto", "batch": 16}
"""The arguments for evaluating points, with their defaults."""


@dataclass(frozen=True)
class SweepReport:
    """A finished sweep. Sizes are in bytes; `seconds` is wall time without the evaluation.

    `made` and `skipped` are names of points. `entries` are the index entries, which include points of earlier sweeps to
    the same directory. `extents` say how much each new point merges, and `extent_range` gives their range, if the
    method reports it. `scores` are the word error rates of the grid's points, if they were evaluated.

    Example:
        >>> report = hsa.sweep("whisper-small", "m1", "m2", "sweep", lam=[0.1, 0.5])
        >>> report.made
        ('encoder-qkv_k0.6_lambda0.1_alpha0.2', 'encoder-qkv_k0.6_lambda0.5_alpha0.2')
    """

    output: Path
    seconds: float
    bytes_read: int
    bytes_read_by_source: Mapping[str, int]
    bytes_written: int
    bytes_fetched: int
    peak_memory_bytes: int
    made: tuple[str, ...]
    skipped: tuple[str, ...]
    entries: tuple[SweepEntry, ...]
    extents: Mapping[str, Summary]
    extent_range: str | None
    scores: SweepScores | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        made = f"{len(self.made)} points made, {len(self.skipped)} skipped"
        return one_line(f"<hsa.SweepReport of {self.output}: {made}{counted(self.warnings)}>")

    def as_dict(self) -> dict[str, Any]:
        """The report as `hsa sweep --json` prints it."""
        return {
            "output": str(self.output),
            "seconds": self.seconds,
            "bytes_read": self.bytes_read,
            "bytes_read_by_source": dict(self.bytes_read_by_source),
            "bytes_written": self.bytes_written,
            "bytes_fetched": self.bytes_fetched,
            "peak_memory_bytes": self.peak_memory_bytes,
            "made": list(self.made),
            "skipped": list(self.skipped),
            "points": [entry.as_dict() for entry in self.entries],
            "extents": {name: extent.as_dict() for name, extent in self.extents.items()},
            "scores": None if self.scores is None else self.scores.as_dict(),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


@fsio.map_os_errors()
@declared_keywords(SWEEP)
def sweep(
    *arguments: Any,
    full: bool = False,
    jobs: int | None = None,
    data: GivenSet | Sequence[GivenSet] | None = None,
    normalizer: str = "auto",
    limit: int | None = None,
    language: str | None = None,
    device: str = "auto",
    batch: int = 16,
    progress: Progress | None = None,
    evaluation_progress: EvaluationProgress | None = None,
    **keywords: Any,
) -> SweepReport:
    """Merge with every combination of the given parameters, reading the targets of the sources once.

    Args:
        {sources}
        output: the directory to write: a patch for every point (`hsa.apply` turns it into a checkpoint), or with `full`
            a checkpoint directory for every point; and `index.json` and `index.csv`. Points that exist already are
            verified and skipped. A method that has no patches needs `full`.
        method: the name of the method.
        {settings}
        {options}
        full: write checkpoints instead of patches.
        jobs: the number of patches written in one pass, 128 by default; each pass reads the sources again. With `full`,
            the number of checkpoints written at a time, 1 by default and at most the number of threads.
        data: sets of speech as for `hsa.evaluate`. All points of the grid and the merged models are decoded on them,
            and `wer.csv` and `evaluation/` are written beside the index. Existing transcripts are reused.
        normalizer: how texts are made comparable, as for `hsa.evaluate`.
        limit: use only the first `limit` utterances of each set.
        language: the spoken language, as a code such as `de`; without it a multilingual model detects the language.
        device: the device to decode on: `auto`, `cpu`, `cuda` or `cuda:N`.
        batch: the number of utterances decoded at a time.
        progress: called now and then with the bytes done and the total bytes.
        evaluation_progress: called with a `Step` after each decoded batch.

    Raises the errors of `hsa.merge`. With `strict`, warnings in a pass stop the sweep before any point of that pass is
    written. Points that were finished before an error stay. With `data`, also raises the errors of `hsa.evaluate`. Bad
    sets, and models that do not transcribe, are reported before the first point is written.

    Example:
        >>> report = hsa.sweep("whisper-small", "m1", "m2", "sweep", lam=[0.1, 0.3, 0.5])
    """
    given = split(SWEEP, arguments, keywords)
    points = _points(given)
    check_flags(full=full)
    check_functions(progress=progress, evaluation_progress=evaluation_progress)
    how = {"normalizer": normalizer, "limit": limit, "language": language, "device": device, "batch": batch}
    request = Request(given.sources, given.output, _widest(points), given.ids, **given.options)
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or not 1 <= jobs <= PASS_POINTS):
        raise RequestError(f"{option('jobs')} must be a whole number from 1 to {PASS_POINTS}, got {shown(jobs)}")
    started, method = time.perf_counter(), method_named(given.method)
    run = _prepared_sets(data, how)
    memory, tally, hub = PeakMemory(), fsio.Tally(), Hub(bars=progress is not None)
    with ExitStack() as stack:
        candidates = [point.settings for point in points]
        patches = has_patches(method, candidates)
        if patches:
            patch_sources = open_patch_sources(
                candidates, request, tally, hub, stack, rows_only=not full and run is None
            )
        else:
            require_full(method, request.settings, full=full)
            patch_sources = open_whole_sources(candidates, request, tally, hub, stack)
        raise_if_strict(patch_sources.findings, strict=request.strict)
        directory = check_directory(request, patch_sources.sources)
        evaluation = None
        if run is not None:
            from hsa.sweeps.evaluation import PointEvaluation

            evaluation = PointEvaluation.of(run, request, patch_sources, directory, hub, stack)
        with deferred():
            staging = stack.enter_context(StagingDirectory(directory / SWEEP_STAGING, directory, sync=request.sync))
        existing = ExistingPoints(request, points, patch_sources, directory, tally)
        work = (PointMaker if patches else WholePointMaker)(existing, staging, memory, full=full, jobs=jobs)
        work.run(progress)
        memory.sample()
        seconds = time.perf_counter() - started
        scores = None
        if evaluation is not None:
            scores = evaluation.scores(points, work.entries_of(points), staging, evaluation_progress, full=full)
    extents = {point.name: work.extents[point.name] for point in points if point in work.made}
    return SweepReport(
        output=directory,
        seconds=seconds,
        bytes_read=tally.read,
        bytes_read_by_source=dict(tally.read_by),
        bytes_written=tally.written,
        bytes_fetched=sum(hub.fetched.values()),
        peak_memory_bytes=memory.peak,
        made=tuple(point.name for point in points if point in work.made),
        skipped=tuple(work.skipped),
        entries=tuple(sorted(work.entries.values(), key=lambda entry: entry.order)),
        extents=extents,
        extent_range=method.summary_range(extents),
        scores=scores,
        notes=(
            *hub.notes,
            *patch_sources.findings.notes,
            *existing.notes,
            *work.findings.notes,
            *((NO_DIGESTS,) if full and not request.digest else ()),
            *(() if evaluation is None or scores is None else (*evaluation.notes, *scores.notes)),
        ),
        warnings=(*patch_sources.findings.warnings, *work.findings.warnings),
    )


def _prepared_sets(data: GivenSet | Sequence[GivenSet] | None, how: Mapping[str, Any]) -> EvaluationRun | None:
    """The prepared sets to evaluate on; None if none are given. Raises RequestError for options that need sets."""
    if data is None:
        for name, default in EVALUATION_DEFAULTS.items():
            if how[name] != default:
                raise RequestError(f"{option(name)} is for evaluating the points; give {option('data')} a set too")
        return None
    from hsa.evaluation.options import DecodingOptions
    from hsa.sweeps.evaluation import prepare_sets

    options = DecodingOptions(how["language"], batch=how["batch"], device=how["device"])
    return prepare_sets(data, options, how["normalizer"], how["limit"])


def _points(arguments: Arguments) -> tuple[GridPoint, ...]:
    """The points of the grid. Raises RequestError unless each axis has a list of values, and for values per tensor."""
    owner = method_named(arguments.method).Settings
    values = {axis.name: arguments.settings[axis.name] for axis in axes(owner) if axis.name in arguments.settings}
    check_values(**values)
    for axis in axes(owner):
        for value in values.get(axis.name, ()):
            if isinstance(value, Mapping):
                name = option(axis.name)
                raise RequestError(f"{name} of a sweep takes numbers, not values per tensor: {shown(value)}")
            check_value(axis, value)
    others = {name: value for name, value in arguments.settings.items() if name not in values}
    return grid.points(owner, values, others)


def _widest(points: Sequence[GridPoint]) -> Any:
    """The settings of the point with the most targets. Each choice of an axis includes the targets of the choices
    before it."""

    def width(point: GridPoint) -> list[int]:
        chosen = [axis for axis in axes(type(point.settings)) if axis.about.choices]
        return [axis.about.choices.index(getattr(point.settings, axis.name)) for axis in chosen]

    return max(points, key=width).settings
