"""The command `hsa merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hsa.cli import options, printing
from hsa.cli.printing import size_text
from hsa.errors import one_line
from hsa.findings import Findings

if TYPE_CHECKING:
    from hsa.outputs.report import PlanReport


def merge(
    base: options.Base,
    primary: options.Primary,
    secondary: options.Secondary,
    output: Annotated[str, typer.Option(metavar="OUT", help="Directory to write; appears whole or not at all.")],
    k: options.K = 0.6,
    lam: options.Lambda = 0.5,
    alpha: Annotated[float, typer.Option(metavar="NUMBER", help="Layer exponent, at least 0.")] = 0.2,
    targets: options.Targets = "encoder-qkv",
    attention_scale: options.AttentionScale = 1.0,
    non_attention_scale: options.NonAttentionScale = 1.0,
    num_heads: options.NumHeads = None,
    num_layers: options.NumLayers = None,
    numerics: Annotated[
        str, typer.Option(metavar="exact|reference", help="The exact formula, or the reference script's operations.")
    ] = "exact",
    load_dtype: Annotated[
        str, typer.Option(metavar="auto|float32", help="With reference numerics: how its loader reads.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="Output: auto, float32, float16 or bfloat16.")] = "auto",
    backend: options.Backend = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    assets_from: options.AssetsFrom = "primary",
    max_shard_size: options.MaxShardSize = None,
    base_id: options.BaseId = None,
    primary_id: options.PrimaryId = None,
    secondary_id: options.SecondaryId = None,
    card: options.Card = None,
    no_hash: options.NoHash = False,
    no_sync: options.NoSync = False,
    overwrite: options.Overwrite = False,
    strict: options.Strict = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    patch: Annotated[
        bool, typer.Option("--patch", help="Write the merged rows alone, to a file for hsa apply.")
    ] = False,
) -> None:
    """Merge two fine-tunes of one pretrained Whisper model into a complete checkpoint."""
    from hsa.actions.merge import dry_run as plan_merge
    from hsa.actions.merge import run_merge
    from hsa.actions.patch import run_patch
    from hsa.actions.request import Request
    from hsa.errors import RequestError
    from hsa.methods.hsa import HsaSettings
    from hsa.outputs.card import parse_fields

    if patch and dry_run:
        raise RequestError("--dry-run plans whole checkpoints; leave out --patch or --dry-run")
    if patch and no_hash:
        raise RequestError("--no-hash leaves out digests of whole files, which a patch does not hold; leave it out")
    request = Request(
        sources={"base": base, "primary": primary, "secondary": secondary},
        output=output,
        settings=HsaSettings(
            k=k,
            lam=lam,
            alpha=alpha,
            targets=targets,  # type: ignore[arg-type]
            attention_scale=attention_scale,
            non_attention_scale=non_attention_scale,
            num_heads=num_heads,
            num_layers=num_layers,
            numerics=numerics,  # type: ignore[arg-type]
            load_dtype=load_dtype,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
        ),
        backend=backend,
        device=device,
        threads=threads,
        assets_from=assets_from,
        max_shard_size=max_shard_size,
        ids={"base": base_id, "primary": primary_id, "secondary": secondary_id},
        card=parse_fields(card or []),
        digest=not no_hash,
        sync=not no_sync,
        overwrite=overwrite,
        strict=strict,
    )
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
    names = f"{plan.targets[0].primary.name} ... {plan.targets[-1].primary.name}"
    lines = [
        f"{plan.output} (dry run: nothing was written)",
        f"  route   {plan.route}, backend {plan.backend}",
        f"  targets {len(plan.targets)} tensors, {plan.heads_to_merge} of {plan.total_heads} heads to merge: {names}",
        f"  extent  {plan.text}",
        *([f"          {plan.hint}"] if plan.hint else []),
        *([f"  fetch   {size_text(plan.bytes_to_fetch)} of weights from the Hub"] if plan.bytes_to_fetch else []),
        f"  read    {size_text(plan.bytes_to_read)}",
        f"  write   {size_text(plan.bytes_to_write)}, {size_text(plan.free_bytes)} free",
        *(f"          {name}: {size_text(size)}" for name, size in plan.files.items()),
        *(f"  note    {note}" for note in plan.notes),
        *(f"  warning {warning}" for warning in plan.warnings),
    ]
    return "\n".join(map(one_line, lines))
