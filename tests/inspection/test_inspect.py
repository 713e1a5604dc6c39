"""`hsa.inspect`: the numbers against plain torch, a finished output, memory, refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forger import forge
from helpers import edit_json, merge_arguments, read_tensors, run_hsa, snapshot, write_adapter, write_tensors
from peak_memory import with_peak

import hsa
from hsa import reference
from hsa.inspection import heads
from hsa.inspection.measure import Buffers
from hsa.methods.hsa_formula import keep_count, layer_coefficient
from hsa.outputs import provenance
from hsa.system.manifest import PROVENANCE
from hsa.views import csv_file

Triple = dict[str, Path]


def load(triple: Triple) -> dict[str, dict[str, torch.Tensor]]:
    return {role: read_tensors(path) for role, path in triple.items()}


def heads_of(tensor: torch.Tensor, heads: int, axis: int) -> torch.Tensor:
    rows = tensor.movedim(axis, 0)
    return rows.reshape(heads, -1, *rows.shape[1:]).flatten(1)


# --- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["encoder-qkv", "attention-qkv", "attention-all"])
def test_scores_and_selection_are_those_of_the_merge(mixed: Triple, targets: Any, tmp_path: Path) -> None:
    report = hsa.merge(**mixed, output=tmp_path / "out", k=0.5, lam=0.3, alpha=0.7, targets=targets, sync=False)
    found = hsa.inspect(**mixed, k=0.5, lam=0.3, alpha=0.7, targets=targets, energy=False)
    assert found.tensors.keys() == report.tensors.keys()
    for name, tensor in found.tensors.items():
        other = report.tensors[name]
        assert (tensor.scores, tensor.selected, tensor.margin) == (other.scores, other.selected, other.margin)
        assert (tensor.keep, tensor.coefficient, tensor.heads) == (other.keep, other.coefficient, other.heads)
        assert tensor.squared is not None
        assert tuple(map(math.sqrt, tensor.squared)) == tensor.scores
    assert (found.selected_heads, found.total_heads) == (report.selected_heads, report.total_heads)
    tied = found.tensors["model.encoder.layers.0.self_attn.q_proj.weight"]
    assert tied.scores[1] == tied.scores[2]
    assert tied.ranks[1] == tied.ranks[2]


@pytest.mark.parametrize("targets", ["encoder-qkv", "attention-all"])
def test_geometry_and_energy_are_those_of_float64(mixed: Triple, targets: Any) -> None:
    found = hsa.inspect(**mixed, targets=targets)
    tensors = load(mixed)
    inside = {"primary": 0.0, "secondary": 0.0}
    chosen = {"primary": 0.0, "secondary": 0.0}
    for name, tensor in found.tensors.items():
        b, m1, m2 = (tensors[role][name].double() for role in ("base", "primary", "secondary"))
        tv1, tv2, b = (heads_of(t, 4, tensor.projection.head_axis) for t in (m1 - b, m2 - b, b))
        geometry = tensor.geometry
        assert geometry is not None
        for ours, theirs in ((geometry.base, b), (geometry.primary, tv1), (geometry.secondary, tv2)):
            assert ours == pytest.approx(theirs.pow(2).sum(1).tolist(), rel=1e-13)
        norms = (tv1.norm(dim=1) * tv2.norm(dim=1)).tolist()
        dots = (tv1 * tv2).sum(1).tolist()
        for head, (cosine, dot, norm) in enumerate(zip(geometry.cosines, dots, norms, strict=True)):
            if norm == 0:
                assert cosine is None
            else:
                assert cosine == pytest.approx(dot / norm, abs=1e-13)
            assert geometry.relative_primary[head] == pytest.approx(float(tv1[head].norm() / b[head].norm()), rel=1e-13)
        for role, tv in (("primary", tv1), ("secondary", tv2)):
            inside[role] += float(tv.pow(2).sum())
            chosen[role] += float(tv[list(tensor.selected)].pow(2).sum())
    assert found.energy is not None
    for energy in found.energy:
        base, fine = tensors["base"], tensors[energy.role]
        total = sum(float((fine[name].double() - base[name].double()).pow(2).sum()) for name in base)
        assert energy.total == pytest.approx(total, rel=1e-12)
        assert energy.inside == pytest.approx(inside[energy.role], rel=1e-12)
        assert energy.selected == pytest.approx(chosen[energy.role], rel=1e-12)
        assert sum(energy.groups.values()) == pytest.approx(total, rel=1e-12)
        fed = sum(
            float((fine[n].double() - base[n].double()).pow(2).sum()) for n in base if "encoder" in n and ".fc" in n
        )
        assert energy.groups["encoder feed-forward"] == pytest.approx(fed, rel=1e-12)
        assert not any(name.endswith("other") for name in energy.groups)
        assert energy.skipped == ()
    still = found.tensors["model.encoder.layers.1.self_attn.v_proj.weight"].geometry
    assert still is not None
    assert [cosine is None for cosine in still.cosines] == [True, False, False, False]


@pytest.mark.parametrize("k", [0.0, 0.01, 0.3, 0.375, 0.5, 0.625, 0.99, 1.0, 2.0, 60, 62.5, 100])
def test_the_selection_at_any_k_is_the_oracles(mixed: Triple, k: float) -> None:
    found = hsa.inspect(**mixed, k=k, energy=False)
    for tensor in found.tensors.values():
        squared = torch.tensor(tensor.squared, dtype=torch.float64)
        expected = reference.select_heads(squared, k).nonzero().flatten().tolist()
        assert list(tensor.selected) == expected
        assert tensor.margin == (reference.margin(squared, k) if expected else None)


def test_parameters_per_tensor(shared_triple: Triple) -> None:
    names = list(hsa.inspect(**shared_triple, energy=False).tensors)
    ks = {name: 0.25 * (number % 5) for number, name in enumerate(names)}
    found = hsa.inspect(**shared_triple, k=ks, lam=dict.fromkeys(names, 0.1), energy=False)
    for name, tensor in found.tensors.items():
        assert (tensor.k, len(tensor.selected)) == (ks[name], keep_count(ks[name], 4))
        assert tensor.coefficient == layer_coefficient(0.1, 0.2, tensor.projection.layer, 2)
    assert json.loads(json.dumps(found.as_dict()))["parameters"]["k"] == ks


def test_agreement_within_a_layer(shared_triple: Triple) -> None:
    found = hsa.inspect(**shared_triple, k=0.5, targets="attention-all", energy=False)
    assert len(found.agreement) == 2 * 3 * 2  # layers, blocks, weights and biases
    for each in found.agreement:
        names = [
            f"model.{each.stack}.layers.{each.layer}.{each.block}.{kind}_proj.{each.part}"
            for kind in ("qkv" if each.part == "weight" else "qv")
        ]
        sets = [set(found.tensors[name].selected) for name in names]
        common, union = set.intersection(*sets), set.union(*sets)
        assert set(each.common) == common
        assert each.jaccard == len(common) / len(union)
        assert each.pairs["qv"] == len(sets[0] & sets[-1]) / len(sets[0] | sets[-1])
        assert each.expected_common == 4 * math.prod(len(chosen) / 4 for chosen in sets)
    nothing = hsa.inspect(**shared_triple, k=0, energy=False)
    assert {each.jaccard for each in nothing.agreement} == {None}


def test_what_cannot_be_subtracted_is_left_out_and_named(triple: Triple) -> None:
    primary = read_tensors(triple["primary"])
    primary["model.decoder.embed_positions.weight"] = torch.zeros(7, 64)
    primary["model.encoder.layers.0.fc1.bias"][3] = float("nan")
    primary["model.extra.counter"] = torch.ones(3, dtype=torch.int64)
    write_tensors(triple["primary"], primary)
    first, second = hsa.inspect(**triple).energy or ()
    assert sorted(first.skipped) == ["decoder.embed_positions.weight", "encoder.layers.0.fc1.bias", "extra.counter"]
    assert second.skipped == ()
    assert math.isfinite(first.total)
    assert json.loads(json.dumps(first.as_dict(), allow_nan=False))["skipped"] == list(first.skipped)


def test_nan_in_a_target_is_refused_by_name(triple: Triple) -> None:
    secondary = read_tensors(triple["secondary"])
    secondary["model.encoder.layers.1.self_attn.k_proj.weight"][17, 3] = float("inf")
    write_tensors(triple["secondary"], secondary)
    with pytest.raises(hsa.NonFiniteError, match=r"secondary .*layers\.1\.self_attn\.k_proj\.weight, head 1 holds NaN"):
        hsa.inspect(**triple)


def test_an_adapter_as_primary(shared_triple: Triple, tmp_path: Path) -> None:
    base = read_tensors(shared_triple["base"])
    adapted = {name: base[name] for name in base if name.endswith(("q_proj.weight", "v_proj.weight"))}
    write_adapter(tmp_path / "adapter", adapted)
    triple = {**shared_triple, "primary": tmp_path / "adapter"}
    report = hsa.merge(**triple, output=tmp_path / "out", sync=False)
    found = hsa.inspect(**triple)
    assert {n: t.selected for n, t in found.tensors.items()} == {n: t.selected for n, t in report.tensors.items()}
    assert found.energy is not None
    groups = {name for name, energy in found.energy[0].groups.items() if energy}
    assert groups == {
        f"{s} q, k, v" for s in ("encoder self-attention", "decoder self-attention", "decoder cross-attention")
    }


# --- a finished output --------------------------------------------------------------------------------------------


def test_an_output_alone_says_what_its_provenance_says(merged: Path, shared_triple: Triple, tmp_path: Path) -> None:
    alone = tmp_path / "copied"
    alone.mkdir()
    shutil.copy(merged / PROVENANCE, alone)  # neither weights nor sources
    found = hsa.inspect(alone)
    record = provenance.load(merged).record
    assert {t.name: (t.selected, t.scores, t.margin, t.keep, t.coefficient) for t in record.targets} == {
        name: (t.selected, t.scores, t.margin, t.keep, t.coefficient) for name, t in found.tensors.items()
    }
    assert found.sources["primary"]["targets_blake3"] == record.sources["primary"].targets
    assert found.parameters == record.parameters
    assert found.bytes_read == (alone / PROVENANCE).stat().st_size
    assert found.energy is None
    assert all(tensor.geometry is None for tensor in found.tensors.values())
    assert any("need the sources" in note for note in found.notes)
    assert not found.warnings
    fresh = hsa.inspect(**shared_triple, energy=False)
    other = hsa.inspect(alone, k=0.2, lam=0.1, alpha=1)
    again = hsa.inspect(**shared_triple, k=0.2, lam=0.1, alpha=1, energy=False)
    for name, tensor in found.tensors.items():
        assert tensor.layers == fresh.tensors[name].layers
        assert other.tensors[name].selected == again.tensors[name].selected
        assert other.tensors[name].coefficient == again.tensors[name].coefficient
        assert other.tensors[name].margin == pytest.approx(again.tensors[name].margin, rel=1e-9)
        assert other.tensors[name].recorded == heads.RecordedSelection(tensor.keep, tensor.selected)
    same = hsa.inspect(alone, k=60)
    assert {n: t.selected for n, t in same.tensors.items()} == {n: t.selected for n, t in found.tensors.items()}


def test_an_output_with_its_sources(merged: Path, shared_triple: Triple) -> None:
    both, alone, sources = hsa.inspect(merged, **shared_triple), hsa.inspect(merged), hsa.inspect(**shared_triple)
    assert both.origin == "output and sources"
    assert both.energy == sources.energy
    assert not both.warnings
    for name, tensor in both.tensors.items():
        assert tensor.scores == alone.tensors[name].scores
        assert tensor.geometry == sources.tensors[name].geometry
        assert tensor.squared == sources.tensors[name].squared
    swapped = {**shared_triple, "secondary": shared_triple["base"]}
    with pytest.raises(hsa.MismatchError, match="secondary: its target tensors are not those that"):
        hsa.inspect(merged, **swapped)


def test_an_output_in_reference_numerics_keeps_its_own_choice(shared_triple: Triple, tmp_path: Path) -> None:
    report = hsa.merge(**shared_triple, output=tmp_path / "out", numerics="reference", sync=False)
    for found in (hsa.inspect(tmp_path / "out"), hsa.inspect(tmp_path / "out", **shared_triple)):
        assert found.numerics == "reference"
        for name, tensor in found.tensors.items():
            assert (tensor.selected, tensor.scores) == (report.tensors[name].selected, report.tensors[name].scores)
            assert tensor.squared is None


NAME = "model.encoder.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": {}}, "records no merged tensor"),
        ({f"targets__{NAME}__decision__keep": 5}, "4 heads of which 5"),
        ({f"targets__{NAME}__groups": 0}, "no 0 groups"),
        ({"parameters__k": "much"}, "k must be a number"),
        ({"parameters__k": {"x": 0.5}}, "k is given per tensor but has no value"),
        ({"parameters__num_layers": [1]}, "num_layers"),
        ({"parameters": {}}, "'k' is missing"),
    ],
)
def test_a_forged_provenance_is_refused(changes: dict[str, Any], message: str, merged: Path, tmp_path: Path) -> None:
    shutil.copy(merged / PROVENANCE, tmp_path)
    forge(tmp_path, **changes)
    with pytest.raises(hsa.ProvenanceError, match=message) as caught:
        hsa.inspect(tmp_path)
    assert PROVENANCE in str(caught.value)


def test_a_record_that_does_not_follow_from_its_parameters_is_warned_of(merged: Path, tmp_path: Path) -> None:
    shutil.copy(merged / PROVENANCE, tmp_path)
    forge(tmp_path, **{f"targets__{NAME}__decision__lambda_i": 0.25})
    (warning,) = hsa.inspect(tmp_path).warnings
    assert NAME in warning
    assert "0.25" in warning


def test_a_damaged_provenance_is_refused(merged: Path, tmp_path: Path) -> None:
    text = (merged / PROVENANCE).read_bytes()
    (tmp_path / PROVENANCE).write_bytes(text.replace(b'"k": 0.6', b'"k": 0.7'))
    with pytest.raises(hsa.ProvenanceError, match="digest"):
        hsa.inspect(tmp_path)


# --- work and memory ----------------------------------------------------------------------------------------------


def test_each_byte_is_read_once(shared_triple: Triple) -> None:
    tensors = load(shared_triple)["base"]
    found, targets_alone = hsa.inspect(**shared_triple), hsa.inspect(**shared_triple, energy=False)
    inside = sum(tensors[name].nbytes for name in found.tensors)
    outside = sum(tensor.nbytes for name, tensor in tensors.items() if name not in found.tensors)
    assert found.bytes_read - targets_alone.bytes_read == 3 * outside
    small = sum(
        (path / "config.json").stat().st_size
        + 8
        + int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little")
        for path in shared_triple.values()
    )
    assert small <= targets_alone.bytes_read - 3 * inside <= small + 3 * 8


def test_memory_holds_one_target_and_slices(triple: Triple, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in triple.values():
        tensors = read_tensors(path)
        tensors["model.decoder.embed_extra.weight"] = torch.ones(12_000_000)
        write_tensors(path, tensors)
    held = []

    class Watched(Buffers):
        def take(self, key: str, nbytes: int) -> Any:
            taken = super().take(key, nbytes)
            held.append(self.nbytes)
            return taken

    monkeypatch.setattr(heads, "Buffers", Watched)
    done: list[tuple[int, int]] = []
    hsa.inspect(**triple)  # imports and caches
    bound = 24 << 20  # of 144 MB in three tensors

    def inspect() -> Any:
        done.clear()
        return hsa.inspect(**triple, progress=lambda *step: done.append(step))

    found, peak = with_peak(inspect, bound)
    assert max(held) == 3 * (1 << 18) * 4  # a slice of each source
    assert peak < bound
    assert found.bytes_read > 144_000_000
    assert done[-1][0] == done[-1][1]
    assert [step for step, _ in done] == sorted(step for step, _ in done)


def test_sources_are_left_alone(shared_triple: Triple, merged: Path) -> None:
    before = [snapshot(path) for path in (*shared_triple.values(), merged)]
    hsa.inspect(merged, **shared_triple)
    assert [snapshot(path) for path in (*shared_triple.values(), merged)] == before


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to inspect"),
        (["--base={base}"], "--primary and --secondary not given"),
        (["{out}", "--targets=attention-all"], "are recorded in an output"),
        (["{out}", "--k=101"], "k must be in [0, 100]"),
        (["{base}"], "holds no hsa_merge.json"),
        (["{out}", "--csv={out}/view.csv"], "which is not written to"),
        (["{out}", "--csv={tmp}/missing/view.csv"], "is missing; make it"),
        (["{out}", "--csv={tmp}"], "is a directory"),
        (["{out}", "--csv={tmp}/one", "--html={tmp}/one"], "name one file"),
        (["--diff", "{out}", "{out}", "--csv={tmp}/a.csv"], "goes with --json alone, not with --csv"),
        (["--diff", "{out}", "{base}"], "holds no hsa_merge.json"),
    ],
)
def test_bad_requests(arguments: list[str], message: str, shared_triple: Triple, merged: Path, tmp_path: Path) -> None:
    names = {"base": shared_triple["base"], "out": merged, "tmp": tmp_path}
    done = run_hsa("inspect", *(argument.format(**names) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_view_in_another_output_is_refused(merged: Path, shared_triple: Triple) -> None:
    sources = [f"--{role}={path}" for role, path in shared_triple.items()]
    done = run_hsa("inspect", *sources, f"--csv={merged}/view.csv")
    assert done.returncode == 2
    assert "is an earlier output of hsa, which lists its files" in done.stderr
    assert not (merged / "view.csv").exists()


def test_heads_that_differ_between_stacks(shared_triple: Triple, tmp_path: Path) -> None:
    """Eight heads in the decoder, four in the encoder: every view draws both."""
    triple = {role: Path(shutil.copytree(path, tmp_path / role)) for role, path in shared_triple.items()}
    for path in triple.values():
        edit_json(path / "config.json", decoder_attention_heads=8)
    found = hsa.inspect(**triple, targets="attention-all")
    assert {(t.projection.stack, t.heads) for t in found.tensors.values()} == {("encoder", 4), ("decoder", 8)}
    assert len(csv_file.render(found).splitlines()) == found.total_heads + 1
    done = run_hsa("inspect", *(f"--{r}={p}" for r, p in triple.items()), "--targets=attention-all", "--no-energy")
    assert done.returncode == 0, done.stderr
    assert "decoder, encoder_attn" in done.stdout


# --- the real triple ----------------------------------------------------------------------------------------------


def test_the_real_triple(real: Triple, tmp_path: Path) -> None:
    done = run_hsa(*merge_arguments(real, tmp_path / "out", "--no-sync", "--quiet"))
    assert done.returncode == 0, done.stderr
    found, alone = hsa.inspect(**real), hsa.inspect(tmp_path / "out")
    for name, tensor in found.tensors.items():
        assert (tensor.selected, tensor.scores) == (alone.tensors[name].selected, alone.tensors[name].scores)
        assert tensor.geometry is not None
        assert all(cosine is None or -1 <= cosine <= 1 for cosine in tensor.geometry.cosines)
    assert found.energy is not None
    for energy in found.energy:
        assert 0 < energy.selected < energy.inside < energy.total
        assert not any(name.endswith("other") for name in energy.groups)
