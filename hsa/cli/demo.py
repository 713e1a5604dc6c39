"""The command `hsa demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hsa.cli import options


def demo(
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the triple and the merge here.", show_default="temporary")
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Build a small Whisper-shaped triple, merge it, verify it, and show the merged heads."""
    from hsa.testing.demo import run_demo

    run_demo(output)
