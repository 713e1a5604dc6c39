"""The command `hsa sweep`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa.actions.keywords import SWEEP
from hsa.cli import options, printing
from hsa.cli.decoding_options import SETS_HELP, Batch, Device, Language, Limit, Normalizer
from hsa.cli.decoding_progress import decoding_progress
from hsa.cli.printing import size_text
from hsa.errors import one_line
from hsa.findings import Findings
from hsa.methods.settings import Declared
from hsa.option_names import keys_named, spelled
from hsa.system.allocator import keep_freed_memory
from hsa.system.streams import print_stderr

if TYPE_CHECKING:
    from hsa.evaluation.transcription import EvaluationProgress, Step
    from hsa.sweeps.sweep import SweepReport


def _before() -> list[inspect.Parameter]:
    return [*options.sources(), options.method()]


def _after() -> list[inspect.Parameter]:
    return [*options.settings(SWEEP), *options.run(SWEEP.declared_options()), *options.ids()]


@options.declares(_before, _after)
def sweep(
    ctx: typer.Context,
    output: Annotated[str, typer.Option(metavar="DIR", help="Directory for the points and their index.")],
    full: Annotated[bool, typer.Option("--full", help="Write checkpoints instead of patches.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Patches in a reading of the sources, or checkpoints at a time.",
            show_default="128 patches, 1 checkpoint",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--eval", metavar="SET", help=f"Show the WER of each point on it. {SETS_HELP}"),
    ] = None,
    normalizer: Normalizer = "auto",
    limit: Limit = None,
    language: Language = None,
    device: Device = "auto",
    batch: Batch = 16,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    **values: Any,
) -> None:
    """Merge with every combination of parameters, from one reading of the sources' targets. With --eval, show and write
    the word error rate of each."""
    from hsa.sweeps import grid
    from hsa.sweeps.sweep import sweep as run_sweep

    keywords = options.given_merge(ctx, values, SWEEP)
    lists = {each.name: grid.values(each, keywords[each.name]) for each in _axes() if each.name in keywords}
    bars = not (quiet or as_json)
    if data is not None:
        keep_freed_memory()
    with _noting_what_stays(evaluated=data is not None), spelled(keys_named({"data": "--eval"})), ExitStack() as stack:
        merging = stack.enter_context(ExitStack())
        step = merging.enter_context(printing.progress(show=bars, label="sweeping"))
        decoded = stack.enter_context(decoding_progress(show=bars))
        report = run_sweep(
            output=output,
            full=full,
            jobs=jobs,
            data=data,
            normalizer=normalizer,
            limit=limit,
            language=language,
            device=device,
            batch=batch,
            progress=step,
            evaluation_progress=None if decoded is None else _ending(merging, decoded),
            **{**keywords, **lists},
        )
    printing.findings(Findings(report.notes, report.warnings), quiet=quiet)
    printing.result(
        report.as_dict() if as_json else _describe(report), quiet, done=f"the sweep {report.output} is whole"
    )


def _axes() -> list[Declared]:
    return [each for each in SWEEP.declared_settings() if each.about.axis]


def _ending(merging: ExitStack, decoded: EvaluationProgress) -> EvaluationProgress:
    """A bar of decoding, before whose first step the bar of merging ends."""

    def step(now: Step) -> None:
        merging.close()
        decoded(now)

    return step


@contextmanager
def _noting_what_stays(*, evaluated: bool) -> Iterator[None]:
    """Say what stays when a signal ends a sweep."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        what = "points that were finished" + ", and transcripts of finished batches," * evaluated
        print_stderr(f"hsa: note: {what} stay; run the sweep again to go on")
        raise


def _describe(report: SweepReport) -> str:
    lines = [
        f"{report.output}",
        f"  {len(report.made)} points made, {len(report.skipped)} were there and verified; {len(report.entries)} in "
        f"index.json and index.csv",
        *([f"  {report.extent_range}"] if report.extent_range else []),
        f"  {size_text(report.bytes_read)} read, {size_text(report.bytes_written)} written in {report.seconds:.2f} s, "
        f"peak memory {size_text(report.peak_memory_bytes)}",
    ]
    text = "\n".join(map(one_line, lines))
    if report.scores is None:
        return text
    found = report.scores.evaluation
    took = "nothing to decode: every transcript was there"
    if found.decoded:
        took = f"{found.decoded} utterances decoded in {found.seconds:.0f} s on {found.device}"
    files = one_line(f"written: {report.output}/wer.csv, evaluation/")
    return "\n\n".join([text, report.scores.table, f"{took}\n{files}"])
