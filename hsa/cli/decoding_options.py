"""Options of the commands that decode speech, each declared once: how speech is decoded, and how texts are scored."""

from __future__ import annotations

from typing import Annotated

import typer

from hsa.cli.options import HEADINGS, MACHINE

NUMERICS = HEADINGS["numerics"]

SETS_HELP = "NAME=PATH or PATH: a table, a Kaldi directory, an audio folder; repeat."

Normalizer = Annotated[
    str, typer.Option(metavar="NAME", help="auto, whisper, basic, plain or none: how texts are made comparable.")
]
Limit = Annotated[
    int | None, typer.Option(metavar="N", help="Take the first N utterances of each set.", show_default="all")
]
Confidence = Annotated[float, typer.Option(metavar="NUMBER", help="Of the intervals, between 0 and 1.")]
Language = Annotated[
    str | None,
    typer.Option(
        metavar="L", help="The language spoken, such as de.", show_default="detected", rich_help_panel=NUMERICS
    ),
]
Task = Annotated[
    str, typer.Option(metavar="TASK", help="transcribe, or translate into English.", rich_help_panel=NUMERICS)
]
Beams = Annotated[
    int, typer.Option(metavar="N", help="Width of the beam search; 1 is greedy.", rich_help_panel=NUMERICS)
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Cut an utterance that has not ended after N tokens.",
        show_default="224 for Whisper",
        rich_help_panel=NUMERICS,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="T",
        help="auto (float32 on a CPU, as stored on a GPU), float32, float16 or bfloat16.",
        rich_help_panel=NUMERICS,
    ),
]
Device = Annotated[
    str, typer.Option(metavar="D", help="To decode on: auto, cpu, cuda or cuda:N.", rich_help_panel=MACHINE)
]
Batch = Annotated[int, typer.Option(metavar="N", help="Utterances decoded at a time.", rich_help_panel=MACHINE)]
