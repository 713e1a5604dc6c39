"""Options that `hsa eval` and `hsa sweep` share: on which speech models are evaluated, and how it is decoded."""

from __future__ import annotations

from typing import Annotated

import typer

from hsa.cli import options

NUMERICS = options.HEADINGS["numerics"]

SETS_HELP = "NAME=PATH or PATH: a table, a Kaldi directory, an audio folder; repeat."

Normalizer = Annotated[
    str, typer.Option(metavar="NAME", help="auto, whisper, basic, plain or none: how texts are made comparable.")
]
Limit = Annotated[
    int | None, typer.Option(metavar="N", help="Take the first N utterances of each set.", show_default="all")
]
Language = Annotated[
    str | None,
    typer.Option(
        metavar="L", help="The language spoken, such as de.", show_default="detected", rich_help_panel=NUMERICS
    ),
]
Device = Annotated[
    str,
    typer.Option(metavar="D", help="To decode on: auto, cpu, cuda or cuda:N.", rich_help_panel=options.MACHINE),
]
Batch = Annotated[int, typer.Option(metavar="N", help="Utterances decoded at a time.", rich_help_panel=options.MACHINE)]
