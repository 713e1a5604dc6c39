"""The reference script's own command lines, and the full-load baseline's tensors."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from full_load import full_load_merge
from helpers import same_tensors, snapshot

from hsa.integrations.reference_script import directory_name, lambdas, parser, requests, run

Triple = dict[str, Path]

ONE = """--pretrained-model {base} --model1 {primary} --model2 {secondary} --k-percent 0.6 --lambda 0.5 --alpha 0.2
--out-path {out}"""
SWEEP = """--pretrained-model {base} --model1 {primary} --model2 {secondary} --k-percent 60
--lambdas 0.0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0 --alpha 0.2 --out-path {out}"""
"""The two examples of the script's README."""


def line(template: str, triple: Triple, out: Path) -> list[str]:
    return shlex.split(template.format(**triple, out=out))


def test_one_merge_is_the_full_loads(shared_triple: Triple, tmp_path: Path) -> None:
    arguments = line(ONE, shared_triple, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-m", "hsa.integrations.reference_script", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"[SAVE] {tmp_path / 'out'}" in done.stdout
    full_load_merge(*shared_triple.values(), tmp_path / "full")
    same_tensors(tmp_path / "out", tmp_path / "full")


def test_a_sweep_makes_a_directory_for_each_lambda(shared_triple: Triple, tmp_path: Path) -> None:
    assert run(line(SWEEP, shared_triple, tmp_path / "out")) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"lamda_{tenths}_alpha_0p2" for tenths in range(11)
    )
    for tenths in range(11):
        full_load_merge(*shared_triple.values(), tmp_path / "full", lam=tenths / 10)
        same_tensors(tmp_path / "out" / f"lamda_{tenths}_alpha_0p2", tmp_path / "full")
        shutil.rmtree(tmp_path / "full")


@pytest.mark.parametrize(
    ("lam", "alpha", "name"),
    [
        (0.5, 0.2, "lamda_5_alpha_0p2"),
        (0.25, 1.0, "lamda_0p25_alpha_1"),
        (0.0, 0.0, "lamda_0_alpha_0"),
        (1.0, 0.125, "lamda_10_alpha_0p125"),
        (0.3, 10.0, "lamda_3_alpha_10"),
        (0.12345, 0.2, "lamda_0p1235_alpha_0p2"),
    ],
)
def test_directory_names(lam: float, alpha: float, name: str) -> None:
    assert directory_name(lam, alpha) == name


def test_the_other_spellings_mean_the_same(shared_triple: Triple, tmp_path: Path) -> None:
    given = "--model-class {base} --model1 {primary} --model2 {secondary}".format(**shared_triple)
    old = parser().parse_args(shlex.split(f"{given} --outdir {tmp_path / 'out'} --lamda 0.3"))
    new = parser().parse_args(line(ONE.replace("0.5", "0.3"), shared_triple, tmp_path / "out"))
    assert requests(old) == requests(new)
    bare = parser().parse_args(["--model1", "a", "--model2", "b", "--out-path", "c"])
    (request,) = requests(bare)
    assert request.sources["base"] == "openai/whisper-small.en"
    config = request.settings
    assert (config.k, config.lam, config.alpha, config.numerics) == (0.6, 0.5, 0.2, "reference")


def test_every_option_arrives(shared_triple: Triple, tmp_path: Path) -> None:
    more = (
        " --num-heads 2 --num-encoder-layers 4 --processor-source pretrained --save-lambda-subdirs"
        " --attention-scale 0.5 --non-attention-scale 0.25"
    )
    (request,) = requests(parser().parse_args(line(ONE + more, shared_triple, tmp_path / "out")))
    config = request.settings
    assert (config.num_heads, config.num_layers) == (2, 4)
    assert (config.attention_scale, config.non_attention_scale) == (0.5, 0.25)
    assert request.assets_from == "base"
    assert request.output == tmp_path / "out" / "lamda_5_alpha_0p2"
    exact = parser().parse_args(line(ONE + " --numerics exact --device cuda:0", shared_triple, tmp_path / "out"))
    assert requests(exact)[0].device == "cuda:0"


def test_exact_numerics_are_those_of_hsa_merge(shared_triple: Triple, tmp_path: Path) -> None:
    import hsa

    assert run([*line(ONE, shared_triple, tmp_path / "out"), "--numerics", "exact"]) == 0
    hsa.merge(**shared_triple, output=tmp_path / "merge", device="cpu", sync=False)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "merge")


def test_a_second_run_replaces_the_first(shared_triple: Triple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(line(ONE, shared_triple, out)) == 0
    first = snapshot(out)
    assert run(line(ONE.replace("0.5", "0.1"), shared_triple, out)) == 0
    assert snapshot(out) != first
    assert json.loads((out / "hsa_merge.json").read_text())["parameters"]["lambda"] == 0.1


def test_a_sweep_is_never_written_into_an_output_nor_replaced_by_one(
    shared_triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = SWEEP.replace("0.0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0", "0.1,0.2")
    for first, second, expected in (
        (ONE, two, "is an earlier output of hsa, which lists its files, so nothing is added to it"),
        (two, ONE, "is no earlier output of hsa: it holds lamda_1_alpha_0p2, lamda_2_alpha_0p2"),
    ):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert run(line(first, shared_triple, out)) == 0
        before = snapshot(out)
        capsys.readouterr()
        assert run(line(second, shared_triple, out)) == 2
        assert expected in capsys.readouterr().err
        assert snapshot(out) == before


def test_sources_without_processor_files_are_a_warning(
    shared_triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = {}
    for role, path in shared_triple.items():
        (tmp_path / "bare" / role).mkdir(parents=True)
        bare[role] = tmp_path / "bare" / role
        for name in ("config.json", "model.safetensors"):
            shutil.copy(path / name, bare[role] / name)
    assert run(line(ONE, bare, tmp_path / "out")) == 0
    assert "warning: no source has feature extractor or tokenizer files" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--lambdas 0.1,nothing", "must be numbers with commas between, got '0.1,nothing'"),
        ("--lambdas ,", "names no number"),
        ("--lambdas 0.1,1.5", "lambda must be in [0, 1], got 1.5"),
        ("--lambdas 0.123401,0.123402", "share the directory lamda_0p1234_alpha_0p2"),
        ("--alpha -1", "alpha must be"),
        ("--k-percent 101", "--k-percent must be in [0, 100]"),
        ("--processor-source model3", "invalid choice: 'model3'"),
        ("--model1 /nowhere/at/all", "primary"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(
    shared_triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    assert run([*line(ONE, shared_triple, tmp_path / "out"), *shlex.split(change)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("hsa: error: ") and printed.err.count("\n") == 1
    assert message in printed.err
    assert list(tmp_path.iterdir()) == []


def test_a_destination_in_the_way_stops_a_sweep_before_its_first_merge(
    shared_triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "out" / "lamda_10_alpha_0p2"
    taken.mkdir(parents=True)
    (taken / "thesis.txt").write_text("mine")
    assert run(line(SWEEP, shared_triple, tmp_path / "out")) == 2
    assert "is no earlier output of hsa" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [taken.name]


def test_a_device_that_has_no_effect_is_said(
    shared_triple: Triple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*line(ONE, shared_triple, tmp_path / "out"), "--device", "cuda"]) == 0
    assert "--device cuda has no effect" in capsys.readouterr().err


def test_all_values_of_lambda_are_read_in_order() -> None:
    given = parser().parse_args(["--model1", "a", "--model2", "b", "--out-path", "c", "--lambdas", " 0.3, 0,1 ,"])
    assert lambdas(given) == [0.3, 0.0, 1.0]
