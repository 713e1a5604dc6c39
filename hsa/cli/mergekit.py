"""The command `hsa mergekit`."""

from __future__ import annotations

from typing import Annotated

import typer

from hsa.cli import options, printing
from hsa.errors import one_line
from hsa.findings import Findings


def mergekit(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG OUT", help="mergekit's YAML, the directory to write, and mergekit's own options."
        ),
    ],
    debug: options.Debug = False,
) -> None:
    """Run mergekit with merge method hsa, on Whisper; mergekit-yaml --help lists its own options."""
    from hsa.integrations.mergekit import run as run_mergekit

    result = run_mergekit(arguments)
    printing.findings(Findings(tuple(result.notes), tuple(result.warnings)))
    lines = [one_line(str(result.output))]
    if result.extent is not None:
        lines += [f"  {text}" for text in (result.extent.headline, result.extent.text)]
    printing.result("\n".join(lines), quiet=False, done=f"the output {result.output} is whole")
