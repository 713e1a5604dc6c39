"""A patch: its digests, its rows, and its document against its own parameters; with sources, the merge made again."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from hsa.errors import SourceChanged, SourceError
from hsa.outputs.patch_checks import patch_faults
from hsa.outputs.patch_reader import Patch, open_patch
from hsa.verification.report import Verified
from hsa.verification.source_checks import GivenSources, Work


def verify_patch(path: Path, given: GivenSources | None, work: Work) -> Verified:
    """Check a patch file, links resolved; with sources, compute its merge again and compare every byte."""
    with ExitStack() as stack:
        patch = checked_patch(path, work, stack)
        if patch is None:
            if given:
                work.notes.append("nothing was recomputed, for the patch does not say how")
            return Verified(None, 0, False)
        compared = False
        if given:
            from hsa.verification.recompute_patches import recompute_patches

            compared = recompute_patches([patch], given, work)
        return Verified(patch.record, 1, compared)


def checked_patch(path: Path, work: Work, stack: ExitStack) -> Patch | None:
    """A patch opened and read whole, with its problems told; None where its header or document cannot be read."""
    patch = None
    try:
        patch = open_patch(path, work.tally, stack)
        for fault in patch_faults(patch):
            work.problems.add(path.name, fault)
        done = 0

        def step(count: int) -> None:
            nonlocal done
            done += count
            work.memory.sample()
            if work.progress is not None:
                work.progress(done, patch.source.size if patch else done)

        patch.check_rows(step)
        patch.source.check_unchanged()
    except SourceChanged:
        work.problems.add(path.name, "changed while it was read; verify it again once nothing writes to it")
    except SourceError as error:
        work.problems.add(path.name, str(error))
    return patch
