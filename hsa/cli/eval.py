"""The command `hsa eval`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from hsa.cli import decoding_options, options, printing
from hsa.cli.decoding_progress import decoding_progress
from hsa.errors import one_line
from hsa.findings import Findings
from hsa.system.allocator import keep_freed_memory
from hsa.system.streams import print_stderr

if TYPE_CHECKING:
    from hsa.evaluation.report import Evaluation


def eval_(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="A checkpoint, a hub id, or PRIMARY+PATCH.safetensors.")
    ],
    data: Annotated[list[str], typer.Option(metavar="SET", help=decoding_options.SETS_HELP)],
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Show how the others differ from it, with intervals.")
    ] = None,
    normalizer: decoding_options.Normalizer = "auto",
    limit: decoding_options.Limit = None,
    confidence: decoding_options.Confidence = 0.95,
    language: decoding_options.Language = None,
    task: decoding_options.Task = "transcribe",
    beams: decoding_options.Beams = 1,
    max_tokens: decoding_options.MaxTokens = None,
    dtype: decoding_options.Dtype = "auto",
    output: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Keep transcripts, scores.csv, scores.json and report.html here; run it again to go on.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    trn: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Write NIST's trn files for sclite.", rich_help_panel=options.OUTPUT),
    ] = None,
    device: decoding_options.Device = "auto",
    batch: decoding_options.Batch = 16,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Transcribe speech with models, and show word error rates with intervals and differences."""
    from hsa.evaluation.evaluate import evaluate

    keep_freed_memory()
    with _noting_transcripts(output), decoding_progress(show=not (quiet or as_json)) as step:
        report = evaluate(
            models,
            data,
            output=output,
            baseline=baseline,
            normalizer=normalizer,
            language=language,
            task=task,
            device=device,
            dtype=dtype,
            batch=batch,
            beams=beams,
            max_tokens=max_tokens,
            limit=limit,
            confidence=confidence,
            trn=trn,
            progress=step,
        )
    printing.findings(Findings((*report.run_notes, *report.notes)), quiet=quiet)
    done = "" if report.output is None else f"{report.output} is whole"
    printing.result(report.as_dict() if as_json else _describe(report), quiet, done=done)


@contextmanager
def _noting_transcripts(output: str | None) -> Iterator[None]:
    """Say what stays when a signal ends a run."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        if output is not None:
            print_stderr("hsa: note: transcripts of finished batches stay; run it again to go on")
        raise


def _describe(report: Evaluation) -> str:
    lines = [report.table]
    if report.decoded:
        speed = f"{report.decoded / report.seconds:.2g} utterances and {report.audio_seconds / report.seconds:.3g} s"
        took = f"{report.decoded} utterances decoded in {report.seconds:.0f} s on {report.device}"
        lines.append(f"\n{took}: {speed} of audio a second")
    else:
        lines.append("\nnothing to decode: every transcript was there")
    if report.output is not None:
        lines.append(one_line(f"written: {report.output}/scores.csv, scores.json, report.html"))
    return "\n".join(lines)
