"""Sets of utterances and audio for tests of hsa.evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from hsa.errors import HsaError
from hsa.evaluation.normalizers import normalizer
from hsa.evaluation.scores import UtteranceScore, score_utterance
from hsa.evaluation.utterance import Utterance


def refusal(kind: type[HsaError], call: Callable[..., Any], *arguments: Any, **more: Any) -> str:
    """The message with which a call is refused: one line, of an error of exactly this kind."""
    with pytest.raises(kind) as caught:
        call(*arguments, **more)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert text.isprintable() and len(text) > 10
    return text


def noise(seconds: float, rate: int = 16000, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Samples that files of 16 bits and of floats hold exactly, float32 [samples, channels]."""
    drawn = np.random.default_rng(seed).integers(-8000, 8000, size=(round(seconds * rate), channels))
    return (drawn / 32768).astype(np.float32)


def write_audio(path: Path, samples: np.ndarray, rate: int = 16000, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **more)
    return path


def scored(
    id: str,
    reference: str,
    hypothesis: str,
    *,
    set_name: str = "test",
    speaker: str | None = None,
    domain: str | None = None,
) -> UtteranceScore:
    utterance = Utterance(id, Path("/clips") / id, reference, speaker, domain)
    return score_utterance(utterance, hypothesis, set_name=set_name, normalize=normalizer("none"))


def errors_of(reference: list[str], hypothesis: list[str], substitution: int = 1, gap: int = 1) -> int:
    """The least cost of turning one list into the other: Levenshtein's distance where all costs are 1."""
    row = [gap * place for place in range(len(hypothesis) + 1)]
    for ours in reference:
        left_above, row[0] = row[0], row[0] + gap
        for place, heard in enumerate(hypothesis, start=1):
            change = left_above + (0 if ours == heard else substitution)
            left_above = row[place]
            row[place] = min(change, row[place] + gap, row[place - 1] + gap)
    return row[-1]
