"""The benchmark of searches: the list that races, its gates, what its programs are told, and its rows on real models.

HSA_REAL_TRIPLE and HSA_REAL_CLIPS are those of test_real.py; the noisy dev set lies beside the clips.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import bench_search
import bench_wer
import pytest
import racing_case
import racing_settings
import rows
import search_setup
import workers_case
from search_setup import Setup

from hsa.evaluation.utterance import Utterance
from hsa.methods.registry import method_named
from hsa.searches.candidates import Candidate, Result
from hsa.searches.dev_sets import DevSets, Item
from hsa.searches.space import space_of
from hsa.searches.transcripts import Transcripts
from hsa.searches.trials import Trial, make_trial

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def real() -> Setup:
    """The real models and four clips of the noisy dev set."""
    place, clips = os.environ.get("HSA_REAL_TRIPLE"), bench_search.noisy_dev()
    reason = bench_search.reason_for_nothing(Path(place) if place else None, clips)
    if reason:
        pytest.skip(reason)
    assert place and clips
    return Setup(Path(place), clips, limit=4)


def dev_set(utterances: int = 60) -> DevSets:
    draw = random.Random(1)
    items = [
        Item("a", Utterance(f"{number}", Path("/a.wav"), "x"), draw.randint(3, 20)) for number in range(utterances)
    ]
    return DevSets(("a",), tuple(items), search_setup.BATCH, {"a": 0}, "", str)


def trials_at(dev: DevSets, rates: list[float], seed: int = 0) -> list[Trial]:
    """Trials whose words are wrong at these rates."""
    draw = random.Random(seed)
    found = []
    for number, rate in enumerate(rates, 1):
        errors = tuple(sum(draw.random() < rate for _ in range(item.words)) for item in dev.items)
        result = Result(f"w{number}", errors, tuple(f"{number} {error}" for error in errors), len(errors))
        candidate = Candidate(f"setting {number}", "sampled", "linear", {"weights": [rate]})
        found.append(make_trial(number, candidate, result, search_setup.OBJECTIVE, dev))
    return found


# --- the list that races ----------------------------------------------------------------------------------------------


def test_the_recorded_settings_are_those_that_the_script_draws() -> None:
    """Whoever changes a range draws the list again: rows before and after it are of other settings then."""
    drawn = racing_settings.draw()
    assert racing_settings.FILE.read_text(encoding="utf-8") == racing_settings.text(drawn)
    assert Counter(each["method"] for each in drawn) == dict.fromkeys(racing_settings.METHODS, 8)
    assert racing_settings.draw(seed=1) != drawn


def test_the_recorded_settings_are_values_that_a_search_may_draw() -> None:
    candidates = racing_case.settings(racing_settings.COUNT)
    assert len(candidates) == 40
    for candidate in candidates:
        assert candidate.method is not None
        settings = dict(candidate.settings)
        assert method_named(candidate.method).Settings(**settings).complete
        for axis in space_of(candidate.method, 3, {}).axes:
            value = settings[axis.setting] if axis.model is None else settings[axis.setting][axis.model]
            assert axis.low <= value <= axis.high, (candidate, axis)


def test_known_errors_race_as_a_search_does() -> None:
    """A much worse setting is stopped after half a block, a better one is not, and the next races against it."""
    dev = dev_set()
    start, better, worse, between = trials_at(dev, [0.4, 0.05, 0.9, 0.4])
    raced = racing_case.race_known(dev, [start], [better, worse, between])
    assert [trial.state for trial in raced] == ["complete", "stopped", "stopped"]
    assert len(raced[1].result.errors) == 8
    assert raced[1].result.errors == worse.result.errors[:8]
    (equal,) = racing_case.race_known(dev, [start], [start])
    assert equal.state == "complete"


def test_other_orders_are_counted() -> None:
    dev = dev_set()
    start, *settings = trials_at(dev, [0.4, 0.05, 0.9, 0.8, 0.85])
    said = racing_case.other_orders(dev, [start], settings, orders=5)
    assert said == (
        "in 5 random orders, simulated from these errors: as good a winner as without racing in 5, 65 to 65 % of the "
        "utterances not decoded"  # 3 of 4 settings stop after 8 of 60 clips
    )


def test_racing_that_changed_a_text_is_refused() -> None:
    dev = dev_set()
    whole = trials_at(dev, [0.2, 0.3])
    stopped = [dataclasses.replace(t, result=dataclasses.replace(t.result, texts=t.result.texts[:16])) for t in whole]
    racing_case.gate(stopped, whole)
    other = dataclasses.replace(stopped[1].result, texts=("something else",))
    with pytest.raises(SystemExit, match="correctness gate: setting 2 wrote other texts with racing than without"):
        racing_case.gate([stopped[0], dataclasses.replace(stopped[1], result=other)], whole)


# --- what the programs are told ---------------------------------------------------------------------------------------


def test_the_programs_get_the_same_clips_batches_and_threads() -> None:
    setup = Setup(Path("/triple"), Path("/clips"), limit=7)
    search = list(search_setup.search_program(setup, 40, 2).command)
    loop = list(bench_search.loop_program(setup, Path("/list.json"), 2).command)
    for command in (search, loop):
        assert command[:3] == ["env", "OMP_NUM_THREADS=2", "HF_HUB_OFFLINE=1"]
        assert {"--limit=7", "--batch=16"} <= set(command)
        assert "{out}" in " ".join(command)
    assert "--clips=/clips" in loop and "--dev=/clips" in search and "--trials=40" in search
    assert search.count("--model=/triple/tertiary") == 1
    whole = dataclasses.replace(setup, limit=0)
    assert not any(word.startswith("--limit") for word in search_setup.search_program(whole, 40, 2).command)
    two = search_setup.search_program(setup, 40, 1, *workers_case.WORKERS[workers_case.TWO]).command
    assert "--workers=2" in two and "OMP_NUM_THREADS=1" in two


def test_the_loop_gets_what_the_search_scored() -> None:
    setup = Setup(Path("/triple"), Path("/clips"))
    trials = [
        {"name": "base", "kind": "model", "method": None, "settings": {}, "source": -1, "failure": None, "wer": {}},
        {"name": "trial 9", "kind": "sampled", "method": "linear", "settings": {"weights": [1, 2, 3]}, "source": None,
         "failure": None},
        {"name": "trial 10", "kind": "sampled", "method": "ties", "settings": {"lam": 2}, "source": None,
         "failure": "it is not finite"},
        {"name": "trial 11", "kind": "sampled", "method": "hsa", "settings": {"k": 0.5}, "source": None,
         "failure": None},
    ]  # fmt: skip
    base, linear, hsa = map(setup.of_loop, bench_search.candidates_of({"trials": trials}))
    models = [f"/triple/{role}" for role in ("primary", "secondary", "tertiary")]
    assert base == {"name": "base", "folder": "/triple/base"}
    assert linear == {"name": "trial 9", "merge": {"method": "linear", "models": models, "weights": [1, 2, 3]}}
    assert hsa == {"name": "trial 11", "merge": {"method": "hsa", "base": "/triple/base", "models": models, "k": 0.5}}


# --- gates ------------------------------------------------------------------------------------------------------------


def test_transcripts_that_differ_are_counted_and_many_are_refused(tmp_path: Path) -> None:
    dev = dev_set(4)
    kept = Transcripts(tmp_path, {"dev": "", "seed": 0, "decoding": {}, "anchor": "", "versions": {}})
    kept.put("w1", ["a", "b", "c", "d"])
    study = {
        "trials": [{"name": "one", "weights": "w1", "utterances": 2}, {"name": "two", "weights": "", "utterances": 0}]
    }
    texts = bench_search.texts_of(study, dev, kept)
    assert texts == {"one": {"0": "a", "1": "b"}, "two": {}}
    loop = {"one": {"0": "a", "1": "b", "2": "x", "3": "y"}, "two": {}}
    assert bench_search.differing(texts, loop) == "0 of 2 transcripts differ from the loop's"
    loop["one"]["1"] = "c"
    with pytest.raises(SystemExit, match="correctness gate: 1 of 2 transcripts differ between search and loop"):
        bench_search.differing(texts, loop)


def test_scores_of_workers_are_compared_whatever_their_order() -> None:
    one: dict[str, Any] = {
        "name": "trial 1",
        "method": "ties",
        "settings": {"lam": 1},
        "source": None,
        "wer": {"a": 0.5},
    }
    two = {**one, "settings": {"lam": 2}}
    assert workers_case.scores_of({"trials": [one, two]}) == workers_case.scores_of(
        {"trials": [two, {**one, "name": "2"}]}
    )
    assert workers_case.scores_of({"trials": [one]}) != workers_case.scores_of({"trials": [{**one, "wer": {"a": 0.4}}]})


# --- where there is nothing to measure --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "HSA_REAL_TRIPLE is not set and --triple not given"),
        (["--triple=/nowhere"], "HSA_REAL_CLIPS is not set and --clips not given"),
        (["--triple=/nowhere", "--clips=/nowhere"], "the triple /nowhere holds no base/config.json"),
    ],
)
def test_without_data_one_line_says_so(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("HSA_REAL_TRIPLE", "HSA_REAL_CLIPS"):
        monkeypatch.delenv(name, raising=False)
    bench_search.main([*options, f"--results={tmp_path}"])
    assert capsys.readouterr().out == f"bench_search measured nothing: {said}\n"
    assert not list(tmp_path.iterdir())


def test_without_the_third_fine_tune_one_line_says_so(
    shared_triple: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bench_search.main([f"--triple={shared_triple['base'].parent}", "--clips=/nowhere", f"--results={tmp_path}"])
    assert "holds no tertiary/config.json" in capsys.readouterr().out


# --- on the real models -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_rows_of_the_real_models(real: Setup, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The baselines and one setting by search and by loop, and two settings that race, on two clips."""
    options = [f"--triple={real.triple}", f"--clips={real.clips}", "--limit=2", "--trials=10", "--threads=1"]
    bench_search.main([*options, f"--results={tmp_path}"])
    found = rows.read("search", tmp_path)
    assert list(found[0]) == [*rows.about(()), "model", *search_setup.COLUMNS]
    ways = [("search", "hsa search"), ("search", "the loop"), ("racing", "with racing"), ("racing", "without racing")]
    assert [(row["case"], row["way"]) for row in found] == ways
    search, loop, *racing = found
    assert (search["candidates"], search["clips"], search["set"]) == ("10", "2", real.clips.name)
    assert int(search["decoded"]) + int(search["raced"]) + int(search["equal"]) == 20 == int(loop["decoded"])
    assert (search["best"], search["wer"]) == (loop["best"], loop["wer"])
    assert search["note"] == "0 of 20 transcripts differ from the loop's"
    for row in found:
        assert 0 < float(row["decoding_s"]) <= float(row["trials_s"]) <= float(row["seconds"])
        assert float(row["wer_low"]) <= float(row["wer"]) <= float(row["wer_high"])
    assert racing[0]["best"] == racing[1]["best"] and racing[1]["raced"] == "0"
    assert bench_wer.CAVEATS in capsys.readouterr().out


@pytest.mark.long
def test_a_checkpoint_that_writes_other_texts_is_refused(
    real: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The loop is given base where the search has primary."""
    monkeypatch.setattr(bench_search, "GATED", ("primary",))
    monkeypatch.setattr(Setup, "of_loop", lambda self, candidate: {"name": "primary", "folder": self.triple / "base"})
    with pytest.raises(SystemExit, match=r"correctness gate: of utt_00\d.flac primary writes .* from its checkpoint"):
        bench_search.gate(dataclasses.replace(real, limit=1), tmp_path)
