"""Verifies every output that a test publishes, right after it is in place: merge and verify must agree, everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from hsa.actions import apply as apply_module
from hsa.actions import merge as merge_module
from hsa.system.publish import PROVENANCE, StagedOutput
from hsa.verification.verify import verify

FOUND: list[str] = []
"""What verify says against outputs of the test that runs now."""


def check(output: Path) -> None:
    """Verify an output that a command has just written; anything else is left alone."""
    if (output / PROVENANCE).is_file():
        report = verify(output, threads=1)
        FOUND.extend(ascii(f"{output.name}: {problem.file}: {problem.what}") for problem in report.problems)


def check_command(arguments: Sequence[str | os.PathLike[str]]) -> None:
    """The same for what a finished command line names as its output, and for the outputs directly below that."""
    given = [os.fspath(argument) for argument in arguments]
    for place, argument in enumerate(given):
        name, equals, value = argument.partition("=")
        if name == "--output":
            output = Path(value if equals else given[place + 1])
            for directory in (output, *output.glob("*/")):
                check(directory)


@contextmanager
def every_output_verified(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While the block lasts, every output that this process finishes and publishes is verified; AssertionError at its
    end where one is not sound. Directories that tests stage by hand hold no output and are left alone."""
    FOUND.clear()
    finished: set[int] = set()
    publish: Callable[[StagedOutput], None] = StagedOutput.publish

    def noting(finish: Callable[..., None]) -> Callable[..., None]:
        def finish_and_note(staging: StagedOutput, *arguments: object, **options: object) -> None:
            finish(staging, *arguments, **options)
            finished.add(id(staging))

        return finish_and_note

    def publish_and_verify(staging: StagedOutput) -> None:
        publish(staging)
        if id(staging) in finished:
            finished.remove(id(staging))
            check(staging.destination)

    for module in (merge_module, apply_module):
        monkeypatch.setattr(module, "write_metadata_files", noting(module.write_metadata_files))
    monkeypatch.setattr(StagedOutput, "publish", publish_and_verify)
    yield
    assert not FOUND, f"hsa verify does not accept what hsa has just written: {FOUND[:3]}"
