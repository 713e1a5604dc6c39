"""The command `hsa sweep`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from hsa.cli import options, printing
from hsa.cli.printing import size_text
from hsa.errors import one_line
from hsa.findings import Findings
from hsa.system.streams import print_stderr

if TYPE_CHECKING:
    from hsa.sweeps.sweep import SweepReport


def sweep(
    base: options.Base,
    primary: options.Primary,
    secondary: options.Secondary,
    output: Annotated[str, typer.Option(metavar="DIR", help="Directory for the points and their index.")],
    k: Annotated[str, typer.Option(metavar="VALUES", help="Such as 0.2,0.6 or 0:1:0.1.")] = "0.6",
    lam: Annotated[str, typer.Option("--lambda", metavar="VALUES", help="Such as 0.1,0.3 or 0:1:0.1.")] = "0.5",
    alpha: Annotated[str, typer.Option(metavar="VALUES", help="Such as 0.2 or 0:2:0.5.")] = "0.2",
    targets: Annotated[
        str, typer.Option(metavar="PRESETS", help="One preset, or several with commas.")
    ] = "encoder-qkv",
    full: Annotated[bool, typer.Option("--full", help="Write checkpoints instead of patches.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Patches in a reading of the sources, or checkpoints at a time.",
            show_default="128 patches, 1 checkpoint",
        ),
    ] = None,
    num_heads: options.NumHeads = None,
    num_layers: options.NumLayers = None,
    threads: options.Threads = None,
    assets_from: options.AssetsFrom = "primary",
    max_shard_size: options.MaxShardSize = None,
    base_id: options.BaseId = None,
    primary_id: options.PrimaryId = None,
    secondary_id: options.SecondaryId = None,
    card: options.Card = None,
    no_hash: options.NoHash = False,
    no_sync: options.NoSync = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make points anew that were made otherwise.")] = False,
    strict: options.Strict = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Merge with every combination of parameters, from one reading of the sources' targets."""
    from hsa.outputs.card import parse_fields
    from hsa.sweeps import grid
    from hsa.sweeps.sweep import sweep as run_sweep

    bars = not (quiet or as_json)
    with _noting_finished_points(), printing.progress(show=bars, label="sweeping") as step:
        report = run_sweep(
            base=base,
            primary=primary,
            secondary=secondary,
            output=output,
            k=grid.numbers("k", k),
            lam=grid.numbers("lam", lam),
            alpha=grid.numbers("alpha", alpha),
            targets=[name.strip() for name in targets.split(",")],  # type: ignore[misc]
            num_heads=num_heads,
            num_layers=num_layers,
            full=full,
            jobs=jobs,
            threads=threads,
            assets_from=assets_from,
            max_shard_size=max_shard_size,
            base_id=base_id,
            primary_id=primary_id,
            secondary_id=secondary_id,
            card=parse_fields(card or []),
            digest=not no_hash,
            sync=not no_sync,
            overwrite=overwrite,
            strict=strict,
            progress=step,
        )
    printing.findings(Findings(report.notes, report.warnings), quiet=quiet)
    printing.result(
        report.as_dict() if as_json else _describe(report), quiet, done=f"the sweep {report.output} is whole"
    )


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
        *_extent(report),
        f"  {size_text(report.bytes_read)} read, {size_text(report.bytes_written)} written in {report.seconds:.2f} s, "
        f"peak memory {size_text(report.peak_memory_bytes)}",
    ]
    return "\n".join(map(one_line, lines))


def _extent(report: SweepReport) -> list[str]:
    """How much the points merge that change primary the least and the most."""
    from hsa.outputs.extent import percent

    changes = {name: extent.change for name, extent in report.extents.items() if extent.change is not None}
    if not changes:
        return []
    least, most = (choose(changes, key=lambda name: changes[name]) for choose in (min, max))
    return [
        f"  the output differs from primary by {percent(changes[least])} % ({least}) to {percent(changes[most])} % "
        f"({most}) of its task vector (on the target tensors)"
    ]
