"""A search over the real fine-tunes, with few clips; what it decodes is what the written checkpoint decodes."""

from __future__ import annotations

from pathlib import Path

import pytest

import hsa

Triple = dict[str, Path]


@pytest.mark.long
def test_a_search_over_real_models(real: Triple, clips: Path, tmp_path: Path) -> None:
    from hsa.evaluation.audio import read_audio
    from hsa.evaluation.decoding import load_recognizer
    from hsa.evaluation.options import DecodingOptions

    study = hsa.search(
        {role: str(path) for role, path in real.items()},
        method=["hsa", "task_arithmetic"],
        dev=[f"clips={clips}"],
        trials=9,
        limit=6,
        max_tokens=64,
        normalizer="plain",
        output=tmp_path / "search",
    )
    assert [trial.name for trial in study.trials[:6]] == [
        "base", "primary", "secondary", "average", "hsa defaults", "task_arithmetic defaults",
    ]  # fmt: skip
    by_name = {trial.name: trial.value for trial in study.trials}
    assert by_name["primary"] < by_name["base"]
    recognizer = load_recognizer(tmp_path / "search" / "best", DecodingOptions(max_tokens=64))
    utterances = hsa.data(clips).utterances[:6]
    texts = recognizer.transcribe(recognizer.features([read_audio(each, recognizer.rate) for each in utterances]))
    from hsa.evaluation.normalizers import plain
    from hsa.evaluation.scores import score_utterance, scores_of

    scored = [
        score_utterance(each, text, set_name="clips", normalize=plain)
        for each, text in zip(utterances, texts, strict=True)
    ]
    assert scores_of(scored)[0].words.rate == pytest.approx(study.best.wer, abs=1e-12)
