"""Options that several commands share, each declared once."""

from __future__ import annotations

from typing import Annotated

import typer

Base = Annotated[
    str, typer.Option(metavar="SOURCE", help="Pretrained model: a directory, org/name@revision, or OpenAI's .pt.")
]
Primary = Annotated[str, typer.Option(metavar="SOURCE", help="Anchor fine-tune: kept wherever nothing is merged.")]
Secondary = Annotated[str, typer.Option(metavar="SOURCE", help="Fine-tune blended into the selected heads.")]
Targets = Annotated[str, typer.Option(metavar="PRESET", help="encoder-qkv, attention-qkv or attention-all.")]
K = Annotated[
    float, typer.Option(metavar="NUMBER", help="Share of heads merged per tensor, 0 to 1; above 1 a percentage.")
]
Lambda = Annotated[
    float, typer.Option("--lambda", metavar="NUMBER", help="Weight of primary in a merged head, 0 to 1.")
]
AttentionScale = Annotated[float, typer.Option(metavar="NUMBER", help="Factor on the task vectors of the targets.")]
NonAttentionScale = Annotated[float, typer.Option(metavar="NUMBER", help="Factor on primary's task vector elsewhere.")]
NumHeads = Annotated[int | None, typer.Option(metavar="N", help="Heads, instead of config.json's.")]
NumLayers = Annotated[int | None, typer.Option(metavar="N", help="Layers L, instead of config.json's.")]
Backend = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or triton.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(metavar="N", help="Worker threads.", show_default="cores + 1")]
AssetsFrom = Annotated[
    str, typer.Option(metavar="ROLE", help="Whose tokenizer and processor files: primary, secondary or base.")
]
MaxShardSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Such as 5GB.", show_default="primary's own shards")
]
BaseId = Annotated[str | None, typer.Option(metavar="ID", help="Hub id to record for base.")]
PrimaryId = Annotated[str | None, typer.Option(metavar="ID", help="Hub id to record for primary.")]
SecondaryId = Annotated[str | None, typer.Option(metavar="ID", help="Hub id to record for secondary.")]
Card = Annotated[list[str] | None, typer.Option(metavar="FIELD=VALUE", help="Model card field; repeat.")]
NoHash = Annotated[bool, typer.Option("--no-hash", help="Leave out digests of whole files.")]
NoSync = Annotated[bool, typer.Option("--no-sync", help="Do not wait for the disk.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]
Strict = Annotated[bool, typer.Option("--strict", help="Make warnings errors: nothing is written then.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print warnings and errors alone.")]
Debug = Annotated[bool, typer.Option("--debug", help="Add the traceback to an error.")]
