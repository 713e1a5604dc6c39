"""What the benchmarks of searches share: models, dev set, an evaluator of their own, and the columns of their rows."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from bench_wer import rate_and_interval
from programs import Program, Run
from racing_settings import FINE_TUNES, METHODS

import hsa
from hsa.evaluation.decoding import load_recognizer
from hsa.evaluation.normalizers import normalizer
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.prepared import AudioDigests, prepare
from hsa.evaluation.utterance import Utterance
from hsa.searches.baselines import baselines
from hsa.searches.candidates import Candidate
from hsa.searches.dev_sets import DevSets, make_dev_sets
from hsa.searches.evaluators import SpeechEvaluator
from hsa.searches.objectives import Objective
from hsa.searches.resident_model import ResidentModel
from hsa.searches.sources import SearchSources, sources_of
from hsa.searches.space import MethodSpace, space_of

SEARCH = "hsa search"
BATCH = 16
SEED = 0
OBJECTIVE = Objective("mean")
DECODING = DecodingOptions(batch=BATCH, device="cpu")

MEASURED = """case way set clips candidates workers threads rounds seconds min_s max_s trials_s decoding_s peak_bytes \
best wer wer_low wer_high decoded raced equal note"""
COLUMNS = tuple(MEASURED.split())
"""Of a row, after machine, versions and model. `seconds` are those of the whole, with their least and most over
`rounds`; `trials_s` those in which candidates were merged, decoded and scored; `decoding_s` those without the merging
(a loop's: without writing and loading too). `decoded`, `raced` and `equal` count utterances that were decoded, that a
lost race spared, and that were known from equal weights."""


@dataclass(frozen=True)
class Setup:
    """A triple with a third fine-tune, and a set of clips of which the first `limit` are used, or all where it is 0."""

    triple: Path
    clips: Path
    limit: int = 0

    @cached_property
    def sources(self) -> SearchSources:
        models = [self.triple / role for role in FINE_TUNES]
        return sources_of({"base": self.triple / "base", "models": models})

    @cached_property
    def spaces(self) -> dict[str, MethodSpace]:
        return {method: space_of(method, len(FINE_TUNES), {}) for method in METHODS}

    @cached_property
    def baselines(self) -> list[Candidate]:
        """What a search scores before it draws anything."""
        return baselines(self.sources, self.spaces)

    def dev(self, limit: int = 0) -> DevSets:
        """The clips as a search with the same seed orders them, or the first `limit` of them."""
        prepared = prepare(hsa.data(self.clips), limit or self.limit or None, AudioDigests())
        normalize = normalizer("auto", model=self.triple / FINE_TUNES[0])
        return make_dev_sets([prepared], normalize, BATCH, SEED)

    def evaluator(self, dev: DevSets) -> TimedEvaluator:
        """An evaluator that knows nothing yet, with a model of its own."""
        recognizer = load_recognizer(self.triple / FINE_TUNES[0], DECODING)
        resident = ResidentModel(recognizer.model, self.sources, self.spaces, None)
        return TimedEvaluator(resident, recognizer, dev, OBJECTIVE, DECODING.device)

    def of_loop(self, candidate: Candidate) -> dict[str, Any]:
        """A candidate as search_loop.py takes it."""
        if candidate.method is None:
            assert candidate.source is not None
            return {"name": candidate.name, "folder": self.sources.path(candidate.source)}
        merge = {"method": candidate.method, **self.sources.arguments(candidate.method), **candidate.settings}
        return {"name": candidate.name, "merge": merge}


class TimedEvaluator(SpeechEvaluator):
    """An evaluator that adds up the seconds in which it decodes, computing features included."""

    decoding = 0.0

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        transcribe = self.decoder.transcribe

        def timed(key: object, batch: Sequence[Utterance]) -> list[str]:
            started = time.perf_counter()
            texts = transcribe(key, batch)
            self.decoding += time.perf_counter() - started
            return texts

        self.decoder.transcribe = timed  # type: ignore[method-assign]


def rates(dev: DevSets, texts: Mapping[str, str]) -> dict[str, float]:
    """The word error rate of texts by utterance, in %, with its interval; clips in the order of their names."""
    found = sorted(
        (item.utterance.id, dev.errors(number, texts[item.utterance.id]), item.words)
        for number, item in enumerate(dev.items)
    )
    errors, words = (np.array([each[place] for each in found], np.int64) for place in (1, 2))
    return dict(zip(("wer", "wer_low", "wer_high"), rate_and_interval(errors, words), strict=True))


def described(candidate: Candidate) -> str:
    """A candidate in one line."""
    settings = " ".join(f"{name} {value}" for name, value in candidate.settings.items())
    return f"{candidate.name}: {candidate.method} {settings}".strip() if candidate.is_merge else candidate.name


def row(case: str, way: str, **values: object) -> dict[str, object]:
    """A row's measured columns; those that are not given are blank."""
    unknown = values.keys() - set(COLUMNS)
    assert not unknown, unknown
    return {**dict.fromkeys(COLUMNS, ""), "case": case, "way": way, **values}


def search_program(setup: Setup, trials: int, threads: int, *more: str) -> Program:
    """`hsa search` as a program; it prints its study as JSON."""
    command = ["env", f"OMP_NUM_THREADS={threads}", "HF_HUB_OFFLINE=1", sys.executable, "-m", "hsa", "search"]
    command += [f"--base={setup.triple / 'base'}", *(f"--model={setup.triple / role}" for role in FINE_TUNES)]
    command += [f"--method={','.join(METHODS)}", f"--dev={setup.clips}", f"--trials={trials}", f"--seed={SEED}"]
    command += [f"--batch={BATCH}", "--device=cpu", *([f"--limit={setup.limit}"] if setup.limit else []), *more]
    return Program(SEARCH, [*command, "--output={out}", "--json"])


def warm(setup: Setup) -> None:
    """Read models and clips into the page cache."""
    for folder in (setup.clips, setup.triple / "base", *(setup.triple / role for role in FINE_TUNES)):
        for file in sorted(folder.iterdir()):
            file.read_bytes()


def timed(runs: Sequence[Run]) -> dict[str, object]:
    seconds = [run.seconds for run in runs]
    return {
        "rounds": len(runs),
        "seconds": f"{statistics.median(seconds):.2f}",
        "min_s": f"{min(seconds):.2f}",
        "max_s": f"{max(seconds):.2f}",
        "peak_bytes": max(run.peak for run in runs),
    }
