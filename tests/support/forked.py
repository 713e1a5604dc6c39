"""Programs in processes of their own, without the time that imports take: forked from a server that has done them.

What reads the environment when it is imported is imported anew by each.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from soundness import check_command

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["hsa.cli.app", "hsa.actions.merge", "hsa.outputs.card", "torch", "httpx", "httpx2", "httpcore2", "yaml", "rich"]
)
"""What cannot be imported is left out."""

ANEW = "huggingface_hub"

COMMAND = "from hsa.__main__ import main; main()"


def run_python(
    code: str, *arguments: str | os.PathLike[str], env: Mapping[str, str], timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a program as `python -c` does."""
    with TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        given = [os.fspath(argument) for argument in arguments]
        process = FORKS.Process(target=_child, args=(code, given, dict(env), str(out), str(err)), daemon=True)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(code, timeout)
        return subprocess.CompletedProcess(given, process.exitcode, out.read_text("utf-8"), err.read_text("utf-8"))


def run_hsa(*arguments: str | os.PathLike[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the command line, as `helpers.run_hsa` does from nothing."""
    done = run_python(COMMAND, *arguments, env=env)
    if done.returncode == 0:
        check_command(arguments)
    return done


def _child(code: str, arguments: list[str], env: dict[str, str], out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.environ.update(env)
    assert ANEW not in sys.modules
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
