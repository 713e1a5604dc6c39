"""The progress bar of commands that decode speech."""

from __future__ import annotations

import pytest

from hsa.cli import decoding_progress as bars
from hsa.evaluation.transcription import Step

STEP = Step("merged", "noisy\x1b[2J", 60, 120, 300.0, 20.0)


def test_the_speed_is_utterances_and_seconds_of_audio_a_second() -> None:
    assert bars.speed_text(STEP) == "3.0 utt/s, 15 s audio/s"


def test_without_a_terminal_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with bars.decoding_progress(show=True) as step:
        assert step is None
    assert capsys.readouterr().err == ""


def test_on_a_terminal_the_bar_names_model_and_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bars, "stderr_is_terminal", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with bars.decoding_progress(show=True) as step:
        assert step is not None
        step(STEP)
    shown = capsys.readouterr().err
    assert "merged on noisy" in shown and "60/120" in shown and "15 s audio/s" in shown
    assert "noisy\x1b[2J" not in shown
