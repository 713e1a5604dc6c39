"""`hsa.evaluate`: scores, differences, what is kept, and what is not decoded again."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import word_edits
from speech_sets import write_ctc, write_set

import hsa
from hsa.errors import AudioError, DataError, DestinationError, RequestError
from hsa.evaluation import transcription
from hsa.evaluation.model_scores import COLUMNS
from hsa.evaluation.transcription import Step

LENGTHS = (0.5, 0.8, 0.31, 0.62, 0.9, 0.44, 0.7)
SPEAKERS = ("anna", "bert", "anna", "bert", "cleo", "cleo", "anna")
DOMAINS = ("home", "road", "road", "home", "home", "road", "home")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_ctc(folder / name, seed=seed) for seed, name in enumerate(("one", "two", "three"))}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("speech")
    clean = write_set(folder / "clean", LENGTHS, 1, speaker=SPEAKERS, domain=DOMAINS)
    noisy = write_set(folder / "noisy", LENGTHS[:4], 2, speaker=SPEAKERS[:4], domain=DOMAINS[:4])
    return [f"clean={clean}", f"noisy={noisy}"]


def evaluate(*arguments: Any, **keywords: Any) -> hsa.Evaluation:
    return hsa.evaluate(*arguments, **{"device": "cpu", **keywords})


# --- scores -----------------------------------------------------------------------------------------------------------


def test_a_second_counter_finds_the_same_errors(models: dict[str, Path], tables: list[str]) -> None:
    found = evaluate([*models.values()], tables, normalizer="plain")
    assert [each.name for each in found.models] == ["one", "two", "three"]
    for model in found.models:
        for each in model.utterances:
            assert each.words.errors == word_edits(each.reference.split(), each.hypothesis.split())
            assert each.characters.errors == word_edits([*each.reference], [*each.hypothesis])
        total = sum(each.words.errors for each in model.utterances)
        words = sum(len(each.reference.split()) for each in model.utterances)
        assert model.wer == total / words and model.scores[0].words.errors == total
        for name in ("clean", "noisy"):
            own = [each for each in model.utterances if each.set == name]
            assert model.score("set", name).words.errors == sum(each.words.errors for each in own)
        assert {each.name for each in model.scores if each.group == "speaker"} == {"anna", "bert", "cleo"}
        assert {each.name for each in model.scores if each.group == "domain"} == {"home", "road"}
    assert found["two"].wer != found["one"].wer
    assert found.decoded == 3 * 11 and found.audio_seconds == pytest.approx(3 * (sum(LENGTHS) + sum(LENGTHS[:4])))


def test_differences_are_from_the_baseline(models: dict[str, Path], tables: list[str]) -> None:
    found = evaluate([models["one"], models["two"]], tables, baseline=models["three"])
    assert [each.name for each in found.models] == ["three", "one", "two"]
    assert found.baseline == "three"
    assert all(score.difference is None for score in found["three"].scores)
    for name in ("one", "two"):
        for score, base in zip(found[name].scores, found["three"].scores, strict=True):
            assert score.difference is not None
            assert score.difference.wer == score.words.rate - base.words.rate
            interval = score.difference.interval
            assert interval is None or interval.low <= score.difference.wer <= interval.high
    inside = evaluate([*models.values()], tables, baseline=models["three"])
    assert [each.name for each in inside.models] == ["one", "two", "three"]
    assert inside["one"].scores == found["one"].scores


def test_a_model_against_its_copy_differs_by_nothing(
    models: dict[str, Path], tables: list[str], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(models["one"], tmp_path / "copy"))
    found = evaluate(models["one"], tables, baseline=copy)
    difference = found["one"].scores[0].difference
    assert difference is not None and difference.interval is not None
    assert (difference.wer, difference.interval.low, difference.interval.high) == (0.0, 0.0, 0.0)
    assert found.decoded == 11, "two copies of one model are decoded once"


def test_a_model_that_is_given_twice_counts_once(models: dict[str, Path], tables: list[str]) -> None:
    assert len(evaluate([models["one"], f"{models['one']}/"], tables).models) == 1


def test_a_primary_with_its_patch_is_the_merge(shared_triple: dict[str, Path], tmp_path: Path) -> None:
    table = write_set(tmp_path / "speech", (0.4, 0.7, 0.9))
    patch, merged = tmp_path / "k1.safetensors", tmp_path / "merged"
    hsa.merge_patch(**shared_triple, output=patch, k=1.0, lam=0.0, alpha=1.0, sync=False)
    hsa.merge(**shared_triple, output=merged, k=1.0, lam=0.0, alpha=1.0, sync=False)
    primary = shared_triple["primary"]
    found = evaluate([f"{primary}+{patch}", merged, primary], table, language="en")
    assert [each.name for each in found.models] == ["primary+k1", "merged", "primary"]
    patched, merge, _ = found.models
    assert patched.utterances == merge.utterances and patched.model.digest == merge.model.digest
    assert found.decoded == 6


def test_a_relative_path_is_the_model_there(
    models: dict[str, Path], tables: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(models["one"], tables, limit=2).models[0]
    monkeypatch.chdir(models["one"].parent)
    for path in ("one", "./one", Path("one")):
        found = evaluate(path, tables, limit=2).models[0]
        assert (found.name, found.scores) == ("one", expected.scores)


def test_limit_takes_the_first_utterances_of_each_set(models: dict[str, Path], tables: list[str]) -> None:
    few = evaluate(models["one"], tables, limit=3)
    assert [(each.set, each.id) for each in few.models[0].utterances] == [
        (name, f"clip_{number:03}.wav") for name in ("clean", "noisy") for number in range(3)
    ]
    whole = {(each.set, each.id): each for each in evaluate(models["one"], tables).models[0].utterances}
    assert all(whole[each.set, each.id] == each for each in few.models[0].utterances)


def test_empty_references_are_dropped_and_counted(models: dict[str, Path], tmp_path: Path) -> None:
    table = write_set(tmp_path / "speech", LENGTHS[:3])
    lines = table.read_text().splitlines()
    lines[2] = lines[2].split("\t")[0] + "\t..."
    table.write_text("\n".join(lines))
    found = evaluate(models["one"], table)
    assert found.models[0].scores[0].utterances == 2 and found.models[0].scores[0].dropped == 1
    assert "1 of 3 utterances have an empty reference once normalised and are not scored" in found.notes
    table.write_text("\n".join([lines[0], lines[2]]))
    silent, whole = table, write_set(tmp_path / "whole", LENGTHS[:3])
    with pytest.raises(DataError, match="no reference of silent has a word once normalised"):
        evaluate(models["one"], [f"whole={whole}", f"silent={silent}"])
    with pytest.raises(DataError, match="no reference of set has a word once normalised"):
        evaluate(models["one"], table)


def test_a_reference_that_cannot_be_normalised_is_named_before_anything_is_decoded(
    models: dict[str, Path], tables: list[str], tmp_path: Path
) -> None:
    table = write_set(tmp_path / "speech", LENGTHS[:3])
    lines = table.read_text().splitlines()
    lines[3] = f"clip_002.wav\t{'<' * 1001}"
    table.write_text("\n".join(lines))
    steps: list[Step] = []
    with pytest.raises(DataError, match=r"the reference of utterance 'clip_002\.wav' of set 'set': .*correct the text"):
        evaluate(models["one"], [*tables, str(table)], normalizer="basic", progress=steps.append)
    assert steps == []


def test_batches_of_any_size_give_the_same(models: dict[str, Path], tables: list[str]) -> None:
    texts = [evaluate(models["one"], tables, batch=size).models[0].utterances for size in (1, 4, 16)]
    assert texts[0] == texts[1] == texts[2]


def test_features_are_computed_once_for_models_of_one_family(
    models: dict[str, Path], tables: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = transcription.read_audio

    def noting(utterance: Any, rate: int) -> Any:
        read.append(utterance.id)
        return real(utterance, rate)

    monkeypatch.setattr(transcription, "read_audio", noting)
    evaluate([*models.values()], tables)
    assert len(read) == 11


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_was_found(models: dict[str, Path], tables: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = evaluate([*models.values()], tables, baseline=models["one"], output=out, trn=tmp_path / "trn")
    assert sorted(path.name for path in out.iterdir()) == ["hypotheses", "report.html", "scores.csv", "scores.json"]
    assert json.loads((out / "scores.json").read_text()) == json.loads(json.dumps(found.scores_dict()))
    assert found.as_dict()["run"]["decoded"] == 33
    rows = list(csv.DictReader(io.StringIO((out / "scores.csv").read_text(encoding="utf-8"))))
    assert [*rows[0]] == ["model", *COLUMNS]
    assert len(rows) == sum(len(model.scores) for model in found.models)
    for row in rows:
        score = next(
            each for each in found[row["model"]].scores if (each.group, each.name) == (row["group"], row["name"])
        )
        assert float(row["wer"]) == score.words.rate and int(row["insertions"]) == score.words.insertions
        assert (row["difference"] == "") == (row["model"] == "one")
    for name in ("one", "two", "three"):
        lines = (tmp_path / "trn" / f"{name}.hyp.trn").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 11 and lines[0].endswith(")")
    hypotheses = sorted((out / "hypotheses").iterdir())
    assert len(hypotheses) == 6
    head, *transcripts = (json.loads(line) for line in hypotheses[0].read_text(encoding="utf-8").splitlines())
    assert head["key"].startswith(hypotheses[0].name.split(".")[-2])
    assert {each["id"] for each in transcripts} == {f"clip_{number:03}.wav" for number in range(7)}


def test_models_whose_trn_files_would_be_one_are_refused_before_decoding(
    models: dict[str, Path], tables: list[str], tmp_path: Path
) -> None:
    pair = [Path(shutil.copytree(models["one"], tmp_path / name)) for name in ("a b", "a_b")]
    steps: list[Step] = []
    with pytest.raises(RequestError, match=r"trn files of 'a b' and 'a_b' would have one name, a_b\.hyp\.trn"):
        evaluate(pair, tables, trn=tmp_path / "trn", output=tmp_path / "out", progress=steps.append)
    assert not steps and not (tmp_path / "trn").exists() and not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="'a b' and 'a_b'"):
        evaluate(pair[1], tables, trn=tmp_path / "trn", baseline=pair[0])
    assert evaluate(pair, tables, limit=1)["a b"].wer == evaluate(pair[1], tables, limit=1).models[0].wer


def test_an_evaluated_model_is_not_decoded_again(models: dict[str, Path], tables: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = evaluate(models["one"], tables, output=out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = evaluate(models["one"], tables, output=out)
    assert (first.decoded, again.decoded) == (11, 0)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    moved = Path(shutil.copytree(models["one"], tmp_path / "moved"))
    assert evaluate(moved, tables, output=out).decoded == 0, "the same bytes under another name"
    assert evaluate([moved, models["two"]], tables, output=out).decoded == 11
    assert evaluate(models["one"], tables, output=out, normalizer="basic", batch=3).decoded == 0
    assert evaluate(models["one"], tables, output=out, dtype="bfloat16").decoded == 11


def test_other_audio_under_the_same_name_is_decoded(models: dict[str, Path], tmp_path: Path) -> None:
    out, table = tmp_path / "out", write_set(tmp_path / "speech", LENGTHS[:3])
    assert evaluate(models["one"], table, output=out).decoded == 3
    table.write_text(table.read_text().replace("ab", "bad"))
    assert evaluate(models["one"], table, output=out).decoded == 0, "references do not change what is heard"
    write_set(tmp_path / "speech", LENGTHS[:3], seed=5)
    assert evaluate(models["one"], table, output=out).decoded == 3


def test_a_damaged_transcript_is_made_again(models: dict[str, Path], tables: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(models["one"], tables[0], output=out)
    (file,) = (out / "hypotheses").iterdir()
    sound = file.read_bytes()
    lines = sound.splitlines(keepends=True)
    for damaged in (b"".join(lines[:4]), b"".join([*lines[:3], b"{}\n", *lines[4:]]), sound[:-5], b"", b"\xff\n\n"):
        file.write_bytes(damaged)
        assert evaluate(models["one"], tables[0], output=out, batch=2).decoded > 0
        (kept,) = (out / "hypotheses").iterdir()
        assert kept.read_bytes() == sound


def test_a_run_that_was_killed_after_its_last_batch_is_finished(
    models: dict[str, Path], tables: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate(models["one"], tables[0], output=out)
    (file,) = (out / "hypotheses").iterdir()
    sound = file.read_bytes()
    file.rename(f"{file}.partial")
    assert evaluate(models["one"], tables[0], output=out).decoded == 0
    assert [path.read_bytes() for path in (out / "hypotheses").iterdir()] == [sound] and file.exists()


def test_two_runs_do_not_write_one_file(models: dict[str, Path], tables: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"

    refused = 0

    def meddle(step: Step) -> None:
        nonlocal refused
        if step.done < step.total:
            with pytest.raises(DestinationError, match=r"another run writes .*; wait for it to end"):
                evaluate(models["one"], tables[0], output=out, batch=2)
            refused += 1

    assert evaluate(models["one"], tables[0], output=out, batch=2, progress=meddle).decoded == 7
    assert refused == 3


def test_nothing_of_another_program_is_replaced(models: dict[str, Path], tables: list[str], tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text("mine")
    with pytest.raises(DestinationError, match=r"scores.csv exists and hsa eval did not write it"):
        evaluate(models["one"], tables, output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]
    with pytest.raises(DestinationError, match="the source"):
        evaluate(models["one"], tables, output=models["one"] / "scores")


def test_progress_counts_what_this_run_decodes(models: dict[str, Path], tables: list[str], tmp_path: Path) -> None:
    steps: list[Step] = []
    evaluate(models["one"], tables, output=tmp_path / "out", limit=2)
    evaluate([models["one"], models["two"]], tables, output=tmp_path / "out", batch=4, progress=steps.append)
    assert [step.done for step in steps] == [4, 7, 11, 15, 18, 22]
    assert {step.total for step in steps} == {22}
    assert [step.audio_seconds for step in steps] == sorted(step.audio_seconds for step in steps)
    assert steps[0].model == "one" and steps[-1].set == "noisy"


# --- text -------------------------------------------------------------------------------------------------------------


def test_the_table_fits_80_columns_and_has_the_figures(
    models: dict[str, Path], tables: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found = evaluate([*models.values()], tables, baseline=models["one"])
    lines = found.table.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(found.table.split())
    for model in found.models:
        assert f"{model.name} {100 * model.wer:.2f} [" in text
    assert "all sets: 11 utterances" in text and "WER by domain" in text
    assert "WER minus that of one; * where the interval excludes 0" in text
    difference = found["two"].scores[0].difference
    assert difference is not None and f"all sets two {100 * difference.wer:+.2f} [" in text
    assert repr(found).startswith("<hsa.Evaluation: WER one ")


def test_what_is_not_there_is_named(models: dict[str, Path], tables: list[str]) -> None:
    found = evaluate(models["one"], tables, limit=1)
    with pytest.raises(RequestError, match="no model is named 'two'; there is 'one'"):
        found["two"]
    with pytest.raises(RequestError, match="there is no set named 'x'; there is 'clean' and 'noisy'"):
        found.models[0].score("set", "x")
    assert all(score.wer is None for score in found.models[0].scores if score.utterances == 1)
    assert not math.isnan(found.models[0].cer)


# --- bad requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"normalizer": "best"}, "normalizer must be one of auto, whisper, basic, plain, none, got 'best'"),
        ({"limit": 0}, "limit must be a whole number of at least 1, got 0"),
        ({"confidence": 1.0}, "confidence must be above 0 and below 1"),
        ({"progress": 3}, "progress must be a function"),
        ({"batch": 0}, "batch must be a whole number"),
        ({"baseline": 3}, "baseline must be a path"),
        ({"output": ""}, "output is an empty path"),
    ],
)
def test_bad_arguments_are_named(
    models: dict[str, Path], tables: list[str], keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        evaluate(models["one"], tables, **keywords)


def test_nothing_to_evaluate_is_named(models: dict[str, Path], tables: list[str]) -> None:
    with pytest.raises(RequestError, match="nothing to evaluate; give a model"):
        evaluate([], tables)
    with pytest.raises(RequestError, match="nothing to evaluate on; give data a set"):
        evaluate(models["one"], [])
    with pytest.raises(RequestError, match="two sets are named 'clean'"):
        evaluate(models["one"], [tables[0], tables[0]])


def test_bad_audio_stops_the_run_before_anything_is_decoded(models: dict[str, Path], tmp_path: Path) -> None:
    table = write_set(tmp_path / "speech", LENGTHS[:3])
    (tmp_path / "speech" / "clip_002.wav").write_bytes(b"RIFF")
    with pytest.raises(AudioError, match=r"clip_002.wav.* cannot be decoded"):
        evaluate(models["one"], table, output=tmp_path / "out", progress=lambda step: pytest.fail("decoded"))
    (tmp_path / "speech" / "clip_002.wav").unlink()
    with pytest.raises(AudioError, match=r"clip_002\.wav"):
        evaluate(models["one"], table)
