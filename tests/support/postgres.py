"""A PostgreSQL server of a test's own, from the machine's package."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = "postgres"
"""Who runs the server where the tests run as root, which it refuses. Debian's package makes this user."""


def _program(name: str) -> str:
    """A program of the newest PostgreSQL of Debian, or of the path. Skips the test where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}")) if Path("/usr/lib/postgresql").is_dir() else []
    program = str(found[-1]) if found else shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed: apt-get install postgresql")
    return program


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database, whose user has the password `secret`."""
    as_user = ["runuser", "-u", NOBODY, "--"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="hsa-pg-") as text, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        folder, password = Path(text), Path(text) / "password"
        password.write_text("secret\n", encoding="utf-8")
        if as_user:
            for path in (folder, password):
                shutil.chown(path, NOBODY)
        data = str(folder / "data")
        words = ["-D", data, "-U", "me", "--auth=scram-sha-256", f"--pwfile={password}"]
        _run([*as_user, _program("initdb"), *words], folder)
        probe.close()
        how = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        _run([*as_user, _program("pg_ctl"), "-D", data, "-w", "-l", str(folder / "log"), "-o", how, "start"], folder)
        try:
            yield f"postgresql://me:secret@127.0.0.1:{port}/postgres"
        finally:
            _run([*as_user, _program("pg_ctl"), "-D", data, "-m", "immediate", "stop"], folder)


def _run(words: list[str], folder: Path) -> None:
    done = subprocess.run(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
