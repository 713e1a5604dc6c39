"""Sweeps with sets of speech: the error rates are those of the written checkpoints, and bad input costs no point."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import run_hsa, snapshot
from hub_support import env, published, servers
from search_cases import NORMALIZER, write_models, write_speech
from speech_sets import write_set

import hsa
from hsa.cli import app
from hsa.cli.sweep import _noting_what_stays
from hsa.evaluation import transcription
from hsa.evaluation.transcription import Step
from hsa.sweeps.scores import RATES

__all__ = ["env", "published", "servers"]
pytestmark = pytest.mark.long

Case = dict[str, Any]
GRID: dict[str, Any] = {"k": [0.5, 1.0], "lam": [0.0, 0.5]}
POINTS = [f"attention-all_k{k}_lambda{lam}_alpha0.2" for k in ("0.5", "1") for lam in ("0", "0.5")]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Three small models, by role, and two sets."""
    folder = tmp_path_factory.mktemp("sweep")
    models = write_models(folder / "models")
    clips, more = (write_speech(folder / name, models, count, count) for name, count in (("clips", 6), ("more", 3)))
    primary, secondary, _ = models["models"]
    sources = {"base": models["base"], "primary": primary, "secondary": secondary}
    return {"sources": sources, "data": [str(clips), f"few={more}"], "folder": folder}


def sweep(case: Case, output: Path, **changes: Any) -> hsa.SweepReport:
    given = {"data": case["data"], "normalizer": NORMALIZER, "device": "cpu", **GRID, **changes}
    return hsa.sweep(**case["sources"], output=output, targets=["attention-all"], sync=False, **given)


@pytest.fixture(scope="module")
def swept(case: Case) -> hsa.SweepReport:
    return sweep(case, case["folder"] / "swept")


def utterances(found: hsa.Evaluation, name: str) -> list[tuple[str, str, str, int]]:
    return [(each.set, each.id, each.hypothesis, each.words.errors) for each in found[name].utterances]


def test_rates_are_those_of_the_written_checkpoints(swept: hsa.SweepReport, case: Case, tmp_path: Path) -> None:
    """To the word, of each point and of the models that are merged."""
    assert list(swept.made) == POINTS
    for name in POINTS:
        patch = swept.output / f"{name}.safetensors"
        hsa.apply(case["sources"]["primary"], patch, output=tmp_path / name, sync=False)
    models = [*case["sources"].values(), *(tmp_path / name for name in POINTS)]
    expected = hsa.evaluate(
        models, case["data"], baseline=case["sources"]["primary"], normalizer=NORMALIZER, device="cpu"
    )
    assert swept.scores is not None
    found = swept.scores.evaluation
    assert [each.name for each in found.models] == ["base", "primary", "secondary", *POINTS]
    assert len({each.wer for each in expected.models}) > 3
    for each, other in zip(found.models, expected.models, strict=True):
        assert each.name == other.name
        assert each.model.digest == other.model.digest
        assert each.scores == other.scores
        assert utterances(found, each.name) == utterances(expected, other.name)


def test_what_is_written(swept: hsa.SweepReport) -> None:
    scores = swept.scores
    assert scores is not None
    index = json.loads((swept.output / "index.json").read_text())["points"]
    digests = {entry["place"]: entry["blake3"] for entry in index}
    with (swept.output / "wer.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rates = [f"{start}{name}" for start in ("", "clips_", "few_") for name in RATES]
    assert list(rows[0]) == ["model", "place", "targets", "k", "lambda", "alpha", "blake3", *rates]
    assert [row["model"] for row in rows] == ["base", "primary", "secondary", *POINTS]
    for row in rows:
        found = scores[row["model"]]
        assert float(row["wer"]) == found.wer
        assert float(row["few_wer"]) == found.score("set", "few").words.rate
        difference = found.scores[0].difference
        assert row["difference"] == ("" if difference is None else repr(difference.wer))
    for row in rows[3:]:
        assert row["place"] == f"{row['model']}.safetensors"
        assert row["blake3"] == digests[row["place"]]
        assert row["model"] == f"attention-all_k{float(row['k']):g}_lambda{float(row['lambda']):g}_alpha0.2"
    assert all((row["place"], row["k"], row["blake3"]) == ("", "", "") for row in rows[:3])
    written = {path.name for path in (swept.output / "evaluation").iterdir()}
    assert written == {"hypotheses", "report.html", "scores.csv", "scores.json"}
    document = json.loads((swept.output / "evaluation" / "scores.json").read_text())
    assert document == scores.evaluation.scores_dict()
    assert not hsa.verify(swept.output).problems


def test_a_second_run_decodes_nothing_and_a_larger_grid_what_is_new(
    swept: hsa.SweepReport, case: Case, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(swept.output, tmp_path / "again"))
    before = snapshot(output / "evaluation")
    again = sweep(case, output)
    assert again.scores is not None and swept.scores is not None
    assert (list(again.skipped), again.scores.evaluation.decoded) == (POINTS, 0)
    assert again.scores.rows() == swept.scores.rows()
    assert snapshot(output / "evaluation" / "hypotheses") == snapshot(swept.output / "evaluation" / "hypotheses")
    assert snapshot(output / "evaluation").keys() == before.keys()
    larger = sweep(case, output, lam=[0.0, 0.5, 1.0])
    assert larger.scores is not None
    new = [name for name in larger.made if "lambda1" in name]
    assert (len(new), list(larger.made)) == (2, new)
    copies = sum(larger.scores[name].model.digest == larger.scores["primary"].model.digest for name in new)
    assert larger.scores.evaluation.decoded == 9 * (2 - copies)
    assert len((output / "wer.csv").read_text().splitlines()) == 1 + 3 + 6


def test_points_without_patches_are_evaluated_where_they_stand(case: Case, tmp_path: Path) -> None:
    models = [case["sources"]["primary"], case["sources"]["secondary"]]
    report = hsa.sweep(
        base=case["sources"]["base"],
        models=models,
        method="task_arithmetic",
        lam=[0.3, 0.9],
        output=tmp_path / "out",
        data=case["data"],
        normalizer=NORMALIZER,
        full=True,
        sync=False,
    )
    assert report.scores is not None
    for name in report.made:
        alone = hsa.evaluate(report.output / name, case["data"], normalizer=NORMALIZER)
        assert alone.models[0].utterances == report.scores[name].utterances
        assert alone.models[0].model.digest == report.scores[name].model.digest
    assert [row["lambda"] for row in report.scores.rows()[3:]] == [0.3, 0.9]
    assert {row["method"] for row in report.scores.rows()[3:]} == {"task_arithmetic"}
    again = hsa.sweep(
        base=case["sources"]["base"],
        models=models,
        method="task_arithmetic",
        lam=[0.3, 0.9],
        output=tmp_path / "out",
        data=case["data"],
        normalizer=NORMALIZER,
        full=True,
        sync=False,
    )
    assert again.scores is not None and again.scores.evaluation.decoded == 0
    assert len(again.skipped) == 2


def test_one_checkpoint_at_a_time_takes_space(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    held: list[int] = []
    load = transcription.load_recognizer

    def counted(*arguments: Any, **keywords: Any) -> Any:
        held.append(len(list(place.rglob("*.safetensors"))))
        return load(*arguments, **keywords)

    monkeypatch.setattr(transcription, "load_recognizer", counted)
    sweep(case, tmp_path / "out", data=case["data"][1], k=[1.0])
    assert held == [0, 0, 0, 1, 1]
    assert list(place.iterdir()) == []


def test_steps_count_what_is_decoded(case: Case, tmp_path: Path) -> None:
    steps: list[Step] = []
    report = sweep(case, tmp_path / "out", data=case["data"][1], k=[1.0], batch=2, evaluation_progress=steps.append)
    assert report.scores is not None
    assert [step.done for step in steps] == [2, 3, 5, 6, 8, 9, 11, 12, 14, 15]
    assert {step.total for step in steps} == {15}
    assert [step.seconds for step in steps] == sorted(step.seconds for step in steps)
    assert steps[-1].model == report.made[-1]


# --- what is said -----------------------------------------------------------------------------------------------------


def words(case: Case, output: Path, *more: str, data: bool = True) -> list[str]:
    sources = [f"--{role}={path}" for role, path in case["sources"].items()]
    sets = [f"--eval={each}" for each in case["data"]] if data else []
    grid = ["--k=0.5,1", "--lambda=0,0.5", "--targets=attention-all", f"--output={output}", "--no-sync"]
    return ["sweep", *sources, *grid, *sets, *more]


def test_the_table_marks_the_best_points_of_each_set(
    swept: hsa.SweepReport, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = swept.scores
    assert scores is not None
    assert app.run(words(case, swept.output, f"--normalizer={NORMALIZER}", "--device=cpu")) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "0 points made, 4 were there and verified; 4 in index.json and index.csv" in lines[1]
    assert "2 sets, 9 utterances, 9.0 seconds of speech; normalizer plain; rates in %" in lines
    assert "every point has targets attention-all, alpha 0.2" in lines
    tables = printed.out.split("utterances, ")[2:]
    assert len(tables) == 3
    for name, text in zip(("clips", "few", None), tables, strict=True):
        inside = [line for line in text.splitlines() if line.startswith(" ") and line.strip() and "──" not in line]
        header, *rows = [line.split() for line in inside]
        assert header == ["model", "k", "lambda", "WER", "95", "%", "minus", "primary", "95", "%"]
        assert [row[0] for row in rows[:3]] == ["base", "primary", "secondary"]
        for point, row in zip(POINTS, rows[3:], strict=True):
            score = scores[point].scores[0] if name is None else scores[point].score("set", name)
            best = point in scores.best(name)
            assert row[: 2 if best else 1] == (["best", "point"] if best else ["point"])
            k, lam, rate = row[2:5] if best else row[1:4]
            assert f"k{k}_lambda{lam}_" in point
            assert rate == f"{100 * score.words.rate:.2f}"
            assert score.difference is not None
            assert f"{100 * score.difference.wer:+.2f}" in row
    assert lines[-2:] == [
        "nothing to decode: every transcript was there",
        f"written: {swept.output}/wer.csv, evaluation/",
    ]
    assert "note: the best of 4 points looks better than it is on the speech that chose it" in printed.err


def test_json_has_the_scores(swept: hsa.SweepReport, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert swept.scores is not None
    assert app.run(words(case, swept.output, f"--normalizer={NORMALIZER}", "--device=cpu", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)["scores"]
    assert printed["rows"] == json.loads(json.dumps(swept.scores.rows()))
    assert printed["best"] == list(swept.scores.best())
    assert printed["best_by_set"] == {name: list(swept.scores.best(name)) for name in ("clips", "few")}
    assert printed["evaluation"]["run"]["decoded"] == 0


def test_a_signal_says_what_stays(capsys: pytest.CaptureFixture[str]) -> None:
    for evaluated, what in ((True, ", and transcripts of finished batches,"), (False, "")):
        with pytest.raises(KeyboardInterrupt), _noting_what_stays(evaluated=evaluated):
            raise KeyboardInterrupt
        line = f"hsa: note: points that were finished{what} stay; run the sweep again to go on\n"
        assert capsys.readouterr().err == line


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval=nowhere.tsv"], "nowhere.tsv cannot be read as a set of utterances"),
        (["--normalizer=best"], "--normalizer must be one of auto, whisper, basic, plain, none"),
        (["--limit=0"], "--limit must be a whole number of at least 1"),
        (["--batch=0"], "--batch must be a whole number from 1 to 4096"),
        (["--language=xx"], "does not know --language xx; give a code such as de"),
        (["--device=gpu"], "--device must be auto, cpu, cuda or cuda:N"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_are_one_line_and_leave_nothing(
    more: list[str], message: str, case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(words(case, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_options_of_an_evaluation_need_a_set(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ("--limit=3", "--language=de", "--normalizer=plain", "--batch=4", "--device=cpu"):
        assert app.run(words(case, tmp_path / "out", more, data=False)) == 2
        name = more.partition("=")[0]
        assert f"{name} is for evaluating the points; give --eval a set too" in capsys.readouterr().err
    with pytest.raises(hsa.RequestError, match="limit is for evaluating the points; give data a set too"):
        sweep(case, tmp_path / "out", data=None, normalizer="auto", device="auto", limit=3)
    assert not (tmp_path / "out").exists()


def test_bad_speech_and_models_are_refused_before_a_point_is_written(case: Case, tmp_path: Path) -> None:
    table = tmp_path / "speech.tsv"
    table.write_text("file\ttext\nmissing.wav\ta b\n", encoding="utf-8")
    with pytest.raises(hsa.HsaError, match=r"missing\.wav"):
        sweep(case, tmp_path / "out", data=table)
    silent = write_set(tmp_path / "silent", (0.4,))
    silent.write_text(silent.read_text().splitlines()[0] + "\nclip_000.wav\t...\n", encoding="utf-8")
    with pytest.raises(hsa.HsaError, match="no reference of set has a word once normalised"):
        sweep(case, tmp_path / "out", data=silent)
    deaf = {role: shutil.copytree(path, tmp_path / "deaf" / role) for role, path in case["sources"].items()}
    for path in deaf.values():
        (path / "preprocessor_config.json").unlink()
    with pytest.raises(hsa.HsaError, match=r"primary cannot be evaluated: .* has no feature extractor") as e:
        sweep({**case, "sources": deaf}, tmp_path / "out")
    assert str(deaf["primary"]) in str(e.value)
    assert not (tmp_path / "out").exists()


def test_files_of_others_are_left_alone(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sweep(case, output, data=None, normalizer="auto", device="auto", k=[1.0])
    for name in ("wer.csv", "evaluation/scores.csv"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("mine", encoding="utf-8")
        before = snapshot(output)
        with pytest.raises(hsa.DestinationError, match=r"did not write it; choose another output, or move it away"):
            sweep(case, output)
        assert snapshot(output) == before
        (output / name).unlink()


def test_a_missing_library_is_said_before_a_point_is_written(case: Case, tmp_path: Path) -> None:
    code = "import sys; sys.modules['jiwer'] = None\nfrom hsa.cli.app import run\nsys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *words(case, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs jiwer, which is not installed: pip install 'hsa-merge[eval]'" in done.stderr
    assert not (tmp_path / "out").exists()


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_source_that_cannot_be_evaluated_is_left_out(swept: hsa.SweepReport, case: Case, tmp_path: Path) -> None:
    """The points get primary's files, or its parent's; a source without them says so in a note."""
    sources = {role: shutil.copytree(path, tmp_path / "models" / role) for role, path in case["sources"].items()}
    (sources["secondary"] / "preprocessor_config.json").unlink()
    shutil.move(sources["primary"] / "preprocessor_config.json", tmp_path / "models")
    report = sweep({**case, "sources": sources}, tmp_path / "out", k=[1.0])
    assert report.scores is not None and swept.scores is not None
    assert [each.name for each in report.scores.evaluation.models] == ["base", *POINTS[2:]]
    assert report.scores.evaluation.baseline is None
    for role in ("primary", "secondary"):
        assert any(note.startswith(f"{role} is not evaluated beside the points: ") for note in report.notes)
    for name in POINTS[2:]:
        assert utterances(report.scores.evaluation, name) == utterances(swept.scores.evaluation, name)
    assert "minus" not in report.scores.table


def test_hub_ids_are_evaluated(
    published: Mapping[str, str], shared_triple: dict[str, Path], env: dict[str, str], tmp_path: Path
) -> None:
    table = write_set(tmp_path / "speech", (0.4, 0.6))
    more = ["--lambda=0,1", f"--eval={table}", "--language=de", "--json", "--no-sync", "--device=cpu"]
    rows = []
    for name, sources, given in (("ids", published, env), ("paths", shared_triple, {})):
        models = [f"--{role}={source}" for role, source in sources.items()]
        done = run_hsa("sweep", *models, *more, f"--output={tmp_path / name}", env=given)
        assert done.returncode == 0, done.stderr
        rows.append(json.loads(done.stdout)["scores"]["rows"])
    assert [row["model"] for row in rows[0]][:3] == ["base", "primary", "secondary"]
    assert [row["wer"] for row in rows[0]] == [row["wer"] for row in rows[1]]


def test_real_models(real: dict[str, Path], clips: Path, tmp_path: Path) -> None:
    report = hsa.sweep(**real, output=tmp_path / "out", lam=[0.0], data=clips, limit=1, device="cpu", sync=False)
    (name,) = report.made
    hsa.merge(**real, output=tmp_path / "merged", lam=0.0, sync=False)
    expected = hsa.evaluate([tmp_path / "merged", real["primary"]], clips, limit=1, device="cpu")
    assert report.scores is not None
    assert report.scores[name].utterances == expected["merged"].utterances
    assert report.scores["primary"].utterances == expected["primary"].utterances
