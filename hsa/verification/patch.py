"""Verify a patch: its digests, its rows, and its document against its parameters. With sources, recompute its merge."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from hsa.errors import SourceChanged, SourceError
from hsa.outputs.patch_checks import patch_faults
from hsa.outputs.patch_reader import Patch, open_patch
from hsa.verification.context import SourcePaths, VerifyContext
from hsa.verification.report import VerifyResult


def verify_patch(path: Path, source_paths: SourcePaths | None, context: VerifyContext) -> VerifyResult:
    """Check a patch file, whose path has its links resolved. With sources, recompute its merge and compare every
    byte."""
    with ExitStack() as stack:
        patch = open_checked(path, context, stack)
        if patch is None:
            if source_paths:
                context.notes.append("nothing was recomputed, for the patch does not say how")
            return VerifyResult(None, 0)
        answers = None
        if source_paths:
            from hsa.verification.recompute_patches import recompute_patches

            answers = recompute_patches([patch], source_paths, context)
        return VerifyResult(patch.record, 1, answers)


def open_checked(path: Path, context: VerifyContext, stack: ExitStack) -> Patch | None:
    """Open a patch, read it whole and add its problems to the context. Return None if its document cannot be read."""
    patch = None
    try:
        patch = open_patch(path, context.tally, stack)
        for fault in patch_faults(patch):
            context.problems.add(path.name, fault)
        done = 0

        def step(count: int) -> None:
            nonlocal done
            done += count
            context.memory.sample()
            if context.progress is not None:
                context.progress(done, patch.source.size if patch else done)

        patch.check_rows(step)
        patch.source.check_unchanged()
    except SourceChanged:
        context.problems.add(path.name, "changed while it was read; verify it again once nothing writes to it")
    except SourceError as error:
        context.problems.add(path.name, str(error))
    return patch
