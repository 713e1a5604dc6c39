"""TSV-M, Iso-C and Iso-CTS as merges: against their oracles, what they record and say, and what they refuse."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forged_outputs import forge, forge_with_card, named, told
from helpers import read_tensors, run_hsa, snapshot, write_tensors
from sampling import EVERYTHING
from subspace_models import DTYPES, ORACLES, Family, assert_merged, chosen, expected, write_family

import hsa
from hsa.backends import array_block, cpu
from hsa.methods import subspaces
from hsa.planning import file_layout

TYPES = {**{name: (name,) for name in DTYPES}, "mixed": ("float16", "float32", "bfloat16")}
KINDS = ["full", "low rank", "some"]
FC1 = "model.encoder.layers.1.fc1.weight"

CASES: list[tuple[str, dict[str, Any]]] = [
    ("tsv_m", {}),
    ("tsv_m", {"lam": 0.3, "share": 1.0}),
    ("tsv_m", {"lam": -2.0, "share": 0.4, "orthogonalize": "newton-schulz"}),
    ("tsv_m", {"share": 0.0}),
    ("tsv_m_boosted", {}),
    ("tsv_m_boosted", {"beta": 0.0, "share": 0.7, "lam": 0.5}),
    ("tsv_m_boosted", {"beta": 1.0, "orthogonalize": "newton-schulz"}),
    ("iso_c", {}),
    ("iso_c", {"lam": 0.0}),
    ("iso_cts", {}),
    ("iso_cts", {"common_share": 0.0, "lam": 1.5}),
    ("iso_cts", {"common_share": 1.0}),
    ("iso_cts", {"common_share": 0.5}),
]


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def families(shared_triple: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Family]:
    place = tmp_path_factory.mktemp("families")
    return {
        (kind, types): write_family(place / kind / types, shared_triple["base"], kind, TYPES[types])
        for kind in KINDS
        for types in TYPES
    }


def merged(method: str, sources: Family, output: Path, **options: Any) -> hsa.MergeReport:
    base, *models = sources.values()
    return hsa.merge(method=method, base=base, models=models, output=output, sync=False, **options)


def decisions(output: Path) -> dict[str, Any]:
    record = json.loads((output / "hsa_merge.json").read_text(encoding="utf-8"))
    return {name: target["decision"] for name, target in record["targets"].items()}


# --- against the oracle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "method", "settings"), [(n, *case) for n, case in enumerate(CASES)], ids=str)
def test_merges_are_the_oracles(
    number: int,
    method: str,
    settings: dict[str, Any],
    families: dict[tuple[str, str], Family],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    draw = random.Random(number)
    for attempt in range(12 if EVERYTHING else 2):
        sources = chosen(families[draw.choice(KINDS), draw.choice(list(TYPES))], draw.randint(1, 5))
        monkeypatch.setattr(subspaces, "SMALL", draw.choice([8, 256]))
        monkeypatch.setattr(file_layout, "SLICE_ELEMENTS", draw.choice([1024, 3072, 1 << 18]))
        monkeypatch.setattr(file_layout, "MAX_WHOLE", draw.choice([2000, 24 << 20]))
        for module in (cpu, array_block):
            monkeypatch.setattr(module, "TILE", draw.choice([1024, 5000, 1 << 17]))
        output = tmp_path / str(attempt)
        merged(method, sources, output, threads=draw.randint(1, 5), **settings)
        assert_merged(read_tensors(output), expected(method, sources, settings))


@pytest.mark.parametrize("method", ORACLES)
def test_float32_results_lie_near_float64s(method: str, families: dict[tuple[str, str], Family]) -> None:
    sources = chosen(families["full", "float32"], 3)
    base, *models = sources.values()
    found = hsa.Merger(method=method, base=base, models=models).merge()
    wanted = expected(method, sources, {}, torch.float64)
    for name, tensor in wanted.items():
        assert float((found[name].double() - tensor).norm()) <= 1e-6 * float(tensor.norm()), name


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merger_writes_every_candidate(
    method: str, dtype: str, families: dict[tuple[str, str], Family], tmp_path: Path
) -> None:
    sources = chosen(families["low rank", "mixed"], 2)
    base, *models = sources.values()
    merger = hsa.Merger(method=method, base=base, models=models, threads=2)
    state = {name: torch.full(t.shape, torch.nan, dtype=DTYPES[dtype]) for name, t in read_tensors(models[0]).items()}
    for own, settings in CASES:
        if own == method:
            merger.apply_(state, **settings)
            assert_merged(state, expected(method, sources, {**settings, "out_dtype": DTYPES[dtype]}))
    report = merger.save(tmp_path / "saved", lam=0.7)
    merged(method, sources, tmp_path / "merged", lam=0.7)
    assert snapshot(tmp_path / "saved") == snapshot(tmp_path / "merged")
    assert merger.check(lam=0.7).notes[0] == report.extent.headline


def test_settings_vary_over_layers_and_by_filters(families: dict[tuple[str, str], Family], tmp_path: Path) -> None:
    sources = chosen(families["full", "float32"], 2)
    options: dict[str, Any] = {"lam": [0.5, 1.5], "common_share": [{"filter": "fc", "value": 0.2}, 0.9]}
    merged("iso_cts", sources, tmp_path / "out", **options)
    varying = {
        "lam": lambda name: 1.5 if ".layers.1." in name else 0.5,
        "common_share": lambda name: 0.2 if "fc" in name else 0.9,
    }
    wanted = {name: each for name, each in expected("iso_cts", sources, varying).items() if ".layers." in name}
    found = read_tensors(tmp_path / "out")
    assert_merged({name: found[name] for name in wanted}, wanted)


@pytest.mark.parametrize("method", ORACLES)
def test_bytes_repeat_whatever_the_threads(
    method: str, families: dict[tuple[str, str], Family], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subspaces, "SMALL", 8)
    sources = chosen(families["full", "float16"], 3)
    for threads in (1, 2, 5):
        merged(method, sources, tmp_path / str(threads), threads=threads)
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2") == snapshot(tmp_path / "5")


# --- what is recorded and said ---------------------------------------------------------------------------------------


def test_decisions_say_which_directions_were_taken(families: dict[tuple[str, str], Family], tmp_path: Path) -> None:
    sources = chosen(families["low rank", "float32"], 2)
    report = merged("tsv_m", sources, tmp_path / "tsv", lam=0.5, share=0.25)
    assert decisions(tmp_path / "tsv")[FC1] == {"lambda": 0.5, "directions": [3, 3], "zeros": [61, 61]}
    assert decisions(tmp_path / "tsv")[FC1.replace("weight", "bias")] == {"coefficients": [0.25, 0.25]}
    matrices = sum("directions" in decision for decision in decisions(tmp_path / "tsv").values())
    lost = matrices * 2 * 13  # of 16 wanted of each model
    assert any(f"{lost} of {matrices * 32} directions count as zero" in note for note in report.notes), report.notes

    merged("iso_c", sources, tmp_path / "iso")
    found = decisions(tmp_path / "iso")[FC1]
    assert (found["directions"], found["zeros"]) == ([6], [58])
    vectors = [read_tensors(path)[FC1].double() for path in sources.values()]
    values = torch.linalg.svdvals(vectors[1] + vectors[2] - 2 * vectors[0])[:6]
    assert found["scale"] == pytest.approx(float(values.mean()), rel=1e-4)

    merged("iso_cts", sources, tmp_path / "cts", common_share=0.0)
    found = decisions(tmp_path / "cts")[FC1]
    assert found["directions"] == [0, 3, 3]

    merged("tsv_m_boosted", sources, tmp_path / "boosted", beta=0.5)
    assert decisions(tmp_path / "boosted")[FC1]["beta"] == 0.5
    record = json.loads((tmp_path / "boosted" / "hsa_merge.json").read_text(encoding="utf-8"))
    assert "openblas" in record["libraries"]["lapack"].lower() or record["libraries"]["lapack"]


def test_a_dry_run_says_what_memory_a_matrix_takes(families: dict[tuple[str, str], Family], tmp_path: Path) -> None:
    sources = chosen(families["full", "float32"], 2)
    options = ["--method=tsv_m", f"--base={sources['base']}", *(f"--model={sources[f'model{n}']}" for n in (1, 2))]
    done = run_hsa("merge", *options, f"--output={tmp_path / 'out'}", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    notes = " ".join(json.loads(done.stdout)["notes"])
    assert "matrices are decomposed" in notes and "MiB of memory" in notes
    assert not (tmp_path / "out").exists()


def test_settings_that_take_no_direction_are_named(families: dict[tuple[str, str], Family], tmp_path: Path) -> None:
    sources = chosen(families["full", "float32"], 2)
    report = merged("tsv_m", sources, tmp_path / "out", share=0.001)
    assert any("take no direction" in note for note in report.notes), report.notes
    base = read_tensors(sources["base"])
    assert torch.equal(read_tensors(tmp_path / "out")[FC1], base[FC1])


def test_newton_schulz_that_does_not_converge_is_counted(
    families: dict[tuple[str, str], Family], tmp_path: Path
) -> None:
    sources = chosen(families["full", "float32"], 2)
    sources["model2"] = sources["model1"]
    report = merged("tsv_m", sources, tmp_path / "out", orthogonalize="newton-schulz")
    assert any("Newton-Schulz did not converge" in note for note in report.notes), report.notes
    assert any("is the same model given twice?" in warning for warning in report.warnings)


def test_the_boosted_method_says_that_it_is_experimental(
    families: dict[tuple[str, str], Family], tmp_path: Path
) -> None:
    report = merged("tsv_m_boosted", chosen(families["full", "float32"], 1), tmp_path / "out")
    assert any("experimental" in note for note in report.notes)


# --- verify ----------------------------------------------------------------------------------------------------------


def verified(output: Path, sources: Family) -> hsa.VerifyReport:
    base, *models = sources.values()
    return hsa.verify(output, base=base, models=models)


def shift(output: Path, name: str, relative: float) -> None:
    """Move a tensor of an output by so much of its norm, and write digests that fit."""
    tensors = read_tensors(output)
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wide = tensors[name].double()
    tensors[name] = (wide + noise * (relative * wide.norm() / noise.norm())).to(tensors[name].dtype)
    write_tensors(output, tensors)
    forge_with_card(output, lambda document: None)


@pytest.mark.unverified("its numbers are those that another machine would write")
@pytest.mark.parametrize("method", ORACLES)
def test_what_another_machine_rounds_is_no_problem(
    method: str, families: dict[tuple[str, str], Family], tmp_path: Path
) -> None:
    sources = chosen(families["full", "float32"], 2)
    merged(method, sources, tmp_path / "out", max_shard_size="1GB")
    shift(tmp_path / "out", FC1, 5e-5)
    report = verified(tmp_path / "out", sources)
    assert report.ok, told(report)
    assert report.answers is not None and report.answers.bytes_follow and report.answers.decisions_follow
    assert any("1 tensors have other bytes" in note and "5e-05" in note for note in report.notes), report.notes


@pytest.mark.unverified("it was changed")
@pytest.mark.parametrize("method", ORACLES)
def test_what_is_no_rounding_is_a_problem(method: str, families: dict[tuple[str, str], Family], tmp_path: Path) -> None:
    sources = chosen(families["full", "float32"], 2)
    merged(method, sources, tmp_path / "out", max_shard_size="1GB")
    shift(tmp_path / "out", FC1, 2e-4)
    report = verified(tmp_path / "out", sources)
    assert named(report) >= {"model.safetensors"}
    assert FC1 in told(report) and "0.0002 of its norm away" in told(report)
    assert report.answers is not None and not report.answers.bytes_follow


@pytest.mark.unverified("it was changed")
def test_vectors_are_compared_by_their_bytes(families: dict[tuple[str, str], Family], tmp_path: Path) -> None:
    sources = chosen(families["full", "float32"], 2)
    merged("iso_c", sources, tmp_path / "out", max_shard_size="1GB")
    bias = FC1.replace("weight", "bias")
    shift(tmp_path / "out", bias, 1e-6)
    assert bias in told(verified(tmp_path / "out", sources))


@pytest.mark.unverified("its decision is one that another machine would make")
@pytest.mark.parametrize(("factor", "accepted"), [(1 + 3e-5, True), (1 + 3e-4, False)])
def test_recorded_decisions_may_differ_by_rounding(
    factor: float, accepted: bool, families: dict[tuple[str, str], Family], tmp_path: Path
) -> None:
    sources = chosen(families["full", "float32"], 2)
    merged("iso_c", sources, tmp_path / "out")

    def change(document: dict[str, Any]) -> None:
        document["targets"][FC1]["decision"]["scale"] *= factor

    forge_with_card(tmp_path / "out", change)
    report = verified(tmp_path / "out", sources)
    assert report.answers is not None and report.answers.decisions_follow is accepted
    assert report.ok is accepted, told(report)
    assert accepted or f"the decision for {FC1} does not follow" in told(report)


@pytest.mark.unverified("its decision is forged")
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"directions": [30, 32]}, "directions"),
        ({"zeros": [1, 0]}, "zeros"),
        ({"zeros": [64, 0], "directions": [64, 0]}, "takes 64 directions and has 64 zeros, of 64 in all"),
        ({"zeros": [0]}, "2 matrices have directions, and 1 have zeros"),
        ({"zeros": [-1, 0]}, "expected a whole number"),
        ({"lambda": "much"}, "expected a finite number"),
        ({"directions": [1, 1, 1], "zeros": [0, 0, 0]}, "cannot be applied"),
    ],
)
def test_forged_decisions_are_found(
    change: dict[str, Any], what: str, families: dict[tuple[str, str], Family], tmp_path: Path
) -> None:
    sources = chosen(families["full", "float32"], 2)
    merged("tsv_m", sources, tmp_path / "out")

    def forge_decision(document: dict[str, Any]) -> None:
        document["targets"][FC1]["decision"] |= change

    forge(tmp_path / "out", forge_decision)
    report = verified(tmp_path / "out", sources)
    assert not report.ok
    assert what in told(report)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, r"share must be in \[0, 1\], got 1.5"),
        ({"share": -0.1}, r"share must be in \[0, 1\]"),
        ({"share": float("nan")}, "share must be"),
        ({"share": "half"}, "share must be a number"),
        ({"orthogonalize": "qr"}, "orthogonalize must be one of polar, newton-schulz, got 'qr'"),
        ({"lam": float("inf")}, "lam must be finite"),
        ({"weights": [1, 2]}, "weights"),
        ({"method": "iso_cts", "common_share": 2}, r"common_share must be in \[0, 1\]"),
        ({"method": "tsv_m_boosted", "beta": -1}, r"beta must be in \[0, 1\]"),
    ],
)
def test_settings_out_of_range(
    options: dict[str, Any], message: str, families: dict[tuple[str, str], Family], tmp_path: Path
) -> None:
    options = {"method": "tsv_m", **options}
    with pytest.raises((hsa.RequestError, TypeError), match=message):
        merged(options.pop("method"), chosen(families["full", "float32"], 2), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_missing_base_is_named(families: dict[tuple[str, str], Family], tmp_path: Path) -> None:
    models = list(families["full", "float32"].values())[:2]
    with pytest.raises(hsa.RequestError, match="needs base, the model that the others were trained from; give it"):
        hsa.merge(method="tsv_m", models=models, output=tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_source_is_named(value: float, families: dict[tuple[str, str], Family], tmp_path: Path) -> None:
    sources = write_family(tmp_path, families["full", "float32"]["base"], "full", ("float32",))
    tensors = read_tensors(sources["model2"])
    tensors[FC1][3, 4] = value
    write_tensors(sources["model2"], tensors)
    with pytest.raises(hsa.NonFiniteError, match=f"model2.*tensor {FC1} holds NaN or Inf"):
        merged("tsv_m", chosen(sources, 2), tmp_path / "out")


def test_task_vectors_that_overflow_are_named(families: dict[tuple[str, str], Family], tmp_path: Path) -> None:
    sources = write_family(tmp_path, families["full", "float32"]["base"], "full", ("float32",))
    for role, value in (("base", -3e38), ("model1", 3e38)):
        tensors = read_tensors(sources[role])
        tensors[FC1][3, 4] = value
        write_tensors(sources[role], tensors)
    with pytest.raises(hsa.NonFiniteError, match=f"tensor {FC1}: the result overflows F32"):
        merged("iso_c", chosen(sources, 2), tmp_path / "out")


def test_a_result_beyond_float16_is_named(families: dict[tuple[str, str], Family], tmp_path: Path) -> None:
    with pytest.raises(hsa.NonFiniteError, match="the result overflows F16"):
        merged("tsv_m", chosen(families["full", "float16"], 2), tmp_path / "out", lam=1e8, only="*fc1.weight")


@pytest.mark.parametrize("mode", ["first", "error", "skip-model"])
def test_models_of_another_shape(mode: str, families: dict[tuple[str, str], Family], tmp_path: Path) -> None:
    sources = chosen(write_family(tmp_path, families["full", "float32"]["base"], "full", ("float32",)), 3)
    tensors = read_tensors(sources["model3"])
    tensors[FC1] = tensors[FC1][:-1]
    write_tensors(sources["model3"], tensors)
    if mode == "error":
        with pytest.raises(hsa.MismatchError, match=r"fc1\.weight is not the same in all sources"):
            merged("tsv_m", sources, tmp_path / "out", on_mismatch=mode)
        return
    merged("tsv_m", sources, tmp_path / "out", on_mismatch=mode)
    wanted = read_tensors(sources["model1"])[FC1]
    if mode == "skip-model":
        wanted = expected("tsv_m", chosen(sources, 2), {})[FC1]
    assert torch.allclose(read_tensors(tmp_path / "out")[FC1], wanted, atol=1e-6)
