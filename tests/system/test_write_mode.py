"""Which way writes go when nobody waits for the disk: measured, not assumed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import snapshot

import hsa
from hsa.engine import consumers
from hsa.system import fsio, write_mode
from hsa.system.write_mode import RECHECK_WINDOWS, WINDOW_BYTES, WriteMode, WriteModeChooser
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

PIECE = 4 << 20
Speed = Callable[[int], float]


def write_through(nbytes: int, direct: Speed, cached: Speed) -> dict[WriteMode, int]:
    """Bytes that go each way, when each takes so many bytes a second after so many bytes in all."""
    now = [0.0]
    chosen = WriteModeChooser(clock=lambda: now[0])
    sent: dict[WriteMode, int] = {"direct": 0, "cached": 0}
    for done in range(0, nbytes, PIECE):
        with chosen.write(PIECE) as mode:
            now[0] += PIECE / (direct if mode == "direct" else cached)(done)
            sent[mode] += PIECE
    return sent


@pytest.mark.parametrize("winner", ["direct", "cached"])
def test_the_faster_mode_writes_nearly_all(winner: WriteMode) -> None:
    fast, slow = (lambda done: 2e9), (lambda done: 1e9)
    sent = write_through(8 << 30, *((fast, slow) if winner == "direct" else (slow, fast)))
    trials = (8 << 30) // (RECHECK_WINDOWS * WINDOW_BYTES) + 1
    assert sum(sent.values()) - sent[winner] <= trials * WINDOW_BYTES
    assert sent[winner] < sum(sent.values()), "the other mode was never tried"


def test_a_cache_that_fills_up_is_left() -> None:
    sent = write_through(8 << 30, lambda done: 1e8, lambda done: 1e9 if done < 2 << 30 else 5e7)
    assert (2 << 30) - 3 * WINDOW_BYTES <= sent["cached"] <= (2 << 30) + 6 * WINDOW_BYTES


def test_a_disk_that_recovers_is_found_again() -> None:
    sent = write_through(16 << 30, lambda done: 1e8 if done < 1 << 30 else 4e9, lambda done: 1e9)
    assert sent["direct"] > 12 << 30


def test_writes_at_the_same_time_count_once() -> None:
    """Two threads at a disk that takes 1 GB/s in all see it at 1 GB/s, not at half of it."""
    now = [0.0]
    chosen = WriteModeChooser(clock=lambda: now[0])
    for _ in range(WINDOW_BYTES // (2 * PIECE)):
        with chosen.write(PIECE), chosen.write(PIECE):
            now[0] += 2 * PIECE / 1e9
    with chosen.write(PIECE) as mode:
        assert mode == "cached", "the trial of the other mode"
    assert chosen._timings["direct"].speed == pytest.approx(1e9)


def test_both_modes_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fsio.reopen_direct(_touched(tmp_path / "probe")) is None:
        pytest.skip("this filesystem has no direct writes, so there is one mode alone")
    triple = write_triple(tmp_path / "triple", SHAPES["demo"])
    hsa.merge(**triple, output=tmp_path / "synced")
    used = {"direct": 0, "cached": 0}

    def counted(way: str) -> Callable[..., None]:
        store = getattr(consumers.FileWriter, f"_store_{way}")

        def call(self: object, *arguments: object) -> None:
            used[way] += 1
            store(self, *arguments)

        return call

    for way in used:
        monkeypatch.setattr(consumers.FileWriter, f"_store_{way}", counted(way))
    monkeypatch.setattr(consumers, "DIRECT_PIECE", 1 << 18)
    monkeypatch.setattr(write_mode, "WINDOW_BYTES", 1 << 20)
    hsa.merge(**triple, output=tmp_path / "fast", sync=False, threads=4)
    assert min(used.values()) >= 4, used
    assert snapshot(tmp_path / "fast") == snapshot(tmp_path / "synced")


def _touched(path: Path) -> Path:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    return path
