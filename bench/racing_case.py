"""Racing on one recorded list of settings: what it spares, and whether it ends with the same winner.

The settings of racing_settings.json are scored with and without racing, in the same order and after the same
baselines; the first setting races against the best baseline. Each way has a model of its own, with nothing but the
baselines cached. The complete errors then show, without decoding, what racing would do in other orders.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from racing_settings import FILE
from search_setup import OBJECTIVE, Setup, TimedEvaluator, described, rates, row

from hsa.searches.candidates import Candidate, Result
from hsa.searches.dev_sets import DevSets
from hsa.searches.racing import Race
from hsa.searches.study import best_merge, savings_of
from hsa.searches.trials import Trial, best_of, make_trial

WITH, WITHOUT = "with racing", "without racing"
ORDERS = 100
"""Other orders of settings and utterances in which racing is computed from known errors."""


def settings(count: int) -> list[Candidate]:
    """The first of the recorded settings."""
    listed = json.loads(FILE.read_text(encoding="utf-8"))[:count]
    return [Candidate(f"setting {number}", "sampled", **each) for number, each in enumerate(listed, 1)]


def measure_racing(setup: Setup, count: int, threads: int) -> list[dict[str, object]]:
    """A row for each way; SystemExit where racing changed what was decoded."""
    dev = setup.dev()
    start = list(trials_of(dev, setup.evaluator(dev), setup.baselines, [], race=False))
    ways: dict[str, list[Trial]] = {}
    found = []
    for way in (WITH, WITHOUT):
        evaluator = setup.evaluator(dev)
        for trial in start:
            evaluator.add_cached(trial.result.weights, trial.result.texts)
        started = time.perf_counter()
        ways[way] = list(trials_of(dev, evaluator, settings(count), start, race=way == WITH))
        seconds = time.perf_counter() - started
        print(f"{way}: {seconds:.1f} s", file=sys.stderr, flush=True)
        found.append(_row(way, dev, start, ways[way], seconds, evaluator.decoding, threads))
    gate(*(ways[way] for way in (WITH, WITHOUT)))
    found[0]["note"] = other_orders(dev, start, ways[WITHOUT])
    return found


def trials_of(
    dev: DevSets, evaluator: TimedEvaluator, candidates: Sequence[Candidate], start: Sequence[Trial], *, race: bool
) -> Iterator[Trial]:
    """Score candidates one after another; each races against the best before it."""
    done = list(start)
    for candidate in candidates:
        best = best_of(done)
        result = evaluator.evaluate(candidate, best.result.errors if race and best is not None else None)
        done.append(make_trial(len(done) + 1, candidate, result, OBJECTIVE, dev))
        yield done[-1]


def gate(raced: Sequence[Trial], whole: Sequence[Trial]) -> None:
    """The texts of a stopped candidate must be the first of its texts without racing."""
    for one, other in zip(raced, whole, strict=True):
        if one.result.texts != other.result.texts[: len(one.result.texts)] or one.result.failure:
            raise SystemExit(f"correctness gate: {one.name} wrote other texts with racing than without, or failed")


def _row(
    way: str,
    dev: DevSets,
    start: Sequence[Trial],
    trials: Sequence[Trial],
    seconds: float,
    decoding: float,
    threads: int,
) -> dict[str, object]:
    best = best_merge([*start, *trials])
    assert best is not None
    texts = {item.utterance.id: text for item, text in zip(dev.items, best.result.texts, strict=True)}
    return row(
        "racing",
        way,
        set=dev.names[0],
        clips=len(dev.items),
        candidates=len(trials),
        workers=1,
        threads=threads,
        rounds=1,
        seconds=f"{seconds:.2f}",
        min_s=f"{seconds:.2f}",
        max_s=f"{seconds:.2f}",
        trials_s=f"{sum(trial.result.seconds for trial in trials):.2f}",
        decoding_s=f"{decoding:.2f}",
        best=described(best.candidate),
        **rates(dev, texts),
        **vars(savings_of(trials, len(dev.items))),
    )


def other_orders(dev: DevSets, start: Sequence[Trial], whole: Sequence[Trial], orders: int = ORDERS) -> str:
    """In how many other orders racing ends with the winner of all, and what it spares there; nothing is decoded."""
    generator = random.Random(0)
    won, spared = 0, []
    for _ in range(orders):
        places = generator.sample(range(len(dev.items)), len(dev.items))
        shuffled = replace(dev, items=tuple(dev.items[place] for place in places))
        known = [_in_order(trial, places, shuffled) for trial in start]
        entries = [_in_order(trial, places, shuffled) for trial in generator.sample(whole, len(whole))]
        raced = race_known(shuffled, known, entries)
        won += _value(best_merge([*known, *raced])) == _value(best_merge([*known, *entries]))
        spared.append(savings_of(raced, len(dev.items)).raced / (len(dev.items) * len(entries)))
    return (
        f"in {orders} random orders, simulated from these errors: as good a winner as without racing in {won}, "
        f"{100 * min(spared):.0f} to {100 * max(spared):.0f} % of the utterances not decoded"
    )


def race_known(dev: DevSets, start: Sequence[Trial], entries: Sequence[Trial]) -> list[Trial]:
    """The trials as racing leaves them, whose errors of all utterances are known."""
    done = list(start)
    for trial in entries:
        best = best_of(done)
        assert best is not None
        race, errors = Race(dev, OBJECTIVE, best.result.errors), trial.result.errors
        lasts = [last for _, last in dev.blocks() if last < len(errors)]
        last = next((last for last in lasts if race.is_lost(errors[:last])), len(errors))
        done.append(_with_errors(trial, errors[:last], dev))
    return done[len(start) :]


def _in_order(trial: Trial, places: Sequence[int], dev: DevSets) -> Trial:
    return _with_errors(trial, tuple(trial.result.errors[place] for place in places), dev)


def _with_errors(trial: Trial, errors: tuple[int, ...], dev: DevSets) -> Trial:
    result: Result = replace(trial.result, errors=errors, decoded=len(errors), texts=())
    return make_trial(trial.number, trial.candidate, result, OBJECTIVE, dev)


def _value(trial: Trial | None) -> Any:
    return None if trial is None else trial.value
