"""Workers: one grid scored without racing by one process of one torch thread, and by two workers of one thread each.

A grid has the same points whatever the order in which they are asked for, and without racing each point costs the same
whatever was scored before it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from programs import measure
from search_setup import Setup, row, search_program, timed, warm

ONE, TWO, RAY = "one process", "two workers", "two Ray actors"
WORKERS: Mapping[str, tuple[str, ...]] = {ONE: (), TWO: ("--workers=2",), RAY: ("--workers=2", "--ray")}
"""Ways to score a list, and the options of `hsa search` that ask for them."""


def measure_workers(
    setup: Setup, trials: int, ways: Sequence[str], rounds: int, folder: Path
) -> Iterator[dict[str, object]]:
    """A row for each way to score one grid, every process with one torch thread."""
    more = ("--sampler=grid", "--no-racing", "--threads=1")
    programs = {way: search_program(setup, trials, 1, *more, *WORKERS[way]) for way in ways}
    for number in range(rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            run = measure(programs[way], folder / "workers", partial(warm, setup))
            programs[way].runs.setdefault("warm", []).append(run)
            print(f"{way}: {run.seconds:.1f} s", file=sys.stderr, flush=True)
    scores = {way: scores_of(program.runs["warm"][0].report) for way, program in programs.items()}
    for way in ways:
        if scores[way] != scores[ways[0]]:
            raise SystemExit(f"correctness gate: {way} scored other candidates than {ways[0]}, or gave other scores")
        study = programs[way].runs["warm"][0].report
        yield row(
            "workers", way, set=setup.clips.name, clips=setup.limit or len(setup.dev().items),
            candidates=len(study["trials"]), workers=1 if way == ONE else 2, threads=1,
            **timed(programs[way].runs["warm"]), best=study["best"], **study["savings"],
        )  # fmt: skip


def scores_of(study: Mapping[str, Any]) -> list[str]:
    """Each candidate with its word errors, in an order that does not depend on who scored first."""
    return sorted(
        json.dumps([trial[key] for key in ("method", "settings", "source", "wer")]) for trial in study["trials"]
    )
