"""The benchmark of word error rates: its scoring on known texts, its gate, and its rows on a real triple.

HSA_REAL_TRIPLE and HSA_REAL_CLIPS are those of test_real.py.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_wer
import numpy as np
import pytest
import rows
import torch
from bench_wer import Scored, Variant

import hsa

needs_jiwer = pytest.mark.skipif(importlib.util.find_spec("jiwer") is None, reason="jiwer is not installed")
VARIANTS = (Variant("base"), Variant("primary"), Variant("HSA", "encoder-qkv", 1.0, 0.1, 2.0))
MEASURED = "variant targets k lam alpha clips words errors wer wer_low wer_high against_primary against_low \
against_high seconds"


@pytest.fixture(scope="module")
def real() -> list[str]:
    """The options that name the real triple and its clips."""
    place = os.environ.get("HSA_REAL_TRIPLE")
    if not place:
        pytest.skip("HSA_REAL_TRIPLE is not set: it names a directory with base, primary and secondary")
    clips = Path(os.environ.get("HSA_REAL_CLIPS") or Path(place) / "clips")
    reason = bench_wer.why_not(Path(place), clips)
    assert not reason.startswith("the triple"), reason
    if reason:
        pytest.skip(reason)
    return [f"--triple={place}", f"--clips={clips}"]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- scoring -----------------------------------------------------------------------------------------------------


@needs_jiwer
def test_errors_and_words_of_known_texts() -> None:
    normalise = bench_wer.make_normaliser(Path("nowhere"))
    references = ["Um, the honest cook.", "One goat, on Monday!", "I'd say so", "uh"]
    said = ["the honest book", "one goat", "I would really say so.", "no"]
    errors, words = bench_wer.count_errors(references, said, normalise)
    assert errors.tolist() == [1, 2, 1, 1]
    assert words.tolist() == [3, 4, 4, 0]


@needs_jiwer
def test_spellings_come_from_the_file_beside_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "normalizer.json").write_text('{"colour": "color"}')
    normalise = bench_wer.make_normaliser(tmp_path)
    assert bench_wer.count_errors(["the colour"], ["The color."], normalise)[0].tolist() == [0]
    assert bench_wer.count_errors(["the colour"], ["The color."], str.lower)[0].tolist() == [1]


@needs_jiwer
def test_the_scoring_gate_refuses_a_normaliser_that_loses_texts() -> None:
    bench_wer.gate_scoring(["one two", ""], str.lower)
    with pytest.raises(SystemExit, match="correctness gate: transcripts score 0 errors against themselves"):
        bench_wer.gate_scoring(["one two"], lambda text: "")
    calls = iter(range(100))
    with pytest.raises(SystemExit, match="correctness gate: transcripts score 1 errors against themselves"):
        bench_wer.gate_scoring(["one two"], lambda text: f"{text} {next(calls)}")


def test_the_bootstrap_is_deterministic_and_encloses_the_rate() -> None:
    generator = np.random.default_rng(7)
    words = generator.integers(5, 15, 60)
    errors = generator.binomial(words, 0.2)
    found, low, high = bench_wer.rate_and_interval(errors, words)
    assert (found, low, high) == bench_wer.rate_and_interval(errors, words)
    rate = errors.sum() / words.sum()
    assert found == pytest.approx(100 * rate, abs=0.005)
    assert low < found < high
    spread = 100 * np.sqrt(((errors - rate * words) ** 2).sum()) / words.sum()
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_a_constant_difference_has_no_spread() -> None:
    words, errors = np.array([4, 4, 4, 4]), np.array([0, 1, 2, 4])
    primary = Scored(Variant("primary"), "", errors, words, 0.0)
    row = Scored(VARIANTS[2], "", errors + 1, words, 1.0).row(primary)
    assert (row["errors"], row["words"], row["wer"]) == (11, 16, 68.75)
    assert (row["against_primary"], row["against_low"], row["against_high"]) == (25.0, 25.0, 25.0)
    assert (row["targets"], row["k"], row["lam"], row["alpha"]) == ("encoder-qkv", 1.0, 0.1, 2.0)
    assert " ".join(row) == MEASURED


# --- what is said where there is nothing to measure -------------------------------------------------------------------


def test_without_a_triple_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HSA_REAL_TRIPLE", raising=False)
    monkeypatch.setattr(rows, "append", lambda *_: pytest.fail("rows were written"))
    bench_wer.main([])
    assert capsys.readouterr().out == (
        "bench_wer measured nothing: HSA_REAL_TRIPLE is not set and --triple not given\n"
    )


def test_without_clips_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared_triple: dict[str, Path]
) -> None:
    monkeypatch.delenv("HSA_REAL_CLIPS", raising=False)
    monkeypatch.setattr(rows, "append", lambda *_: pytest.fail("rows were written"))
    bench_wer.main([f"--triple={shared_triple['base'].parent}"])
    said = capsys.readouterr().out
    assert said.startswith("bench_wer measured nothing: no clips: ")
    assert said.count("\n") == 1


# --- on the real triple ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_rows_of_the_real_triple(
    real: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Base's error rate on these clips is many times primary's; the decoders are equal, so SA at k 1 is HSA."""
    monkeypatch.setattr(bench_wer, "VARIANTS", (*VARIANTS, Variant("SA", "attention-qkv", 1.0, 0.1, 2.0)))
    bench_wer.main([*real, "--limit=3", f"--results={tmp_path}"])
    found = rows.read("wer", tmp_path)
    assert list(found[0]) == [*rows.about(()), "model", *MEASURED.split()]
    assert [row["variant"] for row in found] == ["base", "primary", "HSA", "SA"]
    base, primary, merged, selective = found
    assert all(row["clips"] == "3" and row["words"] == primary["words"] and row["model"] for row in found)
    assert int(primary["errors"]) < int(base["errors"])
    assert float(primary["wer"]) < float(base["wer"])
    assert float(base["against_primary"]) > 0 == float(primary["against_primary"])
    assert [merged[name] for name in ("targets", "k", "lam", "alpha")] == ["encoder-qkv", "1.0", "0.1", "2.0"]
    assert float(merged["wer"]) < float(base["wer"]) / 2
    assert {**selective, "variant": "HSA", "targets": "encoder-qkv"} == merged
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 1 + len(found)
    assert "One model, value for value: HSA k 1 lam 0.1 alpha 2; SA k 1 lam 0.1 alpha 2." in printed
    assert bench_wer.CAVEATS in printed


@pytest.mark.parametrize("tensor", ["encoder.layers.1.self_attn.k_proj.weight", "decoder.layers.0.fc1.bias"])
def test_a_damaged_merge_is_refused(
    real: list[str], tensor: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One element of a target, or of a tensor that no merge writes."""
    sound = hsa.Merger.apply_

    def damaged(self: hsa.Merger, model: Any, *args: Any, **parameters: Any) -> Any:
        sound(self, model, *args, **parameters)
        with torch.no_grad():
            model.get_parameter(f"model.{tensor}").view(-1)[-1] += 1e-3
        return model

    monkeypatch.setattr(hsa.Merger, "apply_", damaged)
    with pytest.raises(SystemExit, match=rf"correctness gate: {tensor} after apply_ .* no figures are reported"):
        bench_wer.main([*real, "--limit=3", f"--results={tmp_path}"])
    assert not list(tmp_path.iterdir())
