"""`hsa.search`: find the merge that recognises one's own speech best."""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hsa.arguments import check_functions, check_paths
from hsa.errors import DestinationError, RequestError, listed
from hsa.evaluation.decoding import chosen_device, load_recognizer
from hsa.evaluation.models import OpenModel, open_model, parse_model
from hsa.evaluation.normalized import check_references
from hsa.evaluation.normalizers import normalizer
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.prepared import AudioDigests, GivenSet, PreparedSet, open_sets, prepare
from hsa.evaluation.scores import UtteranceScore
from hsa.evaluation.utterance import DataSet
from hsa.methods.settings import DEFAULT_METHOD
from hsa.option_names import option
from hsa.searches.best import card_fields, merge_candidate
from hsa.searches.comparisons import compare, worst_utterances
from hsa.searches.dev_sets import DevSets, make_dev_sets
from hsa.searches.evaluators import OwnEvaluator, SpeechEvaluator
from hsa.searches.importances import importances
from hsa.searches.objectives import OWN, Objective, objective_of
from hsa.searches.options import SearchOptions, search_options
from hsa.searches.own_models import load_any_model
from hsa.searches.report_files import write_report_files
from hsa.searches.resident_model import ResidentModel
from hsa.searches.samplers import check_sampler
from hsa.searches.session import SearchStep, Session
from hsa.searches.sources import GivenSources, SearchSources, sources_of
from hsa.searches.space import MethodSpace, parse_layers, parse_space, space_of, with_layers
from hsa.searches.store import Store, Transcripts, sqlite_url
from hsa.searches.study import Study, savings_of
from hsa.searches.test_sets import TestSets, failure_notes
from hsa.searches.trials import Trial, best_of
from hsa.sources.hub.client import Hub
from hsa.system import fsio
from hsa.system.destinations import check_tree
from hsa.system.types import PathLike

WORST_SHOWN = 20
"""Utterances that the report shows side by side."""

BEST = "best"
"""The directory of the best candidate."""

SearchProgress = Callable[[SearchStep], None]
"""Called after every trial."""


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
    progress: SearchProgress | None = None,
) -> Study:
    """Search merges of these sources for the one with the fewest word errors on sets of one's own.

    Base, every fine-tune, their plain average and each method's defaults are scored first. Then the sampler draws a
    method and settings; each candidate is put into one loaded model, rounded as its checkpoint would be, and decoded.
    `output` gets `best/`, the checkpoint that `hsa merge` writes with the best settings, `study.db`, `trials.csv`,
    `search.json`, `report.md` and `report.html`. A search that was ended, even by kill -9, goes on when it is called
    again with the same arguments; `trials`, `time`, `test`, `confidence` and `threads` may change.

    Args:
        sources: `{"base": B, "primary": M1, "secondary": M2}`, `{"base": B, "models": [M1, ...]}`, or a list of models:
            directories or ids on the Hub.
        output: the directory to write; made where it does not exist.
        method: one or several, as a list or a text with commas, of which the search then chooses too.
        dev: the sets to score candidates on: what `hsa.data` gives, or paths; NAME=PATH names a set.
        test: sets that are decoded once, after the search, with the best candidate and the baselines.
        evaluate: instead of `dev`, a function that gets the loaded model of each candidate and returns its score;
            lower is better. The model must be one that `hsa.evaluate` can load.
        trials: models to score in all, baselines included.
        time: stop asking for trials after this long: seconds, or a text such as `2h`.
        sampler: tpe, cmaes, nsga2, random or grid; by default tpe, and nsga2 for the objective pareto.
        objective: mean (of the sets' word error rates), worst, pareto, or the name of a set.
        space: texts NAME=LOW:HIGH, NAME=VALUE or NAME=A,B, such as `ties.density=0.2:0.8`.
        by_layer: ranges of layers such as `0-3,4-7`, each with a lambda and alpha of its own.
        seed: of the sampler and of the order of utterances.
        racing: stop candidates that are worse than the best by a Wilcoxon signed-rank test; never with pareto.
        soup: `greedy` also scores averages of the fine-tunes, each added while that does not make it worse.
        normalizer, limit, language, task, beams, max_tokens, batch, device, dtype: as for `hsa.evaluate`.
        confidence: of the intervals in the report.
        threads: worker threads of the merging.
        progress: called after every trial with a `SearchStep`.

    Returns the study. Raises RequestError, SourceError, DataError or MachineError, or a subclass of one.

    Example:
        >>> study = hsa.search({"base": "b", "primary": "m1", "secondary": "m2"}, dev=["dev.tsv"], output="search")
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
            f"give {option('dev')}, sets to score candidates on, or evaluate, a function that scores them"
        )
    if test is not None and dev is None:
        raise RequestError(f"{option('test')} sets are decoded after a search by {option('dev')} sets; leave them out")
    with needed_for_search(), ExitStack() as stack:
        run = _SearchRun(sources_of(sources), options, Path(output), stack, progress)
        if evaluate is not None:
            return run.by_own_score(evaluate)
        assert dev is not None
        return run.by_word_errors(open_sets(dev, limit), [] if test is None else open_sets(test, limit))


@contextmanager
def needed_for_search() -> Iterator[None]:
    """RequestError where Optuna or what it needs is not installed.

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
    """One call of `search`: what is open for it, and its steps."""

    sources: SearchSources
    options: SearchOptions
    output: Path
    stack: ExitStack
    progress: SearchProgress | None
    request: dict[str, Any] = field(default_factory=dict)

    def by_own_score(self, evaluate: Callable[[Any], float]) -> Study:
        """A search with a scoring function of the caller's own."""
        spaces = self._spaces()
        objective = Objective(OWN)
        check_sampler(self.options.sampler, list(spaces.values()), OWN)
        models = self._models()
        self._open_output(models)
        device = chosen_device(self.options.decoding.device)
        loaded = load_any_model(self._anchor(models).folder, device, self.options.decoding.dtype)
        resident = ResidentModel(loaded, self.sources, spaces, self.options.threads)
        spaces = self._with_layers(spaces, resident)
        store = self._store(1, {"score": "evaluate"}, models)
        session = Session(
            self.sources,
            spaces,
            self.options,
            objective,
            OwnEvaluator(resident, evaluate),
            store,
            None,
            None,
            self.progress,
        )
        session.run()
        study = self._study(session, [])
        return self._finish(study, [], "")

    def by_word_errors(self, dev_sets: list[DataSet], test_sets: list[DataSet]) -> Study:
        """A search by word errors on dev sets."""
        objective = objective_of(self.options.objective, [each.name for each in dev_sets])
        spaces = self._spaces()
        check_sampler(self.options.sampler, list(spaces.values()), objective.kind)
        digests = AudioDigests()
        prepared = [prepare(each, self.options.limit, digests) for each in dev_sets]
        tested = [prepare(each, self.options.limit, digests) for each in test_sets]
        models = self._models()
        anchor = self._anchor(models)
        decoding = self.options.decoding
        language = "en" if decoding.task == "translate" else decoding.language
        normalize = normalizer(self.options.normalizer, language=language, model=anchor.folder)
        dev = make_dev_sets(prepared, normalize, self.options.decoding.batch, self.options.seed)
        if tested:
            check_references(tested, normalize)
        self._open_output(models)
        recognizer = load_recognizer(anchor.folder, self.options.decoding)
        resident = ResidentModel(recognizer.model, self.sources, spaces, self.options.threads)
        spaces = self._with_layers(spaces, resident)
        evaluator = SpeechEvaluator(resident, recognizer, dev, objective)
        store = self._store(len(dev.names) if objective.kind == "pareto" else 1, {"dev": dev.digest}, models)
        transcripts = Transcripts(self.output)
        session = Session(
            self.sources, spaces, self.options, objective, evaluator, store, dev, transcripts, self.progress
        )
        session.run()
        notes = [*_data_notes(prepared, dev), *(note for each in prepared + tested for note in each.notes)]
        study = self._study(session, notes)
        study = replace(study, savings=savings_of(study.trials, len(dev.items)))
        shown = _shown(study)
        dev_scores = {trial.name: self._dev_scores(evaluator, transcripts, trial) for trial in shown}
        study = replace(study, dev=compare(dev_scores, study.best.name, self.options.confidence))
        scores = dev_scores
        if tested:
            sets = TestSets(resident, evaluator.decoder, anchor, tested, self.options.decoding, normalize, self.output)
            test_scores, failures = sets.scores_of(trial.candidate for trial in shown)
            study = replace(study, notes=(*study.notes, *failure_notes(study.best.name, failures)))
            if study.best.name in test_scores:
                scores = test_scores
                study = replace(study, test=compare(scores, study.best.name, self.options.confidence))
        rival = _best_baseline(study, scores)
        if rival is not None:
            worst = worst_utterances(scores[study.best.name], scores[rival.name], WORST_SHOWN)
            study = replace(study, worst=worst, rival=rival.name)
        verdicts = _verdict_notes(study, _best_baseline(study, dev_scores), bool(tested))
        study = replace(study, notes=(*study.notes, *verdicts))
        return self._finish(study, dev.names, "test" if study.test else "dev")

    # --- steps ------------------------------------------------------------------------------------------------------

    def _spaces(self) -> dict[str, MethodSpace]:
        given = parse_space(self.options.space, self.options.methods)
        for method in self.options.methods:
            self.sources.check(method)
        return {method: space_of(method, len(self.sources.models), given[method]) for method in self.options.methods}

    def _with_layers(self, spaces: dict[str, MethodSpace], resident: ResidentModel) -> dict[str, MethodSpace]:
        if self.options.by_layer is None:
            return spaces
        ranges = parse_layers(self.options.by_layer)
        return {method: with_layers(space, ranges, resident.layers_of(method)) for method, space in spaces.items()}

    def _models(self) -> list[OpenModel]:
        """All sources, base first where there is one, as models that can be known again."""
        hub = Hub()
        return [
            open_model(parse_model(self.sources.path(number)), self.sources.name_of(number), hub, self.stack)
            for number in self.sources.numbers
        ]

    def _anchor(self, models: Sequence[OpenModel]) -> OpenModel:
        """The first fine-tune, whose files are the output's."""
        return models[0 if self.sources.base is None else 1]

    def _open_output(self, models: Sequence[OpenModel]) -> None:
        """Make the output, and hold it as the only run that does. DestinationError where that cannot be."""
        self.output = check_tree(self.output, [model.folder for model in models])
        with fsio.map_write_errors(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.output / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.stack.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DestinationError(
                f"another search runs in {self.output}; wait for it to end, or give another {option('output')}"
            ) from error
        except OSError:  # a filesystem without locks
            return

    def _store(self, objectives: int, scored_by: Mapping[str, Any], models: Sequence[OpenModel]) -> Store:
        self.request = {
            **self.options.as_dict(),
            **scored_by,
            **({"trials": self.options.trials} if self.options.sampler == "grid" else {}),
            "sources": [[model.name, model.digest] for model in models],
            "versions": {name: version(name) for name in ("torch", "transformers", "optuna")},
        }
        store = Store(sqlite_url(self.output), objectives, self.request)
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

    def _dev_scores(self, evaluator: SpeechEvaluator, transcripts: Transcripts, trial: Trial) -> list[UtteranceScore]:
        """What a complete trial scored on every utterance; decoded again where its transcripts are gone."""
        texts = transcripts.get(trial.result.weights)
        if len(texts) < len(evaluator.dev.items):
            result = evaluator.evaluate(trial.candidate, None)
            transcripts.put(result.weights, result.texts)
            texts = result.texts
        return [evaluator.dev.scored(number, text) for number, text in enumerate(texts)]

    def _finish(self, study: Study, dev: Sequence[str], split: str) -> Study:
        """Write the best candidate and the reports."""
        rows = [row for row in (study.test or study.dev) if row.model == study.best.name]
        card = card_fields(study.output.name, rows, split, len(study.trials), dev, study.objective.text)
        merged = merge_candidate(
            self.sources, study.best.candidate, self.output / BEST, card, overwrite=(self.output / BEST).exists()
        )
        study = replace(study, warnings=merged.warnings)
        write_report_files(study)
        return study


def _shown(study: Study) -> list[Trial]:
    """The best candidate and the baselines, each model once, as far as they could be scored."""
    found = {study.best.name: study.best}
    for trial in study.baselines:
        if trial.state == "complete":
            found.setdefault(trial.name, trial)
    return list(found.values())


def _best_baseline(study: Study, scores: Container[str]) -> Trial | None:
    """The best of what was scored before anything was drawn and is among `scores`, the best candidate not counted."""
    others = [trial for trial in study.baselines if trial.name != study.best.name and trial.name in scores]
    return best_of(others)


def _data_notes(sets: Sequence[PreparedSet], dev: DevSets) -> list[str]:
    return [
        f"{dev.empty[each.name]} utterances of {each.name} have no words once normalised and were left out"
        for each in sets
        if dev.empty[each.name]
    ]


def _verdict_notes(study: Study, rival: Trial | None, tested: bool) -> list[str]:
    """What a reader of the figures must know."""
    notes = []
    best = study.best
    if rival is not None and rival.value < best.value:
        notes.append(
            f"{rival.name} scores better on the dev sets than every merge that was tried; no merge serves here"
        )
    if not study.test:
        remedy = "" if tested else "; give test sets to see what it is worth"
        notes.append(
            f"the settings were chosen on the dev sets, so the best candidate's figures there are flattering{remedy}"
        )
    for name in dict.fromkeys(row.set for row in study.test):
        rows = [row for row in study.test if row.set == name and row.verdict == "no difference shown"]
        if rows:
            notes.append(
                f"on {name} no difference was shown between {best.name} and {listed((row.model for row in rows), 'or')}"
            )
    return notes
