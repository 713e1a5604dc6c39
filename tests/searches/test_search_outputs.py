"""The output of a search: what it replaces and what it refuses to replace, and that `best/` is what was scored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from search_cases import NORMALIZER, write_models, write_speech

import hsa
from hsa.errors import DestinationError, RequestError, SourceChanged
from hsa.evaluation.normalizers import plain
from hsa.evaluation.scores import score_utterance
from hsa.evaluation.utterance import Utterance
from hsa.outputs.card import MAX_MODEL_INDEX, check_fields
from hsa.searches import store
from hsa.searches.best import card_fields
from hsa.searches.comparisons import Comparison, compare

pytestmark = pytest.mark.long

WEIGHTS = "model.safetensors"
FOREIGN = b"the user's own"
Sources = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return write_models(tmp_path_factory.mktemp("outputs") / "models")


def norm(model: Any) -> float:
    return float(model.state_dict()["model.encoder.layers.0.fc1.weight"].norm())


def run(sources: Sources, output: Path, **changes: Any) -> hsa.Study:
    """A search by a score that needs no decoding."""
    return hsa.search(sources, output=output, **{"method": "task_arithmetic", "evaluate": norm, "trials": 8, **changes})


def refusing(model: Any) -> float:
    raise AssertionError("a model was scored")


def merge_of_ones_own(models: Sources, output: Path, **options: Any) -> None:
    hsa.merge(models=models["models"], method="linear", output=output, sync=False, **options)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- before anything is scored ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["search.json", "trials.csv", "report.md", "report.html"])
def test_a_report_that_no_search_wrote_is_not_replaced(name: str, models: Sources, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FOREIGN)
    with pytest.raises(DestinationError, match=f"{name} exists and hsa search did not write it; choose another output"):
        run(models, tmp_path, evaluate=refusing)
    assert files_in(tmp_path) == {name: FOREIGN}


@pytest.mark.parametrize("name", ["trials.csv", "report.html", "transcripts", "hypotheses", "best"])
def test_what_has_another_form_than_a_search_gives_it_is_not_replaced(
    name: str, models: Sources, tmp_path: Path
) -> None:
    """A directory with the name of a file, a file with the name of a directory."""
    if "." in name:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(FOREIGN)
    with pytest.raises(DestinationError, match=f"{name} exists and hsa search did not write it"):
        run(models, tmp_path, evaluate=refusing)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_checkpoint_that_no_search_wrote_is_not_replaced(models: Sources, tmp_path: Path) -> None:
    """Neither an output of hsa nor any other directory; nor one of hsa that took the place of a search's."""
    merge_of_ones_own(models, tmp_path / "new" / "best")
    (tmp_path / "other" / "best").mkdir(parents=True)
    (tmp_path / "other" / "best" / "notes").write_bytes(FOREIGN)
    for folder in (tmp_path / "new", tmp_path / "other"):
        before = files_in(folder)
        with pytest.raises(DestinationError, match="best exists and hsa search did not write it"):
            run(models, folder, evaluate=refusing)
        assert files_in(folder) == before
    run(models, tmp_path / "done", trials=6)
    shutil.rmtree(tmp_path / "done" / "best")
    merge_of_ones_own(models, tmp_path / "done" / "best")
    before = files_in(tmp_path / "done")
    with pytest.raises(DestinationError, match="best exists and hsa search did not write it"):
        run(models, tmp_path / "done", trials=9, evaluate=refusing)
    assert files_in(tmp_path / "done") == before


def test_the_best_candidate_of_another_search_is_not_replaced(models: Sources, tmp_path: Path) -> None:
    run(models, tmp_path / "one", trials=6)
    shutil.copytree(tmp_path / "one" / "best", tmp_path / "two" / "best")
    with pytest.raises(DestinationError, match="best exists and hsa search did not write it"):
        run(models, tmp_path / "two", evaluate=refusing)


def test_a_best_with_a_file_of_the_users_own_is_refused_before_anything_is_scored(
    models: Sources, tmp_path: Path
) -> None:
    run(models, tmp_path, trials=6)
    (tmp_path / "best" / "notes.txt").write_bytes(FOREIGN)
    with pytest.raises(DestinationError, match=r"holds notes\.txt, which its hsa_merge\.json does not list"):
        run(models, tmp_path, trials=9, evaluate=refusing)
    (tmp_path / "best" / "notes.txt").unlink()
    assert len(run(models, tmp_path, trials=9).trials) == 9


def test_searches_and_evaluations_leave_each_others_files_alone(models: Sources, tmp_path: Path) -> None:
    dev = write_speech(tmp_path / "dev", models, 2, 0)
    speech = {"method": "task_arithmetic", "dev": [str(dev)], "trials": 6, "normalizer": NORMALIZER}
    hsa.evaluate(models["base"], str(dev), normalizer=NORMALIZER, output=tmp_path / "evaluated")
    before = files_in(tmp_path / "evaluated")
    with pytest.raises(DestinationError, match=r"report\.html exists and hsa search did not write it"):
        hsa.search(models, output=tmp_path / "evaluated", **speech)
    assert files_in(tmp_path / "evaluated") == before
    hsa.search(models, output=tmp_path / "searched", **speech)
    before = files_in(tmp_path / "searched")
    with pytest.raises(DestinationError, match=r"report\.html exists and hsa eval did not write it"):
        hsa.evaluate(models["base"], str(dev), normalizer=NORMALIZER, output=tmp_path / "searched")
    assert files_in(tmp_path / "searched") == before


def test_a_study_that_no_search_made_is_left_alone(
    models: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    monkeypatch.setattr(store, "PATIENCE", 0.2)
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    study = optuna.create_study(storage=url, study_name="mine")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    with pytest.raises(RequestError, match="has a study named 'mine' that hsa search did not make; give another study"):
        run(models, tmp_path / "out", storage=url, study="mine", evaluate=refusing)
    again = optuna.load_study(storage=url, study_name="mine")
    assert len(again.trials) == 2
    assert again.user_attrs == {}


# --- at the end -------------------------------------------------------------------------------------------------------


def at_step(number: int, act: Callable[[], object]) -> Callable[[Any], None]:
    """A progress function that does something once, after so many trials."""

    def step(seen: Any) -> None:
        if seen.finished == number:
            act()

    return step


def test_reports_are_written_where_best_cannot_be(models: Sources, tmp_path: Path) -> None:
    own = at_step(7, lambda: merge_of_ones_own(models, tmp_path / "best"))
    with pytest.raises(DestinationError, match="best exists and hsa search did not write it"):
        run(models, tmp_path, progress=own)
    document = json.loads((tmp_path / "search.json").read_text(encoding="utf-8"))
    assert len(document["trials"]) == 8
    assert {"trials.csv", "report.md", "report.html"} < {path.name for path in tmp_path.iterdir()}
    shutil.move(tmp_path / "best", tmp_path / "mine")
    found = run(models, tmp_path, evaluate=refusing)
    assert [trial.as_dict() for trial in found.trials] == document["trials"]
    assert (tmp_path / "best" / WEIGHTS).is_file()


def test_a_page_that_another_command_wrote_meanwhile_is_not_replaced(models: Sources, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    with pytest.raises(DestinationError, match=r"report\.html exists and hsa search did not write it"):
        run(models, tmp_path, progress=at_step(7, lambda: page.write_bytes(FOREIGN)))
    assert page.read_bytes() == FOREIGN
    page.unlink()
    assert len(run(models, tmp_path, evaluate=refusing).trials) == 8


def scale_weights(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def change_generation(folder: Path) -> None:
    path = folder / "generation_config.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, "num_beams": 3}), encoding="utf-8")


@pytest.mark.parametrize(
    ("number", "change"),
    [(1, scale_weights), (0, change_generation), (1, lambda folder: (folder / WEIGHTS).unlink())],
    ids=["weights", "small files", "missing"],
)
def test_best_is_not_written_of_sources_that_changed_during_the_search(
    number: int, change: Callable[[Path], object], models: Sources, tmp_path: Path
) -> None:
    sources = {**models, "models": [str(tmp_path / Path(each).name) for each in models["models"]]}
    for given, copy in zip(models["models"], sources["models"], strict=True):
        shutil.copytree(given, copy)
    changed, output = Path(sources["models"][number]), tmp_path / "out"
    with pytest.raises(SourceChanged, match=rf"{changed.name} has changed since the search began.*all trials are kept"):
        run(sources, output, progress=at_step(7, lambda: change(changed)))
    assert not (output / "best").exists()
    document = json.loads((output / "search.json").read_text(encoding="utf-8"))
    shutil.rmtree(changed)
    shutil.copytree(models["models"][number], changed)
    found = run(sources, output, evaluate=refusing)
    assert [trial.as_dict() for trial in found.trials] == document["trials"]
    kept = files_in(output / "best")
    change(changed)
    with pytest.raises(SourceChanged, match="has changed since the search began"):
        found.merge(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert files_in(output / "best") == kept


# --- the card ---------------------------------------------------------------------------------------------------------


def rows(names: list[str]) -> list[Comparison]:
    utterance = Utterance("a", Path("/a.wav"), "one two")
    scores = [score_utterance(utterance, "one", set_name=name, normalize=plain) for name in names]
    return list(compare({"trial 9": scores}, "trial 9", 0.95))


def test_a_card_has_as_many_scores_as_it_may(tmp_path: Path) -> None:
    names = [f"set {number} of many with a name of some length" for number in range(1500)]
    fields = check_fields(card_fields("search", rows(names), "test", 40, names, "mean"))
    kept = json.loads(fields["model_index"])[0]["results"]
    assert 0.9 * MAX_MODEL_INDEX < len(fields["model_index"]) <= MAX_MODEL_INDEX
    assert [each["dataset"]["name"] for each in kept] == names[: len(kept)]
    assert f"It lists the scores on {len(kept)} of 1500 sets." in fields["limitations"]
    assert f"{names[9]} and 1490 more sets;" in fields["limitations"]


def test_a_card_has_all_scores_of_few_sets() -> None:
    fields = check_fields(card_fields("search", rows(["one", "two"]), "test", 40, ["one", "two"], "mean"))
    assert [each["dataset"]["name"] for each in json.loads(fields["model_index"])[0]["results"]] == ["one", "two"]
    assert "lists the scores" not in fields["limitations"]
    assert "on one, two; scores on these sets are optimistic" in fields["limitations"]


def test_a_card_takes_names_that_are_no_utf8() -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    fields = check_fields(card_fields(name, rows([name]), "dev", 40, [name], name))
    index = json.loads(fields["model_index"])[0]
    assert [index["name"], index["results"][0]["dataset"]["name"]] == [r"caf\udce9", r"caf\udce9"]


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trial 9", "soup secondary+tertiary"])
def test_a_model_may_not_have_the_name_of_a_trial(name: str, models: Sources, tmp_path: Path) -> None:
    shutil.copytree(models["models"][0], tmp_path / name)
    sources = {**models, "models": [str(tmp_path / name), *models["models"][1:]]}
    with pytest.raises(RequestError, match="a name that the search gives to models of its own; rename its directory"):
        run(sources, tmp_path / "out", evaluate=refusing)
    assert not (tmp_path / "out").exists()


def test_two_soups_may_not_have_one_name(models: Sources, tmp_path: Path) -> None:
    names = ["secondary+tertiary", *(Path(each).name for each in models["models"])]
    shutil.copytree(models["models"][0], tmp_path / names[0])
    sources = {**models, "models": [str(tmp_path / names[0]), *models["models"]]}
    with pytest.raises(RequestError, match=r"soups of 'secondary' and of 'secondary\+tertiary' could have the same na"):
        run(sources, tmp_path / "out", method="linear", soup="greedy", evaluate=refusing)
    assert not (tmp_path / "out").exists()
