"""The command `hsa search`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa.actions.source_arguments import source_names
from hsa.cli import decoding_options, options, printing
from hsa.errors import one_line
from hsa.findings import Findings
from hsa.methods.settings import DEFAULT_METHOD
from hsa.system.allocator import keep_freed_memory
from hsa.system.streams import print_stderr, stderr_is_terminal

if TYPE_CHECKING:
    from hsa.searches.comparisons import Comparison
    from hsa.searches.session import SearchStep
    from hsa.searches.study import Study


def _before() -> list[inspect.Parameter]:
    return list(options.sources())


@options.declares(_before)
def search(
    ctx: typer.Context,
    output: Annotated[str, typer.Option(metavar="DIR", help="Directory for best/, the reports and the trials.")],
    dev: Annotated[list[str], typer.Option(metavar="SET", help="NAME=PATH or PATH to choose by; repeat.")],
    test: Annotated[
        list[str] | None, typer.Option(metavar="SET", help="Decoded once, after the search; repeat.")
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="NAMES", help="A method, or several with commas: the search chooses.")
    ] = DEFAULT_METHOD,
    trials: Annotated[int, typer.Option(metavar="N", help="Models to score, baselines included.")] = 60,
    time: Annotated[
        str | None, typer.Option(metavar="TIME", help="Start no new trial after this time, such as 2h.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="tpe, cmaes, nsga2, random or grid.",
            show_default="tpe; nsga2 for pareto",
        ),
    ] = None,
    objective: Annotated[
        str, typer.Option(metavar="NAME", help="mean of the sets, worst, pareto, or one set's name.")
    ] = "mean",
    space: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=RANGE", help="LOW:HIGH, a VALUE or A,B for a setting, as ties.density; repeat."),
    ] = None,
    by_layer: Annotated[
        str | None, typer.Option(metavar="RANGES", help="Lambda and alpha for each range, such as 0-3,4-7.")
    ] = None,
    soup: Annotated[str | None, typer.Option(metavar="greedy", help="Also average models while that helps.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the sampler and the order of utterances.")] = 0,
    racing: Annotated[
        bool, typer.Option("--racing/--no-racing", help="Stop candidates that are worse than the best.")
    ] = True,
    confidence: decoding_options.Confidence = 0.95,
    normalizer: decoding_options.Normalizer = "auto",
    language: decoding_options.Language = None,
    task: decoding_options.Task = "transcribe",
    beams: decoding_options.Beams = 1,
    max_tokens: decoding_options.MaxTokens = None,
    limit: decoding_options.Limit = None,
    batch: decoding_options.Batch = 16,
    device: decoding_options.Device = "auto",
    dtype: decoding_options.Dtype = "auto",
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of merging.", show_default="cores + 1", rich_help_panel=options.MACHINE),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes that score; actors with --ray.",
            show_default="1; what the cluster has room for",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    ray: options.Ray = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Database in which several machines share one search.",
            show_default="study.db",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    study: Annotated[
        str, typer.Option(metavar="NAME", help="Of the search in that database.", rich_help_panel=options.MACHINE)
    ] = "search",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    **values: Any,
) -> None:
    """Search for the merge with the fewest word errors on your own recordings. Run it again to resume."""
    from hsa.searches.search import search as run_search

    given = options.given(ctx, values)
    sources = {name: given[name] for name in (*source_names(), "models") if name in given}
    keep_freed_memory()
    with _going_on(), _steps(show=not (quiet or as_json)) as step:
        found = run_search(
            sources,
            output=output,
            method=method,
            dev=dev,
            test=test,
            trials=trials,
            time=time,
            sampler=sampler,
            objective=objective,
            space=space,
            by_layer=by_layer,
            soup=soup,
            seed=seed,
            racing=racing,
            confidence=confidence,
            normalizer=normalizer,
            language=language,
            task=task,
            beams=beams,
            max_tokens=max_tokens,
            limit=limit,
            batch=batch,
            device=device,
            dtype=dtype,
            threads=threads,
            workers=workers,
            ray=options.ray_address(ray),
            storage=storage,
            study=study,
            progress=step,
        )
    printing.findings(Findings(found.notes, found.warnings), quiet=quiet)
    printing.result(
        found.as_dict() if as_json else _describe(found), quiet, done=f"the search {found.output} is finished"
    )


@contextmanager
def _going_on() -> Iterator[None]:
    """Say what stays when a signal ends a search."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        print_stderr("hsa: note: finished trials are kept; run the same command again to resume")
        raise


@contextmanager
def _steps(*, show: bool) -> Iterator[Any]:
    """A line on stderr for each trial, on a terminal; None where nothing is shown."""

    def step(done: SearchStep) -> None:
        last = done.last
        value = f"{100 * last.value:.2f} %" if last.values else "failed"
        stopped = " (stopped)" if last.state == "stopped" else ""
        best = "" if done.best is None else f"; best {100 * done.best.value:.2f} % by {done.best.name}"
        print_stderr(one_line(f"{done.finished}/{done.trials} {last.name}: {value}{stopped}{best}"))

    yield step if show and stderr_is_terminal() else None


def _describe(study: Study) -> str:
    from hsa.searches.databases import DATABASE

    best = study.best
    values = " / ".join(f"{100 * value:.2f} %" for value in best.values)
    lines = [
        f"{study.output}",
        f"  best    {best.name}, method {best.method}: {values} ({study.objective.text})",
        *(f"          {row}" for row in map(_row, study.test or study.dev)),
        f"  command {study.command}",
        f"  cost    {len(study.trials)} models in {study.seconds:.0f} s of trials",
    ]
    if study.savings is not None:
        spared = study.savings
        lines.append(
            f"          utterances not decoded: {spared.raced} by racing, {spared.equal} reused from equal weights"
        )
    own = ", study.db" if (study.output / DATABASE).exists() else ""
    lines.append(f"  files   best/, report.html, report.md, trials.csv, search.json{own}")
    return "\n".join(map(one_line, lines))


def _row(row: Comparison) -> str:
    interval = row.score.wer
    span = "" if interval is None else f" ({100 * interval.low:.2f} to {100 * interval.high:.2f})"
    verdict = {"better": "; best is better", "worse": "; best is worse"}.get(row.verdict or "", "")
    if row.verdict == "no difference shown":
        verdict = "; no difference shown"
    return f"{row.set}: {row.model} {100 * row.score.words.rate:.2f} %{span}{verdict}"
