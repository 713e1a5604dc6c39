"""The transcripts that a search keeps: used again where nothing has changed, and only there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from search_cases import NORMALIZER, write_models, write_speech

import hsa
from hsa.searches import search as search_module
from hsa.searches.evaluators import Decoder
from hsa.searches.transcripts import ABOUT, Transcripts

pytestmark = pytest.mark.long

Case = dict[str, Any]
REQUEST = {
    "dev": "d",
    "seed": 0,
    "decoding": {"beams": 1},
    "anchor": "a",
    "versions": {"torch": "2"},
    "sampler": "tpe",
}
TEXTS = ["one", "two"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("transcripts")
    sources = write_models(folder / "models")
    dev, test = (str(write_speech(folder / name, sources, 4, seed)) for seed, name in enumerate(("dev", "heldout")))
    return {"sources": sources, "dev": dev, "test": test}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many utterances each batch that was decoded had."""
    transcribe, found = Decoder.transcribe, []

    def counted(self: Decoder, key: object, batch: Any) -> list[str]:
        found.append(len(batch))
        return transcribe(self, key, batch)

    monkeypatch.setattr(Decoder, "transcribe", counted)
    yield found


def run(case: Case, output: Path, **changes: Any) -> hsa.Study:
    given = {"method": "task_arithmetic", "dev": [case["dev"]], "test": [case["test"]], "trials": 7}
    return hsa.search(
        case["sources"], output=output, **{**given, "normalizer": NORMALIZER, "batch": 2, "racing": False, **changes}
    )


def figures(study: hsa.Study) -> list[Any]:
    """All that a report says of models on sets."""
    return [
        [row.as_dict() for row in study.dev],
        [row.as_dict() for row in study.test],
        [row.as_dict() for row in study.worst],
        [(trial.name, trial.values, trial.result.errors) for trial in study.trials],
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dev", "e"),
        ("seed", 1),
        ("decoding", {"beams": 2}),
        ("anchor", "b"),
        ("versions", {"torch": "3"}),
    ],
)
def test_texts_belong_to_what_decides_them(name: str, value: Any, tmp_path: Path) -> None:
    assert name in ABOUT
    Transcripts(tmp_path, REQUEST).put("weights", TEXTS)
    assert Transcripts(tmp_path, {**REQUEST, "sampler": "random"}).get("weights") == tuple(TEXTS)
    other = Transcripts(tmp_path, {**REQUEST, name: value})
    assert other.get("weights") == ()
    other.put("weights", ["three", "four"])
    assert other.get("weights") == ("three", "four")
    assert Transcripts(tmp_path, REQUEST).get("weights") == tuple(TEXTS)


def test_a_search_that_goes_on_without_a_change_decodes_nothing(case: Case, tmp_path: Path, decoded: list[int]) -> None:
    first = run(case, tmp_path)
    assert sum(decoded) > 0
    decoded.clear()
    assert figures(run(case, tmp_path)) == figures(first)
    assert decoded == []


def test_another_study_in_the_same_output_decodes_no_test_set_again(
    case: Case, tmp_path: Path, decoded: list[int]
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    first = run(case, tmp_path / "out", storage=url, study="one")
    decoded.clear()
    again = run(case, tmp_path / "out", storage=url, study="two")
    assert figures(again) == figures(first)
    assert sum(decoded) == sum(trial.result.decoded for trial in again.trials)


def test_small_files_that_changed_change_the_report(case: Case, tmp_path: Path) -> None:
    """Another study in the same output, after the first model's generation config was edited."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    path = Path(case["sources"]["models"][0]) / "generation_config.json"
    text = path.read_text(encoding="utf-8")
    first = run(case, tmp_path / "out", storage=url, study="one")
    path.write_text(json.dumps({**json.loads(text), "suppress_tokens": list(range(0, 256, 2))}), encoding="utf-8")
    try:
        second = run(case, tmp_path / "out", storage=url, study="two")
        fresh = run(case, tmp_path / "fresh")
    finally:
        path.write_text(text, encoding="utf-8")
    assert figures(second) == figures(fresh)
    for before, after in zip(figures(first)[:2], figures(second)[:2], strict=True):
        assert [row["errors"] for row in before] != [row["errors"] for row in after]


@pytest.mark.parametrize("library", ["torch", "transformers", "soxr", "soundfile"])
def test_texts_of_another_version_of_a_library_are_not_used(
    library: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    options = {"storage": url, "trials": 6, "test": None, "limit": 2}
    run(case, tmp_path, study="one", **options)
    count = len(list((tmp_path / "transcripts").iterdir()))
    version = search_module.version
    monkeypatch.setattr(search_module, "version", lambda name: "0.0.1" if name == library else version(name))
    with pytest.raises(hsa.RequestError, match="was begun with versions"):
        run(case, tmp_path, study="one", **options)
    run(case, tmp_path, study="two", **options)
    assert len(list((tmp_path / "transcripts").iterdir())) == 2 * count
