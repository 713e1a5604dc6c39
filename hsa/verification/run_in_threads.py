"""Run the tasks of a verification in threads, while sampling memory and reporting progress."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from hsa.option_names import with_current_spelling
from hsa.verification.context import VerifyContext

INTERVAL = 0.02
"""Seconds between two memory samples, and between two progress calls."""


def run_in_threads(
    tasks: Sequence[Callable[[], None]],
    context: VerifyContext,
    stop: threading.Event,
    progress: Callable[[], tuple[int, int]],
) -> None:
    """Run every task and raise the first error of any. `progress` returns the bytes done and the total bytes.

    `stop` is set at the end and after an error, so that tasks that check it end soon.
    """
    with ThreadPoolExecutor(context.threads) as pool:
        pending: set[Future[None]] = {pool.submit(with_current_spelling(task)) for task in tasks}
        try:
            while pending:
                finished, pending = wait(pending, timeout=INTERVAL)
                for future in finished:
                    future.result()
                context.memory.sample()
                if context.progress is not None:
                    context.progress(*progress())
        finally:
            stop.set()
