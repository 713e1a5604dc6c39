"""What several test modules share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from blake3 import blake3


def run_hsa(
    *arguments: str | os.PathLike[str], env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a fresh process."""
    return subprocess.run(
        [sys.executable, "-m", "hsa", *map(os.fspath, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        check=False,
    )


def merge_arguments(triple: Mapping[str, Path], output: Path, *more: str) -> Sequence[str]:
    """`merge` on a triple, as a list of arguments."""
    return ["merge", *(f"--{role}={path}" for role, path in triple.items()), f"--output={output}", *more]


def snapshot(root: Path) -> dict[str, str]:
    """Every path below `root`, with the digest of its bytes (or where a link leads): equal when untouched."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "directory"
        else:
            found[name] = blake3(path.read_bytes()).hexdigest()
    return found
