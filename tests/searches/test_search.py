"""Searches over small made-up fine-tunes: what is scored, what is written, and that a killed search goes on."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from search_cases import NORMALIZER, write_models, write_speech

import hsa
from hsa.errors import DataError, RequestError
from hsa.evaluation.hypotheses import plain_name
from hsa.evaluation.normalizers import plain
from hsa.evaluation.options import DecodingOptions
from hsa.evaluation.prepared import AudioDigests, prepare
from hsa.methods.markdown import escape
from hsa.methods.registry import methods
from hsa.searches.candidates import Candidate
from hsa.searches.dev_sets import DevSets, make_dev_sets
from hsa.searches.evaluators import SpeechEvaluator
from hsa.searches.objectives import Objective
from hsa.searches.resident_model import ResidentModel
from hsa.searches.samplers import grid_points
from hsa.searches.sources import sources_of
from hsa.searches.space import space_of
from hsa.searches.tasks import Transcribe
from hsa.searches.transcripts import Transcripts

pytestmark = pytest.mark.long

METHODS = "task_arithmetic,ties"
Case = dict[str, Any]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Sources, and a dev and a test set."""
    folder = tmp_path_factory.mktemp("search")
    sources = write_models(folder / "models")
    dev, test = (write_speech(folder / name, sources, 10, seed) for seed, name in enumerate(("dev", "heldout")))
    return {"sources": sources, "dev": str(dev), "test": str(test), "folder": folder}


def run(case: Case, output: Path, **changes: Any) -> hsa.Study:
    arguments = {"method": METHODS, "dev": [case["dev"]], "trials": 14, "normalizer": NORMALIZER, "batch": 4}
    return hsa.search(case["sources"], output=output, **{**arguments, **changes})


@pytest.fixture(scope="module")
def study(case: Case) -> hsa.Study:
    return run(case, case["folder"] / "study", test=[case["test"]])


def outcome(study: hsa.Study) -> list[tuple[Any, ...]]:
    """Everything of a study's trials but the time they took."""
    return [
        (t.name, t.method, dict(t.settings), t.state, t.values, dict(t.drawn), t.result.errors, t.result.weights)
        for t in study.trials
    ]


def test_the_baselines_come_first(study: hsa.Study) -> None:
    names = [trial.name for trial in study.trials]
    assert names[:7] == [
        "base", "primary", "secondary", "tertiary", "average", "task_arithmetic defaults", "ties defaults",
    ]  # fmt: skip
    assert len(names) == 14
    assert {trial.method for trial in study.trials[7:]} == {"task_arithmetic", "ties"}


def test_every_drawn_candidate_is_another_model(study: hsa.Study) -> None:
    drawn = [trial for trial in study.trials if trial.candidate.kind == "sampled"]
    known = {trial.result.weights for trial in study.baselines}
    assert drawn
    assert len({trial.result.weights for trial in drawn} - known) == len(drawn)


def test_scores_are_those_of_hsa_eval_on_the_written_checkpoint(study: hsa.Study, case: Case) -> None:
    from hsa.evaluation.audio import read_audio
    from hsa.evaluation.decoding import load_recognizer
    from hsa.evaluation.scores import score_utterance, scores_of

    recognizer = load_recognizer(study.output / "best", DecodingOptions())
    utterances = hsa.data(case["dev"]).utterances
    texts = recognizer.transcribe(recognizer.features([read_audio(each, recognizer.rate) for each in utterances]))
    scored = [
        score_utterance(each, text, set_name="dev", normalize=plain)
        for each, text in zip(utterances, texts, strict=True)
    ]
    assert scores_of(scored)[0].words.rate == pytest.approx(study.best.wer, abs=1e-12)


def test_best_is_what_merge_writes(study: hsa.Study, case: Case, tmp_path: Path) -> None:
    best = study.output / "best"
    study.merge(tmp_path / "again")
    different = {"README.md", "hsa_merge.json"}  # the card has the scores, and the provenance the card's digest
    names = {path.name for path in best.iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    for name in names - different:
        assert (best / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    card = json.loads((best / "hsa_merge.json").read_text(encoding="utf-8"))["parameters"]["card"]
    hsa.merge(**case["sources"], method=study.best.method, **study.best.settings, output=tmp_path / "card", card=card)
    for name in names:
        assert (best / name).read_bytes() == (tmp_path / "card" / name).read_bytes(), name


def test_the_command_makes_the_merge_again(study: hsa.Study, tmp_path: Path) -> None:
    import shlex

    words = shlex.split(study.command)
    assert words[:2] == ["hsa", "merge"]
    words[-1] = str(tmp_path / "again")
    done = subprocess.run([sys.executable, "-m", "hsa", *words[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (study.output / "best" / name).read_bytes()


def test_the_card_has_a_model_index_that_the_hub_takes(study: hsa.Study) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(study.output / "best" / "README.md", ignore_metadata_errors=False)
    results = card.data.eval_results
    assert [(each.metric_type, each.dataset_name, each.dataset_split) for each in results] == [
        ("wer", "heldout", "test"), ("cer", "heldout", "test"),
    ]  # fmt: skip
    row = next(row for row in study.test if row.model == study.best.name)
    assert results[0].metric_value == round(100 * row.score.words.rate, 2)
    assert results[0].task_type == "automatic-speech-recognition"


def test_files_say_what_the_study_says(study: hsa.Study) -> None:
    rows = list(csv.DictReader((study.output / "trials.csv").open(encoding="utf-8")))
    assert [row["name"] for row in rows] == [trial.name for trial in study.trials]
    assert [float(row["objective"]) for row in rows] == pytest.approx([trial.value for trial in study.trials], abs=1e-6)
    document = json.loads((study.output / "search.json").read_text(encoding="utf-8"))
    assert document == json.loads(json.dumps(study.as_dict()))
    report = (study.output / "report.md").read_text(encoding="utf-8")
    assert "## Test sets" in report
    assert study.command in report


def test_the_test_set_is_decoded_for_the_best_and_the_baselines(study: hsa.Study) -> None:
    models = [row.model for row in study.test]
    assert models[0] == study.best.name
    assert set(models) >= {"base", "primary", "secondary", "tertiary", "average"}
    for row in study.test[1:]:
        assert row.difference is not None
        best = study.test[0].score.words.rate
        assert row.difference.wer == pytest.approx(best - row.score.words.rate, abs=1e-12)
        interval = row.difference.interval
        assert interval is not None
        assert (row.verdict == "no difference shown") == (interval.low <= 0 <= interval.high)


def test_the_same_seed_gives_the_same_study(study: hsa.Study, case: Case, tmp_path: Path) -> None:
    assert outcome(run(case, tmp_path / "again")) == outcome(study)
    other = run(case, tmp_path / "other", seed=1)
    assert [t.drawn for t in other.trials[7:]] != [t.drawn for t in study.trials[7:]]


def test_a_finished_search_asked_for_more_goes_on(study: hsa.Study, case: Case, tmp_path: Path) -> None:
    shutil.copytree(study.output, tmp_path / "copy", ignore=shutil.ignore_patterns("best"))
    more = run(case, tmp_path / "copy", trials=17)
    assert outcome(more)[:14] == outcome(study)
    whole = run(case, tmp_path / "whole", trials=17)
    assert outcome(more) == outcome(whole)


SCRIPT = """
import json, sys
import hsa
sources, arguments = json.loads(sys.argv[1])
hsa.search(sources, **arguments, progress=lambda step: print(step.finished, flush=True))
"""


def test_killed_searches_go_on_to_the_same_study(study: hsa.Study, case: Case, tmp_path: Path) -> None:
    """Killed by SIGKILL at moments that a seed draws, until one run ends by itself."""
    arguments = {"method": METHODS, "dev": [case["dev"]], "trials": 14, "normalizer": NORMALIZER, "batch": 4}
    arguments |= {"output": str(tmp_path / "killed")}
    command = [sys.executable, "-c", SCRIPT, json.dumps([case["sources"], arguments])]
    draw, kills = random.Random(7), 0
    for steps in (3, 4, 0):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(steps):
            process.stdout.readline()
        if steps:
            time.sleep(draw.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.stdout.read()
        code = process.wait()
        assert code == (-signal.SIGKILL if steps else 0)
    assert kills == 2
    assert outcome(run(case, tmp_path / "killed")) == outcome(study)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_a_search_that_ends_between_two_draws_goes_on_to_the_same_study(
    sampler: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some numbers of the trial are kept then, and the others are to be drawn as if it had not ended."""
    import optuna

    options = {"trials": 10, "sampler": sampler, "limit": 2}
    whole = run(case, tmp_path / "whole", **options)
    draw, drawn = optuna.trial.Trial.suggest_float, 0

    def ends(self: Any, *arguments: Any, **keywords: Any) -> float:
        nonlocal drawn
        drawn += 1
        if drawn in (3, 12, 15):
            raise KeyboardInterrupt
        return float(draw(self, *arguments, **keywords))

    monkeypatch.setattr(optuna.trial.Trial, "suggest_float", ends)
    ended, found = 0, None
    while found is None:
        try:
            found = run(case, tmp_path / "ended", **options)
        except KeyboardInterrupt:
            ended += 1
    assert ended == 3
    assert outcome(found) == outcome(whole)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 3}, "seed"),
        ({"method": "ties"}, "methods"),
        ({"space": ["ties.density=0.2:0.4"]}, "space"),
        ({"max_tokens": 5}, "decoding"),
    ],
    ids=["seed", "methods", "space", "decoding"],
)
def test_another_search_in_the_same_output_is_refused(study: hsa.Study, case: Case, changes: Case, what: str) -> None:
    before = (study.output / "trials.csv").read_bytes()
    with pytest.raises(RequestError, match=f"was begun with {what} .*use the same again to resume it"):
        run(case, study.output, **changes)
    assert (study.output / "trials.csv").read_bytes() == before


def test_weights_that_were_scored_are_not_decoded_again(case: Case, tmp_path: Path) -> None:
    """A grid of one factor, 0 among its values twice over: base is scored as a baseline already."""
    found = run(
        case,
        tmp_path / "grid",
        method="task_arithmetic",
        sampler="grid",
        space=["weights=1", "lambda=0:1", "normalize=off"],
        trials=9,
        racing=False,
    )
    values = [trial.settings["lam"] for trial in found.trials if trial.candidate.kind == "sampled"]
    assert values == [0.0, 0.5, 1.0] == sorted(values)
    by_name = {trial.name: trial for trial in found.trials}
    ones = [trial for trial in found.trials if trial.settings.get("lam") == 1.0]
    assert ones[0].result.weights == by_name["task_arithmetic defaults"].result.weights
    assert ones[0].result.decoded == 0
    assert found.savings is not None and found.savings.equal >= 10


def test_texts_are_cut_after_max_tokens(study: hsa.Study, case: Case, tmp_path: Path) -> None:
    """Every token of the models is eight words."""
    cut = run(case, tmp_path / "cut", max_tokens=5, trials=7)
    assert cut.request["decoding"]["max_tokens"] == 5
    short, long = (Transcripts(each.output, each.request) for each in (cut, study))
    for one, other in zip(cut.trials, study.trials[:7], strict=True):
        assert one.name == other.name
        assert len(short.get(one.result.weights)) == 10
        assert all(len(text.split()) <= 5 * 8 for text in short.get(one.result.weights))
    assert any(len(text.split()) > 5 * 8 for trial in study.trials[:7] for text in long.get(trial.result.weights))


def test_pareto_gives_a_front(case: Case, tmp_path: Path) -> None:
    found = run(
        case,
        tmp_path / "pareto",
        dev=[f"one={case['dev']}", f"two={case['test']}"],
        objective="pareto",
        trials=20,
    )
    assert found.request["sampler"] == "nsga2"
    assert all(len(trial.values) == 2 for trial in found.trials if trial.values)
    assert found.savings is not None and found.savings.raced == 0
    front = found.front
    for trial in found.trials:
        covered = any(all(x <= y for x, y in zip(each.values, trial.values, strict=True)) for each in front)
        assert covered
    for one in front:
        for other in front:
            assert one is other or not all(x <= y for x, y in zip(one.values, other.values, strict=True))


def test_a_greedy_soup_is_scored(case: Case, tmp_path: Path) -> None:
    found = run(case, tmp_path / "soup", method="linear", soup="greedy", trials=5)
    soups = [trial for trial in found.trials if trial.candidate.kind == "soup"]
    assert len(soups) == 2
    alone = {trial.name: trial.value for trial in found.trials if trial.candidate.kind == "model"}
    order = sorted(("primary", "secondary", "tertiary"), key=lambda name: alone[name])
    assert soups[0].name == f"soup {'+'.join(sorted(order[:2]))}"
    assert soups[0].settings["weights"].count(1.0) == 2


def test_a_score_of_ones_own(case: Case, tmp_path: Path) -> None:
    base = load_file(Path(case["sources"]["base"]) / "model.safetensors")
    name = "model.encoder.layers.0.fc1.weight"

    def distance(model: Any) -> float:
        held = model.state_dict()[name]
        return float((held - 1.01 * base[name].float()).norm())

    found = hsa.search(case["sources"], output=tmp_path / "own", method="task_arithmetic", evaluate=distance, trials=12)
    written = load_file(tmp_path / "own" / "best" / "model.safetensors")
    assert found.best.value == pytest.approx(
        float((written[name].float() - 1.01 * base[name].float()).norm()), rel=1e-6
    )
    assert found.best.value < min(trial.value for trial in found.baselines if trial.candidate.is_merge)
    assert found.dev == () and found.savings is None


def test_each_range_of_layers_has_settings_of_its_own(case: Case, tmp_path: Path) -> None:
    found = run(case, tmp_path / "layers", method="hsa", by_layer="0,1", trials=9, limit=2)
    drawn = [trial for trial in found.trials if trial.candidate.kind == "sampled"]
    assert len(drawn) == 3
    for trial in drawn:
        assert {"hsa.lambda[0-0]", "hsa.lambda[1-1]", "hsa.alpha[0-0]", "hsa.alpha[1-1]"} < trial.drawn.keys()
        for name, value in trial.settings["lam"].items():
            layer = name.split(".layers.")[1].partition(".")[0]
            assert value == pytest.approx(trial.drawn[f"hsa.lambda[{layer}-{layer}]"], rel=1e-3)
    hsa.merge(**case["sources"], method="hsa", **drawn[0].settings, output=tmp_path / "merged")
    resident = ResidentModel(
        _loaded(case["sources"]["models"][0]), sources_of(case["sources"]), {"hsa": space_of("hsa", 3, {})}, 2
    )
    resident.put(drawn[0].candidate)
    expected = _loaded(tmp_path / "merged").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resident.model.state_dict().items())


def _loaded(folder: str | Path) -> Any:
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()


def test_a_candidate_whose_text_cannot_be_scored_fails_alone(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(case, tmp_path / "whole", trials=7, limit=2)
    texts = Transcripts(whole.output, whole.request).get(whole.trials[1].result.weights)
    errors = DevSets.errors

    def refuses(self: DevSets, number: int, text: str) -> int:
        if text == texts[1]:
            raise DataError("cannot be normalised")
        return errors(self, number, text)

    monkeypatch.setattr(DevSets, "errors", refuses)
    found = run(case, tmp_path / "refused", trials=7, limit=2)
    assert found.trials[1].state == "failed"
    assert found.trials[1].result.failure == "cannot be normalised"
    assert [t.values for t in found.trials[2:]] == [t.values for t in whole.trials[2:]]


UNREADABLE = "<" * 1001


def plain_or_refusing(name: str, **about: Any) -> Any:
    """What stands for the search's normaliser: the plain one, but it refuses what Whisper's do."""

    def normalize(text: str) -> str:
        if text == UNREADABLE:
            raise DataError("cannot be normalised")
        return plain(text)

    return normalize


def spoil(output: Path, model: str) -> str:
    """Let a model have written an unreadable text for one utterance of the test set. Returns the utterance's id."""
    (path,) = (output / "hypotheses").glob(f"{plain_name(model, 'heldout')}.*.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[4])
    lines[4] = json.dumps({**row, "text": UNREADABLE})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(row["id"])


@pytest.mark.parametrize("is_best", [False, True], ids=["another", "the best"])
def test_a_model_whose_text_on_a_test_set_cannot_be_scored_is_left_out(
    is_best: bool, study: hsa.Study, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every trial is kept: the search ends with the comparison alone."""
    name = study.best.name if is_best else "secondary"
    others = [row.model for row in study.test if row.model != name]
    shutil.copytree(study.output, tmp_path / "copy", ignore=shutil.ignore_patterns("best"))
    id = spoil(tmp_path / "copy", name)
    monkeypatch.setattr("hsa.searches.setups.normalizer", plain_or_refusing)
    found = run(case, tmp_path / "copy", test=[case["test"]])
    assert outcome(found) == outcome(study)
    why = f"what it wrote for utterance '{id}' of set 'heldout': cannot be normalised"
    report = (found.output / "report.md").read_text(encoding="utf-8")
    card = (found.output / "best" / "README.md").read_text(encoding="utf-8")
    if is_best:
        expected = f"{name} could not be scored on the test sets, so the figures are those of the dev sets alone: {why}"
        assert found.test == () and found.dev == study.dev
        assert "## Test sets" not in report and "split: dev" in card
        assert not any("give test sets" in note for note in found.notes)
    else:
        expected = f"{name} is left out of the comparison on the test sets: {why}"
        assert [row.model for row in found.test] == others
        assert [row.as_dict() for row in found.test] == [row.as_dict() for row in study.test if row.model != name]
        assert "## Test sets" in report and "split: test" in card
    assert expected in found.notes
    assert found.worst and len(found.worst) == len(study.worst)


def test_references_of_test_sets_are_looked_at_before_the_search(case: Case, tmp_path: Path) -> None:
    lines = Path(case["test"]).read_text(encoding="utf-8").splitlines()
    table = Path(case["test"]).with_name("bad.tsv")
    table.write_text("\n".join([*lines[:3], f"{lines[3].split()[0]}\t{'<' * 1001}"]), encoding="utf-8")
    with pytest.raises(DataError, match=r"the reference of utterance .* of set 'bad'"):
        run(case, tmp_path / "x", test=[str(table)], normalizer="basic")
    table.write_text("\n".join([lines[0], f"{lines[3].split()[0]}\t..."]), encoding="utf-8")
    with pytest.raises(DataError, match="no reference of bad has a word once normalised"):
        run(case, tmp_path / "x", test=[str(table)])
    assert not (tmp_path / "x").exists()


def changed_references(table: Path, name: str, changes: dict[int, str]) -> Path:
    """A copy of a table beside it, in which some rows, counted from 0, have other references."""
    head, *rows = table.read_text(encoding="utf-8").splitlines()
    for number, text in changes.items():
        rows[number] = f"{rows[number].partition(chr(9))[0]}\t{text}"
    path = table.with_name(f"{name}.tsv")
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return path


def test_empty_references_are_left_out_and_counted(case: Case, tmp_path: Path) -> None:
    """In dev sets and in test sets; models write many words for these utterances too."""
    dev = changed_references(Path(case["dev"]), "dev-gaps", {2: "..."})
    test = changed_references(Path(case["test"]), "test-gaps", {0: "...", 7: "!"})
    found = run(case, tmp_path / "gaps", dev=[str(dev)], test=[str(test)], trials=7)
    whole = hsa.search(
        case["sources"], output=tmp_path / "whole", method=METHODS, dev=[case["dev"]], trials=7, normalizer=NORMALIZER
    )
    notes = [
        "1 of 10 utterances of the dev set dev-gaps have an empty reference once normalised and are not scored",
        "2 of 10 utterances of the test set test-gaps have an empty reference once normalised and are not scored",
    ]
    assert [note for note in found.notes if "empty reference" in note] == notes
    report = (found.output / "report.md").read_text(encoding="utf-8")
    assert all(f"- {escape(note)}" in report for note in notes)
    assert not any("empty reference" in note for note in whole.notes)
    document = json.loads((found.output / "search.json").read_text(encoding="utf-8"))
    assert {(row["utterances"], row["dropped"]) for row in document["test"]} == {(8, 2)}
    assert {(row["utterances"], row["dropped"]) for row in document["dev"]} == {(9, 1)}
    assert {row.score.dropped for row in whole.dev} == {0}
    assert len(found.worst) == 8 and all(each.reference for each in found.worst)
    assert not {"clip_000.wav", "clip_007.wav"} & {each.id for each in found.worst}


def test_a_test_set_without_a_reference_is_refused_beside_one_that_has_some(case: Case, tmp_path: Path) -> None:
    silent = changed_references(Path(case["test"]), "silent", dict.fromkeys(range(10), "..."))
    with pytest.raises(DataError, match="no reference of silent has a word once normalised"):
        run(case, tmp_path / "x", test=[case["test"], str(silent)])
    assert not (tmp_path / "x").exists()


def test_models_are_told_apart_by_their_names(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case["sources"]["models"][0], tmp_path / "average")
    sources = {**case["sources"], "models": [str(tmp_path / "average"), *case["sources"]["models"][1:]]}
    with pytest.raises(
        RequestError, match="two models of the search would be named 'average' in its reports; give each model once"
    ):
        run({**case, "sources": sources}, tmp_path / "out")


def test_no_trial_begins_after_the_time(case: Case, tmp_path: Path) -> None:
    """What is known before anything is drawn is always scored."""
    found = run(case, tmp_path / "time", time=0.001, limit=1)
    assert len(found.trials) == 7
    assert outcome(run(case, tmp_path / "time", limit=1, trials=8))[:7] == outcome(found)


def test_a_search_needs_sets_or_a_score(case: Case, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="give either dev, the sets to score candidates on, or evaluate"):
        hsa.search(case["sources"], output=tmp_path / "x")
    with pytest.raises(RequestError, match="method slerp merges 1 model, got 3"):
        run(case, tmp_path / "x", method="slerp")
    with pytest.raises(RequestError, match="sampler must be tpe, cmaes, nsga2, random or grid, got 'best'"):
        run(case, tmp_path / "x", sampler="best")
    with pytest.raises(RequestError, match="sampler cmaes searches two or more numbers of one method"):
        run(case, tmp_path / "x", sampler="cmaes")
    with pytest.raises(DataError):
        run(case, tmp_path / "x", dev=[str(tmp_path / "nothing.tsv")])
    assert not (tmp_path / "x").exists()


# --- the loaded model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_holds_what_merge_writes(dtype: str, tmp_path: Path) -> None:
    """One model and one copy of the sources for every method, in turn; the model decodes in float32."""
    from transformers import WhisperForConditionalGeneration

    sources = write_models(tmp_path / "models", dtype)
    given = sources_of(sources)
    fitting = [
        name
        for name, method in methods().items()
        if method.contract.least <= 3 <= method.contract.most and name != "hsa_script"
    ]
    assert len(fitting) > 12
    spaces = {name: space_of(name, 3, {}) for name in fitting}
    model = WhisperForConditionalGeneration.from_pretrained(sources["models"][0], dtype="float32").eval()
    resident = ResidentModel(model, given, spaces, 2)
    for name in [*fitting, "hsa"]:
        settings = spaces[name].settings(grid_points({name: spaces[name]}, 1)[0])
        resident.put(Candidate(name, "sampled", name, settings))
        output = tmp_path / "merged"
        hsa.merge(
            method=name, **given.arguments(name), **settings, output=output, overwrite=output.exists(), sync=False
        )
        expected = WhisperForConditionalGeneration.from_pretrained(output, dtype="float32").state_dict()
        held = model.state_dict()
        assert held.keys() == expected.keys()
        for tensor in held:
            assert torch.equal(held[tensor].view(torch.int32), expected[tensor].view(torch.int32)), (name, tensor)
    resident.put(Candidate("secondary", "model", source=1))
    expected = WhisperForConditionalGeneration.from_pretrained(sources["models"][1], dtype="float32").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_sources_are_in_memory_once(tmp_path: Path) -> None:
    from hsa.actions.merger.shared_tensors import SharedTensors

    sources = write_models(tmp_path / "models")
    shared = SharedTensors()
    hsa.Merger.sharing(shared, method="ties", **sources)
    before = shared.nbytes
    assert before == sum(
        sum(tensor.nbytes for tensor in load_file(Path(path) / "model.safetensors").values())
        for path in (sources["base"], *sources["models"])
    )
    hsa.Merger.sharing(shared, method="linear", models=sources["models"])
    hsa.Merger.sharing(shared, method="hsa", **sources)
    assert shared.nbytes == before


def test_encoder_states_are_kept_while_the_decoder_alone_changes(case: Case, tmp_path: Path) -> None:
    from hsa.evaluation.audio import read_audio
    from hsa.evaluation.decoding import load_recognizer
    from hsa.searches.evaluators import Decoder

    given = sources_of(case["sources"])
    space = space_of("task_arithmetic", 3, {"stack": ["decoder"]})
    folder = Path(given.models[0])
    recognizer = load_recognizer(folder, DecodingOptions())
    resident = ResidentModel(recognizer.model, given, {"task_arithmetic": space}, 2)
    encoder, encoded = recognizer.model.get_encoder(), 0
    forward = encoder.forward

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal encoded
        encoded += 1
        return forward(*arguments, **keywords)

    encoder.forward = counted
    decoder = Decoder(recognizer)
    plain = load_recognizer(folder, DecodingOptions())
    without = ResidentModel(plain.model, given, {"task_arithmetic": space}, 2)
    audio = [read_audio(each, plain.rate) for each in hsa.data(case["dev"]).utterances]
    utterances = hsa.data(case["dev"]).utterances
    for lam in (0.2, 0.6, 1.0, 1.4):
        candidate = Candidate("x", "sampled", "task_arithmetic", {"lam": lam, "stack": "decoder"})
        decoder.begin_model(resident.put(candidate).encoder)
        without.put(candidate)
        assert decoder.transcribe("dev", utterances) == plain.transcribe(plain.features(audio))
    of_one_model = encoded // 2  # the first two models are encoded, and the other two not
    assert of_one_model > 0
    assert decoder.states.spared == encoded == 2 * of_one_model


def test_encoder_states_of_every_batch_of_a_set_are_kept(case: Case) -> None:
    """Batches of one size, as a test set's are: the third model with one encoder encodes nothing."""
    from hsa.evaluation.decoding import load_recognizer

    given = sources_of(case["sources"])
    space = space_of("task_arithmetic", 3, {"stack": ["decoder"]})
    recognizer = load_recognizer(Path(given.models[0]), DecodingOptions())
    resident = ResidentModel(recognizer.model, given, {"task_arithmetic": space}, 2)
    data = prepare(hsa.data(case["test"], limit=8), None, AudioDigests())
    encoded: list[int] = []
    recognizer.model.get_encoder().layers[0].register_forward_pre_hook(lambda *_: encoded.append(1))
    evaluator = SpeechEvaluator(resident, recognizer, make_dev_sets([data], plain, 4, 0), Objective("mean"), "cpu")
    encodings, texts = [], []
    for lam in (0.2, 0.6, 1.0):
        candidate = Candidate("x", "sampled", "task_arithmetic", {"lam": lam, "stack": "decoder"})
        encoded.clear()
        texts.append(
            [Transcribe(candidate, data.digest, data.order[at : at + 2]).run(evaluator) for at in (0, 2, 4, 6)]
        )
        encodings.append(len(encoded))
    assert encodings[0] == encodings[1] >= 8
    assert encodings[2] == 0
    evaluator.decoder.begin_model("another encoder's digest")
    assert [Transcribe(candidate, data.digest, data.order[at : at + 2]).run(evaluator) for at in (0, 2, 4, 6)] == texts[
        2
    ]
    assert len(encoded) == encodings[0]
