"""The progress bar of commands that decode speech: utterances, and how fast they go by."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, cast

from hsa.errors import one_line
from hsa.system.streams import LenientStream, stderr_is_terminal

if TYPE_CHECKING:
    from hsa.evaluation.transcription import EvaluationProgress, Step


@contextmanager
def decoding_progress(*, show: bool) -> Iterator[EvaluationProgress | None]:
    """A bar on stderr that begins with the first batch, or None where stderr is not a terminal.

    It shows utterances per second and seconds of audio per second since the run began to decode.
    """
    if not show or not stderr_is_terminal():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=Console(file=cast(IO[str], LenientStream(sys.stderr))),
        transient=True,
    )
    task = bar.add_task("", total=None, speed="")

    def step(now: Step) -> None:
        bar.start()
        bar.update(
            task,
            completed=now.done,
            total=now.total,
            description=one_line(f"{now.model} on {now.set}")[:40],
            speed=speed_text(now),
        )

    try:
        yield step
    finally:
        bar.stop()


def speed_text(now: Step) -> str:
    """How fast a run has been.

    Example:
        >>> speed_text(Step("m", "test", 60, 120, 300.0, 20.0))
        '3.0 utt/s, 15 s audio/s'
    """
    seconds = max(now.seconds, 1e-9)
    return f"{now.done / seconds:.1f} utt/s, {now.audio_seconds / seconds:.3g} s audio/s"
