"""The command `hsa apply`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hsa.actions.keywords import APPLY
from hsa.cli import options, printing
from hsa.findings import Findings


@options.declares(after=lambda: list(options.run(APPLY.declared_options())))
def apply(
    ctx: typer.Context,
    primary: Annotated[str, typer.Argument(metavar="PRIMARY", help="The primary that the patch was made with.")],
    patch: Annotated[str, typer.Argument(metavar="PATCH", help="What hsa merge --patch or hsa sweep wrote.")],
    output: Annotated[str, typer.Option(metavar="OUT", help="Directory to write; appears whole or not at all.")],
    assets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="Where to look for small files that primary does not have; repeat.",
            rich_help_panel=options.SOURCES,
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    **values: Any,
) -> None:
    """Make the checkpoint of a merge from primary and its patch, byte for byte."""
    from hsa.actions.apply import apply as apply_patch

    run_options = options.given(ctx, values)
    with printing.progress(show=not (quiet or as_json), label="applying") as step:
        report = apply_patch(primary, patch, output=output, assets=assets or [], progress=step, **run_options)
    printing.findings(Findings(report.notes, report.warnings), quiet=quiet)
    printing.result(
        report.as_dict() if as_json else printing.merge_report(report), quiet, done=printing.finished(report)
    )
