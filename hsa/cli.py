"""The command line: parse, call, print. It decides nothing that `hsa.api` could."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa._version import __version__
from hsa.console import fail, guarded
from hsa.errors import one_line

if TYPE_CHECKING:
    from hsa.report import MergeReport, PlanReport

USAGE_ERROR: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]
"""click's UsageError: typer brings a click of its own or uses the installed one, depending on its version."""

app = typer.Typer(
    name="hsa",
    help="Headwise Selective Attention merge for Whisper fine-tunes: streamed, exact, as fast as a copy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code; see `hsa.console.guarded`."""
    debug = "--debug" in arguments

    def work() -> int:
        try:
            result = typer.main.get_command(app).main(list(arguments), prog_name="hsa", standalone_mode=False)
        except typer.Exit as error:
            return error.exit_code
        except USAGE_ERROR as error:
            message = error.format_message()  # type: ignore[attr-defined]
            if not message:  # the bare command: its help is printed already
                return 2
            return fail(f"{message.rstrip('.')}. See: hsa {_command(arguments)}--help", 2, debug=debug)
        except typer.Abort:
            raise KeyboardInterrupt from None
        return result if isinstance(result, int) else 0

    return guarded(work, debug=debug)


def _command(arguments: Sequence[str]) -> str:
    """The sub-command with a space after it, for a hint; nothing where there is none."""
    names = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]
    return f"{arguments[0]} " if arguments and arguments[0] in names else ""


@app.callback(invoke_without_command=True)
def _program(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def merge(
    base: Annotated[
        str, typer.Option(metavar="SOURCE", help="Pretrained model: a directory, org/name@revision, or OpenAI's .pt.")
    ],
    primary: Annotated[str, typer.Option(metavar="SOURCE", help="Anchor fine-tune: kept wherever nothing is merged.")],
    secondary: Annotated[str, typer.Option(metavar="SOURCE", help="Fine-tune blended into the selected heads.")],
    output: Annotated[str, typer.Option(metavar="OUT", help="Directory to write; appears whole or not at all.")],
    k: Annotated[float, typer.Option(help="Share of heads merged per tensor; above 1 a percentage.")] = 0.6,
    lam: Annotated[float, typer.Option("--lambda", help="Weight of primary in a merged head, 0 to 1.")] = 0.5,
    alpha: Annotated[float, typer.Option(help="Layer exponent, at least 0.")] = 0.2,
    targets: Annotated[
        str, typer.Option(metavar="PRESET", help="encoder-qkv, attention-qkv or attention-all.")
    ] = "encoder-qkv",
    attention_scale: Annotated[float, typer.Option(help="Factor on the task vectors of the targets.")] = 1.0,
    non_attention_scale: Annotated[float, typer.Option(help="Factor on primary's task vector elsewhere.")] = 1.0,
    num_heads: Annotated[int | None, typer.Option(metavar="N", help="Heads, instead of config.json's.")] = None,
    num_layers: Annotated[int | None, typer.Option(metavar="N", help="Layers L, instead of config.json's.")] = None,
    numerics: Annotated[
        str, typer.Option(metavar="exact|reference", help="The exact formula, or the reference script's operations.")
    ] = "exact",
    load_dtype: Annotated[
        str, typer.Option(metavar="auto|float32", help="With reference numerics: how its loader reads.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="Output: auto, float32, float16 or bfloat16.")] = "auto",
    backend: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or triton.")] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(metavar="N", help="Worker threads.", show_default="cores + 1")] = None,
    assets_from: Annotated[
        str, typer.Option(metavar="ROLE", help="Whose tokenizer and processor files: primary, secondary or base.")
    ] = "primary",
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Such as 5GB.", show_default="primary's own shards")
    ] = None,
    base_id: Annotated[str | None, typer.Option(metavar="ID", help="Hub id to record for base.")] = None,
    primary_id: Annotated[str | None, typer.Option(metavar="ID", help="Hub id to record for primary.")] = None,
    secondary_id: Annotated[str | None, typer.Option(metavar="ID", help="Hub id to record for secondary.")] = None,
    card: Annotated[list[str] | None, typer.Option(metavar="FIELD=VALUE", help="Model card field; repeat.")] = None,
    no_hash: Annotated[bool, typer.Option("--no-hash", help="Leave out digests of whole files.")] = False,
    no_sync: Annotated[bool, typer.Option("--no-sync", help="Do not wait for the disk.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and errors alone.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Add the traceback to an error.")] = False,
    patch: Annotated[bool, typer.Option("--patch", hidden=True)] = False,
) -> None:
    """Merge two fine-tunes of one pretrained Whisper model into a complete checkpoint."""
    from hsa import api
    from hsa.card import parse_fields
    from hsa.config import MergeConfig
    from hsa.errors import RequestError

    if patch:
        raise RequestError("--patch is not part of this version yet; without it the merge is a whole checkpoint")
    request = api.Request(
        sources={"base": base, "primary": primary, "secondary": secondary},
        output=output,
        config=MergeConfig(
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
        assets_from=assets_from,  # type: ignore[arg-type]
        max_shard_size=max_shard_size,
        ids={"base": base_id, "primary": primary_id, "secondary": secondary_id},
        card=parse_fields(card or []),
        digest=not no_hash,
        sync=not no_sync,
        overwrite=overwrite,
    )
    if dry_run:
        plan = api.dry_run(request)
        _print(plan.as_dict() if as_json else _describe_plan(plan), quiet)
        return
    with _progress(show=sys.stderr.isatty() and not (quiet or as_json)) as step:
        report = api.run(request, step)
    for warning in report.warnings:
        print(f"hsa: warning: {one_line(warning)}", file=sys.stderr)
    if not quiet:
        for note in report.notes:
            print(f"hsa: note: {one_line(note)}", file=sys.stderr)
    _print(report.as_dict() if as_json else _describe_report(report), quiet)


@app.command(context_settings={"ignore_unknown_options": True})
def mergekit(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG OUT", help="mergekit's YAML, the directory to write, and mergekit's own options."
        ),
    ],
    debug: Annotated[bool, typer.Option("--debug", help="Add the traceback to an error.")] = False,
) -> None:
    """Run mergekit with merge method hsa, on Whisper; mergekit-yaml --help lists its own options."""
    from hsa.integrations.mergekit import run as run_mergekit

    result = run_mergekit(arguments)
    for warning in result.warnings:
        print(f"hsa: warning: {one_line(warning)}", file=sys.stderr)
    for note in result.notes:
        print(f"hsa: note: {one_line(note)}", file=sys.stderr)
    print(one_line(str(result.output)))
    if result.tensors:
        print(f"  {result.selected_heads} of {result.total_heads} heads merged in {result.tensors} tensors")


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the triple and the merge here.", show_default="temporary")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Add the traceback to an error.")] = False,
) -> None:
    """Build a small Whisper-shaped triple, merge it, verify it, and show the merged heads."""
    from hsa.demo import run_demo

    run_demo(output)


def _print(content: dict[str, Any] | str, quiet: bool) -> None:
    if isinstance(content, dict):
        print(json.dumps(content))
    elif not quiet:
        print(content)


def _describe_report(report: MergeReport) -> str:
    narrowest = report.narrowest
    lines = [
        f"{report.output}",
        f"  {report.selected_heads} of {report.total_heads} heads merged in {len(report.tensors)} tensors "
        f"({report.route} route, backend {report.backend})",
        f"  {_bytes(report.bytes_read)} read, {_bytes(report.bytes_written)} written in {report.seconds:.2f} s, "
        f"peak memory {_bytes(report.peak_memory_bytes)}",
    ]
    if report.bytes_fetched:
        lines.append(f"  {_bytes(report.bytes_fetched)} fetched from the Hub")
    if narrowest is not None:
        lines.append(f"  narrowest margin {narrowest.margin:.2g} in {narrowest.name}")
    return "\n".join(map(one_line, lines))


def _describe_plan(plan: PlanReport) -> str:
    heads = sum(target.heads for target in plan.targets)
    kept = sum(target.keep for target in plan.targets)
    names = f"{plan.targets[0].primary.name} ... {plan.targets[-1].primary.name}"
    lines = [
        f"{plan.output} (dry run: nothing was written)",
        f"  route   {plan.route}, backend {plan.backend}",
        f"  targets {len(plan.targets)} tensors, {kept} of {heads} heads to merge: {names}",
        *([f"  fetch   {_bytes(plan.bytes_to_fetch)} of weights from the Hub"] if plan.bytes_to_fetch else []),
        f"  read    {_bytes(plan.bytes_to_read)}",
        f"  write   {_bytes(plan.bytes_to_write)}, {_bytes(plan.free_bytes)} free",
        *(f"          {name}: {_bytes(size)}" for name, size in plan.files.items()),
        *(f"  note    {note}" for note in plan.notes),
        *(f"  warning {warning}" for warning in plan.warnings),
    ]
    return "\n".join(map(one_line, lines))


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} GB"


@contextmanager
def _progress(*, show: bool) -> Iterator[Any]:
    """A progress bar on stderr that begins with the first step, or None: before, sources may show bars of their own."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    bar = Progress(
        "merging",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("merging", total=None)

    def step(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield step
    finally:
        bar.stop()
