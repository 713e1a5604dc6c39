"""The command `hsa apply`."""

from __future__ import annotations

from typing import Annotated

import typer

from hsa.cli import options, printing
from hsa.findings import Findings


def apply(
    primary: Annotated[str, typer.Argument(metavar="PRIMARY", help="The primary that the patch was made with.")],
    patch: Annotated[str, typer.Argument(metavar="PATCH", help="What hsa merge --patch or hsa sweep wrote.")],
    output: Annotated[str, typer.Option(metavar="OUT", help="Directory to write; appears whole or not at all.")],
    assets: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="Where to look for small files that primary does not have; repeat."),
    ] = None,
    threads: options.Threads = None,
    no_hash: options.NoHash = False,
    no_sync: options.NoSync = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Make the checkpoint of a merge from primary and its patch, byte for byte."""
    from hsa.actions.apply import apply as apply_patch

    with printing.progress(show=not (quiet or as_json), label="applying") as step:
        report = apply_patch(
            primary,
            patch,
            output=output,
            assets=assets or [],
            threads=threads,
            digest=not no_hash,
            sync=not no_sync,
            overwrite=overwrite,
            progress=step,
        )
    printing.findings(Findings(report.notes, report.warnings), quiet=quiet)
    printing.result(
        report.as_dict() if as_json else printing.merge_report(report), quiet, done=printing.finished(report)
    )
