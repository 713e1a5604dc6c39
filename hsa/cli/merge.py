"""The command `hsa merge`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa.actions.keywords import MERGE
from hsa.cli import options, printing
from hsa.cli.printing import size_text
from hsa.errors import one_line
from hsa.findings import Findings

if TYPE_CHECKING:
    from hsa.outputs.report import PlanReport


def _before() -> list[inspect.Parameter]:
    return [*options.sources(), options.method(), options.config()]


def _after() -> list[inspect.Parameter]:
    return [*options.settings(MERGE), *options.run(MERGE.declared_options()), *options.ids()]


@options.declares(_before, _after)
def merge(
    ctx: typer.Context,
    output: Annotated[str, typer.Option(metavar="OUT", help="Directory to write; appears whole or not at all.")],
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    patch: Annotated[
        bool,
        typer.Option(
            "--patch", help="Write the merged rows alone, to a file for hsa apply.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
    **values: Any,
) -> None:
    """Merge fine-tunes of one pretrained model into a complete checkpoint."""
    from hsa.actions.merge import dry_run as plan_merge
    from hsa.actions.merge import run_merge
    from hsa.actions.patch import run_patch
    from hsa.actions.request import Request
    from hsa.errors import RequestError

    keywords = options.given_merge(ctx, values, MERGE)
    if patch and dry_run:
        raise RequestError("--dry-run plans whole checkpoints; leave out --patch or --dry-run")
    if patch and not keywords.get("digest", True):
        raise RequestError("--no-hash leaves out digests of whole files, which a patch does not hold; leave it out")
    request = Request.of(output=output, **keywords)
    if dry_run:
        plan = plan_merge(request)
        printing.result(plan.as_dict() if as_json else _describe_plan(plan), quiet)
        return
    with printing.progress(show=not (quiet or as_json)) as step:
        report = run_patch(request, step) if patch else run_merge(request, step)
    printing.findings(Findings(report.notes, report.warnings), quiet=quiet)
    printing.result(
        report.as_dict() if as_json else printing.merge_report(report), quiet, done=printing.finished(report)
    )


def _describe_plan(plan: PlanReport) -> str:
    extent = plan.extent
    names = f"{plan.targets[0].stored.name} ... {plan.targets[-1].stored.name}"
    lines = [
        f"{plan.output} (dry run: nothing was written)",
        f"  route   {plan.route}, backend {plan.backend}",
        f"  targets {extent.headline}: {names}",
        *([f"  extent  {extent.text}"] if extent.text != extent.headline else []),
        *([f"          {plan.hint}"] if plan.hint else []),
        *([f"  fetch   {size_text(plan.bytes_to_fetch)} of weights from the Hub"] if plan.bytes_to_fetch else []),
        f"  read    {size_text(plan.bytes_to_read)}",
        f"  write   {size_text(plan.bytes_to_write)}, {size_text(plan.free_bytes)} free",
        *(f"          {name}: {size_text(size)}" for name, size in plan.files.items()),
        *(f"  note    {note}" for note in plan.notes),
        *(f"  warning {warning}" for warning in plan.warnings),
    ]
    return "\n".join(map(one_line, lines))
