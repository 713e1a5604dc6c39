"""The commands under test, one line of a table each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fault_harness import Operation, Sources
from helpers import merge_arguments

import hsa
from hsa.outputs.patch_reader import SUFFIX

K = {"old": 0.3, "new": 0.6}
"""What tells an earlier output of a merge from the one that replaces it."""

ROLES = ("base", "primary", "secondary")


def run_merge(sources: Sources, output: Path, variant: str) -> object:
    triple = {role: sources[role] for role in ROLES}
    return hsa.merge(**triple, output=output, k=K[variant], overwrite=True, threads=1)


def merge_command(sources: Sources, output: Path, variant: str) -> Sequence[str]:
    triple = {role: sources[role] for role in ROLES}
    return merge_arguments(triple, output, "--overwrite", f"--k={K[variant]}", "--threads=2")


def check_output(output: Path) -> None:
    report = hsa.verify(output, threads=1)
    assert report.ok, report.problems


def make_patches(sources: Sources, folder: Path) -> Sources:
    triple = {role: sources[role] for role in ROLES}
    for variant, k in K.items():
        hsa.merge_patch(**triple, output=folder / "patches" / f"{variant}{SUFFIX}", k=k, threads=1)
    return {"primary": sources["primary"], "patches": folder / "patches"}


def run_apply(sources: Sources, output: Path, variant: str) -> object:
    patch = sources["patches"] / f"{variant}{SUFFIX}"
    return hsa.apply(sources["primary"], patch, output=output, overwrite=True, threads=1)


def apply_command(sources: Sources, output: Path, variant: str) -> Sequence[str]:
    patch = sources["patches"] / f"{variant}{SUFFIX}"
    return ["apply", str(sources["primary"]), str(patch), f"--output={output}", "--overwrite", "--threads=2"]


OPERATIONS = (
    Operation("merge", run_merge, merge_command, check_output, step=1),
    Operation("apply", run_apply, apply_command, check_output, make_patches),
)
"""What the suite puts through every fault; a command that writes outputs is one more entry."""
