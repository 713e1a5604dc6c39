"""The command `hsa sweep`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa.actions.keywords import SWEEP
from hsa.cli import options, printing
from hsa.cli.printing import size_text
from hsa.errors import one_line
from hsa.findings import Findings
from hsa.methods.settings import Declared
from hsa.system.streams import print_stderr

if TYPE_CHECKING:
    from hsa.sweeps.sweep import SweepReport


def _before() -> list[inspect.Parameter]:
    return [*options.sources(), options.method()]


def _after() -> list[inspect.Parameter]:
    return [*options.settings(SWEEP), *options.run(SWEEP.declared_options()), *options.ids()]


@options.declares(_before, _after)
def sweep(
    ctx: typer.Context,
    output: Annotated[str, typer.Option(metavar="DIR", help="Directory for the points and their index.")],
    full: Annotated[bool, typer.Option("--full", help="Write checkpoints instead of patches.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Patches in a reading of the sources, or checkpoints at a time.",
            show_default="128 patches, 1 checkpoint",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    **values: Any,
) -> None:
    """Merge with every combination of parameters, from one reading of the sources' targets."""
    from hsa.sweeps import grid
    from hsa.sweeps.sweep import sweep as run_sweep

    keywords = options.given_merge(ctx, values, SWEEP)
    lists = {each.name: grid.values(each, keywords[each.name]) for each in _axes() if each.name in keywords}
    bars = not (quiet or as_json)
    with _noting_finished_points(), printing.progress(show=bars, label="sweeping") as step:
        report = run_sweep(output=output, full=full, jobs=jobs, progress=step, **{**keywords, **lists})
    printing.findings(Findings(report.notes, report.warnings), quiet=quiet)
    printing.result(
        report.as_dict() if as_json else _describe(report), quiet, done=f"the sweep {report.output} is whole"
    )


def _axes() -> list[Declared]:
    return [each for each in SWEEP.declared_settings() if each.about.axis]


@contextmanager
def _noting_finished_points() -> Iterator[None]:
    """Say what stays when a signal ends a sweep."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        print_stderr("hsa: note: points that were finished stay; run the sweep again to go on")
        raise


def _describe(report: SweepReport) -> str:
    lines = [
        f"{report.output}",
        f"  {len(report.made)} points made, {len(report.skipped)} were there and verified; {len(report.entries)} in "
        f"index.json and index.csv",
        *([f"  {report.extent_range}"] if report.extent_range else []),
        f"  {size_text(report.bytes_read)} read, {size_text(report.bytes_written)} written in {report.seconds:.2f} s, "
        f"peak memory {size_text(report.peak_memory_bytes)}",
    ]
    return "\n".join(map(one_line, lines))
