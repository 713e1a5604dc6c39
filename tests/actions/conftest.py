"""A merge that must be refused with nothing written, and one that must succeed beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from bad_input import Refuse, Triple
from helpers import (
    snapshot,
)

from hsa.cli import app
from hsa.testing.whisper_checkpoints import SHAPES, write_triple


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A destination whose parent is missing too, so that a directory made for nothing would show."""
    return tmp_path / "results" / "merged"


@pytest.fixture
def refuse(tmp_path: Path, output: Path, capfd: pytest.CaptureFixture[str]) -> Refuse:
    """Runs a command line that must be refused; the message, after checking that nothing else happened.

    `expected` are parts of the message. A merge is refused the same way by its dry run, unless `dry` is False.
    """

    def check(arguments: Sequence[str], *expected: str, code: int = 2, dry: bool = True) -> str:
        before = snapshot(tmp_path)
        messages = []
        for more in ([], ["--dry-run"]) if dry else ([],):
            capfd.readouterr()
            status = app.run([*arguments, *more])
            out, err = capfd.readouterr()
            assert (status, out) == (code, ""), err
            assert err.startswith("hsa: error: ")
            assert err.endswith("\n")
            assert err[:-1].isprintable()
            for part in expected:
                assert part in err
            assert snapshot(tmp_path) == before
            assert not output.parent.exists()
            messages.append(err)
        assert len(set(messages)) == 1
        return messages[0]

    return check


@pytest.fixture
def finish(tmp_path: Path, output: Path, capfd: pytest.CaptureFixture[str]) -> Callable[[Sequence[str]], list[str]]:
    """Runs a merge that must succeed and leave its sources alone; the lines on stderr."""

    def check(arguments: Sequence[str]) -> list[str]:
        before = snapshot(tmp_path)
        capfd.readouterr()
        status = app.run([*arguments, "--no-sync"])
        err = capfd.readouterr().err
        assert status == 0, err
        after = snapshot(tmp_path)
        assert {name: after[name] for name in before} == before
        assert {name for name in after if name not in before and Path(name).parts[0] != "results"} == set()
        assert os.listdir(output.parent) == ["merged"]
        return err.splitlines()

    return check


@pytest.fixture(scope="session")
def sharded_once(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("sharded"), SHAPES["test"], max_shard_bytes=300_000, processor=False)


@pytest.fixture
def sharded(sharded_once: Triple, tmp_path: Path) -> Triple:
    return {role: Path(shutil.copytree(path, tmp_path / "sources" / role)) for role, path in sharded_once.items()}
