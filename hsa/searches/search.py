"""`hsa.search`: find the merge that best recognises one's own speech."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hsa.arguments import check_functions, check_paths
from hsa.errors import RequestError
from hsa.evaluation.model_kinds import kind_of
from hsa.evaluation.models import OpenModel
from hsa.evaluation.normalized import check_references
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.prepared import AudioDigests, GivenSet, open_sets, prepare
from hsa.evaluation.scores import UtteranceScore
from hsa.evaluation.utterance import DataSet
from hsa.methods.settings import DEFAULT_METHOD
from hsa.option_names import option
from hsa.searches.baselines import baselines, check_soup_names
from hsa.searches.best import card_fields, merge_candidate
from hsa.searches.comparisons import compare, worst_utterances
from hsa.searches.databases import sqlite_url, storage_errors
from hsa.searches.dev_sets import DevSets
from hsa.searches.execution import Execution, open_pool
from hsa.searches.importances import importances
from hsa.searches.objectives import OWN, Objective, objective_of
from hsa.searches.options import SearchOptions, search_options
from hsa.searches.outputs import BEST, check_best, check_reports, open_output
from hsa.searches.pools import Pool, run_all
from hsa.searches.report_files import write_report_files
from hsa.searches.resident_model import ANCHOR
from hsa.searches.samplers import check_grid, check_sampler
from hsa.searches.session import SearchStep, Session
from hsa.searches.setups import Files, OwnSetup, Setup, SpeechSetup, open_files
from hsa.searches.sources import GivenSources, SearchSources, sources_of
from hsa.searches.space import MethodSpace, check_layered, parse_layers, parse_space, space_of, with_layers
from hsa.searches.store import DEV, SEARCH, Store
from hsa.searches.study import Study, savings_of
from hsa.searches.tasks import LayersOf, Score
from hsa.searches.test_sets import TestSets, failure_notes
from hsa.searches.transcripts import Transcripts
from hsa.searches.trials import Trial
from hsa.searches.unchanged_sources import check_unchanged
from hsa.searches.verdicts import best_baseline, data_notes, models_to_show, verdict_notes
from hsa.system import fsio
from hsa.system.types import PathLike

WORST_SHOWN = 20
"""Maximum utterances that the report shows side by side."""

LIBRARIES, READERS = ("torch", "transformers", "optuna"), ("soxr", "soundfile")
"""Libraries on which trials depend; trials of other versions are not comparable. `READERS` read the audio."""

SearchProgress = Callable[[SearchStep], None]
"""A callback after every trial."""


@fsio.map_os_errors()
def search(
    sources: GivenSources,
    *,
    output: PathLike,
    method: str | Sequence[str] = DEFAULT_METHOD,
    dev: GivenSet | Sequence[GivenSet] | None = None,
    test: GivenSet | Sequence[GivenSet] | None = None,
    evaluate: Callable[[Any], float] | None = None,
    trials: int = 60,
    time: str | float | None = None,
    sampler: str | None = None,
    objective: str = "mean",
    space: Sequence[str] | None = None,
    by_layer: str | None = None,
    seed: int = 0,
    racing: bool = True,
    soup: str | None = None,
    normalizer: str = "auto",
    confidence: float = 0.95,
    limit: int | None = None,
    threads: int | None = None,
    language: str | None = None,
    task: str = "transcribe",
    beams: int = 1,
    max_tokens: int | None = None,
    batch: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    workers: int | None = None,
    ray: bool | str = False,
    storage: str | None = None,
    study: str = SEARCH,
    progress: SearchProgress | None = None,
) -> Study:
    """Search for the merge of these sources with the lowest word error rate on your dev sets.

    Base, every fine-tune, their plain average and each method's defaults are scored first. Then the sampler draws a
    method and settings. Each candidate is put into one loaded model, rounded as its checkpoint would be, and decoded.
    `output` gets `best/`, the checkpoint that `hsa merge` writes with the best settings, `study.db`, `trials.csv`,
    `search.json`, `report.md` and `report.html`. A search that was ended, even by kill -9, resumes when it is called
    again with the same arguments. `trials` (not with the grid sampler), `time`, `test`, `confidence`, `threads`,
    `workers` and `ray` may change; the kind of device may not.

    Args:
        sources: `{"base": B, "primary": M1, "secondary": M2}`, `{"base": B, "models": [M1, ...]}`, or a list of models:
            directories or ids on the Hub.
        output: the directory to write; it is created if it does not exist.
        method: one or several, as a list or a text with commas. With several, the search also chooses the method.
        dev: the sets on which candidates are scored: results of `hsa.data`, or paths; NAME=PATH names a set.
        test: sets that are decoded once, after the search, with the best candidate and the baselines.
        evaluate: instead of `dev`, a function that gets the loaded model of each candidate and returns its score;
            lower is better. The model may be any that transformers loads.
        trials: total number of models to score, baselines included.
        time: start no new trial after this time: seconds, or a text such as `2h`. Baselines are always scored.
        sampler: tpe, cmaes, nsga2, random or grid; by default tpe, and nsga2 for the objective pareto.
        objective: mean (of the sets' word error rates), worst, pareto, or the name of a set.
        space: texts NAME=LOW:HIGH, NAME=VALUE or NAME=A,B, such as `ties.density=0.2:0.8`.
        by_layer: ranges of layers such as `0-3,4-7`, each with its own lambda and alpha.
        seed: of the sampler and of the order of utterances.
        racing: stop candidates that are worse than the best by a Wilcoxon signed-rank test; never with pareto.
        soup: `greedy` also scores averages of the fine-tunes, each kept only if the score does not get worse.
        normalizer, limit, language, task, beams, max_tokens, batch, device, dtype: as for `hsa.evaluate`.
        confidence: of the intervals in the report.
        threads: worker threads of the merging.
        workers: processes that score candidates, by default 1, each with its own sources, model and features in
            memory; with `ray` the number of actors, by default as many as fit.
        ray: score on a Ray cluster: its address, or True. True uses the cluster that `RAY_ADDRESS` names, else one
            that runs on this machine, else a new one that is started here.
        storage: the URL of a database in which several runs, on several machines, share one search.
        study: the name of the search in that database.
        progress: called after every trial with a `SearchStep`.

    Returns the study. Raises RequestError, SourceError, DataError or MachineError, or a subclass of one.

    Example:
        >>> sources = {"base": "whisper-small", "primary": "m1", "secondary": "m2"}
        >>> study = hsa.search(sources, dev=["dev.tsv"], trials=8, output="search")
        >>> study.best.name
        'average'
    """
    check_functions(evaluate=evaluate, progress=progress)
    check_paths(output=output)
    decoding = DecodingOptions(language, task, beams, batch, device, dtype, max_tokens)
    options = search_options(
        method,
        time,
        trials=trials,
        sampler=sampler,
        objective=objective,
        space=space,
        by_layer=by_layer,
        seed=seed,
        racing=racing,
        soup=soup,
        normalizer=normalizer,
        confidence=confidence,
        limit=limit,
        threads=threads,
        decoding=decoding,
    )
    if (dev is None) == (evaluate is None):
        raise RequestError(
            f"give either {option('dev')}, the sets to score candidates on, or evaluate, a function that scores them"
        )
    if test is not None and dev is None:
        raise RequestError(f"{option('test')} sets are decoded after a search on {option('dev')} sets: give those too")
    execution = Execution(workers, ray, storage, study)
    with needed_for_search(), ExitStack() as stack:
        run = _SearchRun(sources_of(sources), options, Path(output), execution, stack, progress)
        if evaluate is not None:
            return run.by_own_score(evaluate)
        assert dev is not None
        return run.by_word_errors(open_sets(dev, limit), [] if test is None else open_sets(test, limit))


@contextmanager
def needed_for_search() -> Iterator[None]:
    """Raise RequestError if Optuna or one of its dependencies is not installed.

    Example:
        >>> with needed_for_search():
        ...     import optuna
    """
    try:
        import cmaes  # noqa: F401
        import optuna  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        name = (error.name or "optuna").partition(".")[0]
        raise RequestError(
            f"hsa search needs {name}, which is not installed: pip install 'hsa-merge[search]'"
        ) from error
    yield


@dataclass
class _SearchRun:
    """One call of `search`: its open resources and its steps."""

    sources: SearchSources
    options: SearchOptions
    output: Path
    execution: Execution
    stack: ExitStack
    progress: SearchProgress | None
    request: dict[str, Any] = field(default_factory=dict)

    def by_own_score(self, evaluate: Callable[[Any], float]) -> Study:
        """Search with the caller's own scoring function."""
        spaces = self._spaces()
        objective = Objective(OWN)
        self._check_sampler(spaces, OWN)
        files = open_files(self.sources)
        self.output = open_output(self.output, list(files.folders.values()), self.stack)
        pool = self._pool(OwnSetup(self.sources, spaces, self.options, files, evaluate))
        spaces = self._with_layers(spaces, pool)
        store = self._store(1, {"score": "evaluate"}, files, pool)
        session = Session(self.sources, spaces, self.options, objective, pool, store, None, None, self.progress)
        with storage_errors(self.url):
            session.run()
            study = self._study(session, session.notes)
        return self._finish(study, [], "", files)

    def by_word_errors(self, dev_sets: list[DataSet], test_sets: list[DataSet]) -> Study:
        """Search by word errors on dev sets."""
        objective = objective_of(self.options.objective, [each.name for each in dev_sets])
        spaces = self._spaces()
        self._check_sampler(spaces, objective.kind)
        digests = AudioDigests()
        prepared = tuple(prepare(each, self.options.limit, digests) for each in dev_sets)
        tested = tuple(prepare(each, self.options.limit, digests) for each in test_sets)
        files = open_files(self.sources, transcribing=True)
        setup = SpeechSetup(self.sources, spaces, self.options, objective, files, prepared, tested)
        dev = setup.dev_sets()
        empty = check_references(tested, dev.normalize)
        self.output = open_output(self.output, list(files.folders.values()), self.stack)
        pool = self._pool(setup)
        spaces = self._with_layers(spaces, pool)
        store = self._store(len(dev.names) if objective.kind == "pareto" else 1, {DEV: dev.digest}, files, pool)
        transcripts = Transcripts(self.output, self.request)
        session = Session(self.sources, spaces, self.options, objective, pool, store, dev, transcripts, self.progress)
        with storage_errors(self.url):
            session.run()
            notes = [*data_notes("dev", prepared, dev.empty), *data_notes("test", tested, empty)]
            study = self._study(session, [*notes, *session.notes])
        study = replace(study, savings=savings_of(study.trials, len(dev.items)))
        shown = models_to_show(study)
        scores = dev_scores = _dev_scores(pool, dev, transcripts, shown)
        study = replace(study, dev=compare(dev_scores, study.best.name, self.options.confidence, dev.empty))
        if tested:
            sets = TestSets(pool, self._anchor(files), tested, self.options.decoding, dev.normalize, self.output)
            test_scores, failures = sets.scores_of(shown)
            study = replace(study, notes=(*study.notes, *failure_notes(study.best.name, failures)))
            if study.best.name in test_scores:
                scores = test_scores
                study = replace(study, test=compare(scores, study.best.name, self.options.confidence))
        baseline = best_baseline(study, scores)
        if baseline is not None:
            worst = worst_utterances(scores[study.best.name], scores[baseline.name], WORST_SHOWN)
            study = replace(study, worst=worst, best_baseline=baseline.name)
        verdicts = verdict_notes(study, best_baseline(study, dev_scores), bool(tested))
        study = replace(study, notes=(*study.notes, *verdicts))
        return self._finish(study, dev.names, "test" if study.test else "dev", files)

    # --- steps ------------------------------------------------------------------------------------------------------

    def _spaces(self) -> dict[str, MethodSpace]:
        given = parse_space(self.options.space, self.options.methods)
        for method in self.options.methods:
            self.sources.check(method)
        models = len(self.sources.models)
        spaces = {method: space_of(method, models, given[method]) for method in self.options.methods}
        if self.options.by_layer is not None:
            for space in spaces.values():
                check_layered(space)
        baselines(self.sources, spaces)  # called before anything is read, for its checks
        if self.options.soup is not None:
            check_soup_names(self.sources)
        return spaces

    def _check_sampler(self, spaces: dict[str, MethodSpace], objective: str) -> None:
        check_sampler(self.options.sampler, list(spaces.values()), objective)
        if self.options.sampler == "grid":
            check_grid(list(spaces.values()), self.options.trials - len(baselines(self.sources, spaces)))

    def _with_layers(self, spaces: dict[str, MethodSpace], pool: Pool) -> dict[str, MethodSpace]:
        if self.options.by_layer is None:
            return spaces
        ranges = parse_layers(self.options.by_layer)
        layers = run_all(pool, [LayersOf(method) for method in spaces])
        return {
            method: with_layers(space, ranges, found)
            for (method, space), found in zip(spaces.items(), layers, strict=True)
        }

    def _anchor(self, files: Files) -> OpenModel:
        """The first fine-tune, whose files the output gets. Its digest is that of its small files only."""
        name, given = self.sources.name_of(ANCHOR), self.sources.path(ANCHOR)
        return OpenModel(name, given, files.anchor, kind_of(files.anchor), self.request["anchor"], files.dtype)

    def _pool(self, setup: Setup) -> Pool:
        pool = open_pool(setup, self.execution, self.stack)
        self.stack.callback(pool.close)
        return pool

    @property
    def url(self) -> str:
        return sqlite_url(self.output) if self.execution.storage is None else self.execution.storage

    def _store(self, objectives: int, scored_by: Mapping[str, Any], files: Files, pool: Pool) -> Store:
        given = self.options.as_dict()
        device = pool.device.partition(":")[0]  # scores depend on its kind, not on its spelling
        self.request = {
            **given,
            "decoding": {**given["decoding"], "device": device},
            **scored_by,
            **({"trials": self.options.trials} if self.options.sampler == "grid" else {}),
            "sources": [[self.sources.name_of(number), files.digests[number]] for number in self.sources.numbers],
            "versions": {name: version(name) for name in (*LIBRARIES, *(READERS if DEV in scored_by else ()))},
            "anchor": files.anchor_files(),
        }
        shared = self.execution.storage is not None
        store = Store(self.url, objectives, self.request, name=self.execution.study, shared=shared)
        self.stack.callback(store.close)
        return store

    def _study(self, session: Session, notes: Sequence[str]) -> Study:
        trials = tuple(session.trials)
        return Study(
            self.output,
            session.objective,
            self.sources,
            trials,
            importance=importances(session.store.search, session.spaces),
            seconds=math.fsum(trial.result.seconds for trial in trials),
            merging=math.fsum(trial.result.merging for trial in trials),
            notes=tuple(notes),
            request=self.request,
            confidence=self.options.confidence,
        )

    def _finish(self, study: Study, dev: Sequence[str], split: str, files: Files) -> Study:
        """Write the reports, then the best candidate.

        The results are on disk before a merge that may fail. `best/` is written only if the sources are still those
        that were scored, because its card states these scores.
        """
        check_reports(self.output)
        write_report_files(study)
        check_unchanged(self.sources, [files.digests[number] for number in self.sources.numbers])
        check_best(self.output, list(files.folders.values()))
        rows = [row for row in (study.test or study.dev) if row.model == study.best.name]
        card = card_fields(study.output.name, rows, split, len(study.trials), dev, study.objective.text)
        merged = merge_candidate(self.sources, study.best.candidate, self.output / BEST, card, overwrite=True)
        if merged.warnings:
            study = replace(study, warnings=merged.warnings)
            write_report_files(study)
        return study


def _dev_scores(
    pool: Pool, dev: DevSets, transcripts: Transcripts, trials: Sequence[Trial]
) -> dict[str, list[UtteranceScore]]:
    """The scores of complete trials on every utterance, by name. Missing transcripts are decoded again."""
    gone = [trial for trial in trials if len(transcripts.get(trial.result.weights)) < len(dev.items)]
    for result in run_all(pool, [Score(trial.candidate, None) for trial in gone]):
        transcripts.put(result.weights, result.texts)
    return {
        trial.name: [dev.scored(number, text) for number, text in enumerate(transcripts.get(trial.result.weights))]
        for trial in trials
    }
