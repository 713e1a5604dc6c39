"""Mistakes of meaning are told by every method that takes a base, and every report says how far the output moved."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_tensors, run_hsa
from torch import Tensor
from warned_merges import random_like, rewritten

import hsa
from hsa.backends.sampling import RUNS, STRIDE
from hsa.engine import streamed
from hsa.methods.registry import methods
from hsa.methods.source_warnings import NO_CHANGE
from hsa.planning import file_layout

pytestmark = pytest.mark.long

Triple = Mapping[str, Path]

BASED = [name for name, each in methods().items() if each.contract.base == "required" and not each.selects_heads]
SEVERAL = [name for name in BASED if methods()[name].contract.most > 1]
SETTINGS: Mapping[str, Mapping[str, Any]] = {"slerp": {"t": 0.5}, "nearswap": {"t": 0.01}}
UNIT = 1024


@pytest.fixture(scope="module", params=["made-up", "real"])
def triple(request: pytest.FixtureRequest, shared_triple: Triple) -> Triple:
    """A made-up triple, and the real one where there is one."""
    return shared_triple if request.param == "made-up" else dict(request.getfixturevalue("real_weights"))


def merged(method: str, sources: Triple, output: Path, **more: Any) -> hsa.MergeReport:
    base, *models = sources.values()
    models = models[: methods()[method].contract.most]
    settings = {**SETTINGS.get(method, {}), **more}
    return hsa.merge(method=method, base=base, models=models, output=output, sync=False, **settings)


def told(report: hsa.MergeReport) -> str:
    """The warnings, but for those of names on the card and of files that are no weights."""
    others = ("the card calls", "no source has feature extractor or tokenizer files")
    return " | ".join(warning for warning in report.warnings if not any(each in warning for each in others))


# --- sources that hardly belong together -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", SEVERAL)
def test_base_exchanged_with_a_fine_tune_is_told(shared_triple: Triple, method: str, tmp_path: Path) -> None:
    swapped = {**shared_triple, "base": shared_triple["primary"], "primary": shared_triple["base"]}
    assert re.search(
        "model2 is nearer to model1 than to base.*are base and model1 exchanged",
        told(merged(method, swapped, tmp_path / "out")),
    )
    assert "exchanged" not in told(merged(method, shared_triple, tmp_path / "sound"))


@pytest.mark.parametrize("other", ["primary", "secondary"])
def test_both_exchanges_are_told_of_every_size(triple: Triple, other: str, tmp_path: Path) -> None:
    assert told(merged("task_arithmetic", triple, tmp_path / "sound", lam=0.5)) == ""
    swapped = {**triple, "base": triple[other], other: triple["base"]}
    found = told(merged("task_arithmetic", swapped, tmp_path / "out", lam=0.5))
    assert re.search(f"are base and model{1 if other == 'primary' else 2} exchanged", found), found


def test_real_fine_tunes_are_sound_and_every_exchange_of_them_is_told(real_weights: Triple, tmp_path: Path) -> None:
    models = {role: real_weights["base"].parent / role for role in ("base", "primary", "secondary", "tertiary")}
    if not (models["tertiary"] / "config.json").is_file():
        pytest.skip("the real triple has no tertiary")
    assert told(merged("task_arithmetic", models, tmp_path / "sound", lam=0.3)) == ""
    for role in ("primary", "secondary", "tertiary"):
        for other in models.keys() - {"base", role}:
            swapped = {"base": models[role], "one": models["base"], "two": models[other]}
            found = told(merged("task_arithmetic", swapped, tmp_path / "out", lam=0.3, overwrite=True))
            assert "are base and model1 exchanged" in found, (role, other)


@pytest.mark.parametrize("method", BASED)
def test_a_base_that_is_no_ancestor_is_told(shared_triple: Triple, method: str, tmp_path: Path) -> None:
    stranger = rewritten(shared_triple["base"], tmp_path / "stranger", random_like(1))
    found = told(merged(method, {**shared_triple, "base": stranger}, tmp_path / "out"))
    assert re.search("hardly trained from this base", found), found
    assert "exchanged" not in found


def test_a_fine_tune_of_another_base_is_told(shared_triple: Triple, tmp_path: Path) -> None:
    stranger = rewritten(shared_triple["secondary"], tmp_path / "stranger", random_like(2))
    found = told(merged("ties", {**shared_triple, "secondary": stranger}, tmp_path / "out", density=0.5))
    assert found.startswith("model2 was hardly trained from this base"), found


def test_base_given_as_a_model_is_told_as_that(shared_triple: Triple, tmp_path: Path) -> None:
    found = told(merged("ties", {**shared_triple, "secondary": shared_triple["base"]}, tmp_path / "out"))
    assert found.startswith("base and model2 are equal on all"), found
    assert "really a fine-tune, and of this base?" in found and " | " not in found


def test_a_merger_and_an_inspection_tell_it_too(shared_triple: Triple) -> None:
    swapped = {**shared_triple, "base": shared_triple["primary"], "primary": shared_triple["base"]}
    base, *models = swapped.values()
    with pytest.warns(hsa.HsaWarning, match="are base and model1 exchanged"):
        hsa.Merger(method="ties", base=base, models=models)
    inspection = hsa.inspect(method="ties", base=base, models=models)
    assert any("are base and model1 exchanged" in warning for warning in inspection.warnings)


def test_strict_makes_it_an_error(shared_triple: Triple, tmp_path: Path) -> None:
    swapped = {**shared_triple, "base": shared_triple["primary"], "primary": shared_triple["base"]}
    with pytest.raises(hsa.StrictError, match="are base and model1 exchanged"):
        merged("task_arithmetic", swapped, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()


# --- merges that change next to nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("method", "settings", "nearest"),
    [
        ("task_arithmetic", {"lam": 0}, "base"),
        ("task_arithmetic", {"weights": [0, 1]}, "model2"),
        ("ties", {"lam": 1e-6}, "base"),
        ("tsv_m", {"lam": 0}, "base"),
        ("slerp", {"t": 0}, "base"),
        ("slerp", {"t": 1}, "model1"),
        ("dare_linear", {"density": 0}, "base"),
    ],
    ids=str,
)
def test_a_merge_that_changes_next_to_nothing_is_told(
    shared_triple: Triple, method: str, settings: dict[str, Any], nearest: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Whatever the output is rounded to, which moves it by more than that."""
    name = str(dtype).removeprefix("torch.")
    report = merged(method, shared_triple, tmp_path / "out", dtype=name, **settings)
    assert re.search(f"changes next to nothing: the output differs from {nearest} by 0", told(report)), told(report)


@pytest.mark.parametrize("lam", [0.001, 1.0])
def test_a_merge_that_changes_a_little_is_not_warned_of(shared_triple: Triple, lam: float, tmp_path: Path) -> None:
    assert lam > 5 * NO_CHANGE
    assert told(merged("task_arithmetic", shared_triple, tmp_path / "out", lam=lam)) == ""


def test_without_a_base_the_first_model_is_the_measure(shared_triple: Triple, tmp_path: Path) -> None:
    _, *models = shared_triple.values()

    def linear(*weights: float) -> hsa.MergeReport:
        return hsa.merge(
            method="linear", models=models, weights=weights, output=tmp_path / "out", overwrite=True, sync=False
        )

    assert "changes next to nothing: the output differs from model2 by 0" in told(linear(0, 1))
    assert "changes next to nothing: the output differs from model1 by 0" in told(linear(1, 0))
    report = linear(1, 1)
    assert told(report) == ""
    assert re.search(r"; the output differs from model1 by [0-9.]+ % of its norm", report.extent.text)


# --- how far the output moved ----------------------------------------------------------------------------------------


def sample_of(tensor: Tensor) -> Tensor:
    """The elements of a tensor that count, by their places."""
    places = torch.arange(tensor.numel())
    whole = tensor.numel() // UNIT * UNIT if tensor.numel() >= UNIT else tensor.numel()
    return tensor.flatten()[(places // UNIT % STRIDE < RUNS) & (places < whole)].double()


@pytest.fixture(scope="module")
def larger(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Triple:
    """The triple with embeddings of 1100 runs of elements and a part, in three element types."""
    folder = tmp_path_factory.mktemp("larger")
    generator = torch.Generator().manual_seed(5)
    common = torch.randn((1100 * UNIT + 64 * 5) // 64, 64, generator=generator)

    def change(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            step = torch.randn(common.shape, generator=generator) * 0.05
            held = {**tensors, "model.decoder.embed_tokens.weight": common + step}
            return {name: tensor.to(dtype) for name, tensor in held.items()}

        return changed

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    copies = {}
    for dtype, (role, path) in zip(dtypes, shared_triple.items(), strict=True):
        copies[role] = rewritten(path, folder / role, change(dtype))
        config = json.loads((copies[role] / "config.json").read_text()) | {"vocab_size": len(common)}
        (copies[role] / "config.json").write_text(json.dumps(config))
    return copies


def expected(sources: Triple, output: Path) -> dict[str, float]:
    """|output - B| / |B|, |output - M1| / |tv1| and the cosine of the task vectors, by the sample of each tensor."""
    base, first, second, out = (read_tensors(path) for path in (*sources.values(), output))
    sums = dict.fromkeys(("base", "moved", "first", "second", "product", "change"), 0.0)
    for name, tensor in out.items():
        b, m1, m2, o = (sample_of(each[name].float()) for each in (base, first, second, out))
        weight = tensor.numel() / len(b)
        pairs = {
            "base": (b, b), "moved": (o - b, o - b), "first": (m1 - b, m1 - b), "second": (m2 - b, m2 - b),
            "product": (m1 - b, m2 - b), "change": (o - m1, o - m1),
        }  # fmt: skip
        for key, (one, two) in pairs.items():
            sums[key] += weight * float(one @ two)
    return {
        "moved": math.sqrt(sums["moved"] / sums["base"]),
        "change": math.sqrt(sums["change"] / sums["first"]),
        "cosine": sums["product"] / math.sqrt(sums["first"] * sums["second"]),
        "size": math.sqrt(sums["first"] / sums["base"]),
    }


@pytest.mark.parametrize("whole", [1 << 30, 40 << 10], ids=["whole", "slices"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "model_stock", "tsv_m"])
def test_the_report_says_how_far_the_output_moved(
    larger: Triple, method: str, whole: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_layout, "MAX_WHOLE", whole)
    monkeypatch.setattr(streamed, "KEPT_BYTES", 0)
    report = merged(method, larger, tmp_path / "out", dtype="float32", threads=3)
    known, said = expected(larger, tmp_path / "out"), report.as_dict()
    assert said["moved"] == pytest.approx(known["moved"], rel=1e-6)
    assert said["change"] == pytest.approx(known["change"], rel=1e-6)
    assert said["task_vectors"]["model1"] == pytest.approx(known["size"], rel=1e-9)
    assert said["cosines"] == {"model1, model2": pytest.approx(known["cosine"], rel=1e-9)}
    assert said["sampled"] is True
    again = merged(method, larger, tmp_path / "again", dtype="float32", threads=1)
    assert again.as_dict()["moved"] == pytest.approx(said["moved"], rel=1e-13)


def test_the_command_line_says_it_once(shared_triple: Triple, tmp_path: Path) -> None:
    base, *models = (str(path) for path in shared_triple.values())
    arguments = ("merge", "--method=task_arithmetic", "--lambda=0.5", f"--base={base}")
    done = run_hsa(*arguments, *(f"--model={path}" for path in models), f"--output={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"  \d+ tensors merged \((rewrite|patch) route, backend cpu\)", lines[1])
    assert re.match(
        r"  the output differs from base by [0-9.]+ % of base's norm, and from model1 by [0-9.]+ % of its task vector",
        lines[2],
    )
    assert done.stdout.count("tensors merged") == 1


def test_a_merge_of_equal_models_says_that_all_was_copied(shared_triple: Triple, tmp_path: Path) -> None:
    base = str(shared_triple["base"])
    done = run_hsa(
        "merge", "--method=task_arithmetic", f"--base={base}", f"--model={base}", f"--output={tmp_path / 'out'}"
    )
    count = len(read_tensors(tmp_path / "out"))
    lines = done.stdout.splitlines()
    assert lines[1].startswith(f"  0 of {count} tensors merged (")
    assert lines[2] == "  all are equal in all sources and were copied"
