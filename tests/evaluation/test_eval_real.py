"""Word error rates of real models on real speech equal those of full models that plain torch and transformers decode.

The fixtures `real` and `clips` say which. `bench/check_eval.py` holds all models of the real set to its page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import RATE, read_clips, read_tensors, word_edits

import hsa
from hsa.evaluation.decoding import load_recognizer
from hsa.evaluation.normalizers import normalizer
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.speculative import Drafts

Triple = dict[str, Path]
CLIPS = 5
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def models(real: Triple, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fine-tunes, and their average in float32 by `hsa merge`."""
    average = tmp_path_factory.mktemp("merged") / "average"
    both = [real["primary"], real["secondary"]]
    hsa.merge(method="linear", models=both, output=average, dtype="float32", sync=False)
    return {"primary": real["primary"], "secondary": real["secondary"], "average": average}


@pytest.fixture(scope="module")
def evaluated(models: dict[str, Path], clips: Path, tmp_path_factory: pytest.TempPathFactory) -> hsa.Evaluation:
    return hsa.evaluate(
        [*models.values()],
        clips,
        baseline=models["primary"],
        limit=CLIPS,
        device="cpu",
        normalizer="whisper",
        output=tmp_path_factory.mktemp("evaluation"),
    )


@pytest.fixture(scope="module")
def plainly(models: dict[str, Path], clips: Path) -> dict[str, list[str]]:
    """What full models write, one clip at a time, by transformers alone."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    texts: dict[str, list[str]] = {}
    for name, path in models.items():
        model = WhisperForConditionalGeneration.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
        processor = WhisperProcessor.from_pretrained(path, local_files_only=True)
        texts[name] = []
        for _, _, samples in read_clips(clips)[:CLIPS]:
            features = processor(samples, sampling_rate=RATE, return_tensors="pt").input_features
            tokens = model.generate(features, do_sample=False, num_beams=1, max_new_tokens=224)
            texts[name] += processor.batch_decode(tokens, skip_special_tokens=True)
    return texts


def basic(text: str) -> str:
    """What the page of the real set calls basic: lower case, with punctuation stripped."""
    return "".join(letter if letter.isalnum() or letter == "'" else " " for letter in text.lower())


@pytest.mark.parametrize("name", ["plain", "whisper"])
def test_error_counts_are_those_of_full_models_to_the_word(
    name: str, evaluated: hsa.Evaluation, models: dict[str, Path], plainly: dict[str, list[str]], clips: Path
) -> None:
    normalize: Callable[[str], str] = basic if name == "plain" else normalizer("whisper", model=models["primary"])
    references = [text for _, text, _ in read_clips(clips)[:CLIPS]]
    again = hsa.evaluate([*models.values()], clips, limit=CLIPS, device="cpu", normalizer=name, output=evaluated.output)
    assert again.decoded == 0
    for model, texts in plainly.items():
        errors = [
            word_edits(normalize(reference).split(), normalize(text).split())
            for reference, text in zip(references, texts, strict=True)
        ]
        assert [each.words.errors for each in again[model].utterances] == errors, model
        assert again[model].scores[0].words.reference == sum(len(normalize(text).split()) for text in references)
    assert sum(each.words.errors for each in again["secondary"].utterances) > 0


def test_another_batch_size_changes_no_transcript(
    evaluated: hsa.Evaluation, models: dict[str, Path], clips: Path
) -> None:
    single = hsa.evaluate(models["primary"], clips, limit=CLIPS, device="cpu", normalizer="whisper", batch=1)
    assert single.decoded == CLIPS
    assert single["primary"].utterances == evaluated["primary"].utterances


def test_the_average_is_what_its_tensors_say(models: dict[str, Path], real: Triple) -> None:
    primary, secondary, average = (
        read_tensors(path) for path in (real["primary"], real["secondary"], models["average"])
    )
    name = "model.encoder.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(average[name], (primary[name].float() + secondary[name].float()) / 2)


def test_speech_of_more_than_half_a_minute_is_decoded_window_by_window(
    real: Triple, clips: Path, tmp_path: Path
) -> None:
    import numpy as np
    import soundfile

    taken = read_clips(clips)[:6]
    gap = np.zeros(RATE // 2, dtype=np.float32)
    samples = np.concatenate([piece for _, _, clip in taken for piece in (clip, gap)])
    assert len(samples) > 30 * RATE
    soundfile.write(tmp_path / "long.flac", samples, RATE)
    text = " ".join(text for _, text, _ in taken)
    (tmp_path / "long.tsv").write_text(f"file\ttext\nlong.flac\t{text}\n", encoding="utf-8")
    found = hsa.evaluate(real["secondary"], tmp_path / "long.tsv", device="cpu", normalizer="whisper")
    assert found.models[0].wer < 0.5, found.models[0].utterances


def test_drafts_of_other_models_change_no_transcript(
    models: dict[str, Path], plainly: dict[str, list[str]], clips: Path
) -> None:
    drafts = [Drafts() for _ in range(CLIPS)]
    audio = [samples for _, _, samples in read_clips(clips)[:CLIPS]]
    for name, path in models.items():
        recognizer = load_recognizer(path, DecodingOptions(device="cpu"))
        passes: list[int] = []
        recognizer.model.get_decoder().register_forward_pre_hook(
            lambda *_: passes.append(1)  # noqa: B023
        )
        assert recognizer.transcribe(recognizer.features(audio), drafts) == [text.strip() for text in plainly[name]]
    assert len(passes) < max(len(each.continuation(())) for each in drafts)  # of the last model: fewer than its tokens
