"""`hsa.inspect` and `hsa inspect`: the numbers against plain torch, every format read back, hostile names, memory."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import struct
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forger import HOSTILE, forge
from helpers import edit_json, merge_arguments, read_tensors, run_hsa, snapshot, write_adapter, write_tensors

import hsa
from hsa import reference
from hsa.inspection import inspect
from hsa.inspection.inspect import Inspection
from hsa.inspection.measure import Buffers
from hsa.methods.config import keep_count, layer_coefficient
from hsa.outputs import provenance
from hsa.system.manifest import PROVENANCE
from hsa.views import csv_file, page, picture, table

Triple = dict[str, Path]


@pytest.fixture(scope="module")
def merged(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "out"
    hsa.merge(**shared_triple, output=output, sync=False)
    return output


@pytest.fixture
def mixed(triple: Triple) -> Triple:
    """Element types that differ, two heads that tie exactly, and one head in which secondary did not move."""
    base, primary, secondary = (read_tensors(triple[role]) for role in ("base", "primary", "secondary"))
    name = "model.encoder.layers.0.self_attn.q_proj.weight"
    for tensors in (base, primary, secondary):
        tensors[name][32:48] = tensors[name][16:32]
    still = "model.encoder.layers.1.self_attn.v_proj.weight"
    secondary[still][:16] = base[still][:16]
    write_tensors(triple["base"], {n: t.half() for n, t in base.items()})
    write_tensors(triple["primary"], primary, shards=3)
    write_tensors(triple["secondary"], {n: t.bfloat16() for n, t in secondary.items()})
    base = read_tensors(triple["base"])
    moved = {n: t.float() for n, t in read_tensors(triple["secondary"]).items()}
    moved[still][:16] = base[still][:16].float()
    write_tensors(triple["secondary"], moved)
    return triple


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


def test_a_fine_tune_that_is_base_is_warned_of(shared_triple: Triple) -> None:
    found = hsa.inspect(base=shared_triple["base"], primary=shared_triple["primary"], secondary=shared_triple["base"])
    assert any("base and secondary are equal" in warning for warning in found.warnings)
    assert found.energy is not None
    assert (found.energy[1].total, found.energy[1].share(found.energy[1].inside)) == (0.0, None)
    assert found.energy[0].share(found.energy[0].total) == 1.0


def warned(sources: Triple, output: Path | None = None, **parameters: Any) -> list[str]:
    """The warnings of an inspection."""
    return list(hsa.inspect(output, **sources, energy=False, **parameters).warnings)


@pytest.fixture(params=["made-up", "real"])
def sound(request: pytest.FixtureRequest, shared_triple: Triple) -> Triple:
    """A made-up triple, and the real one where there is one."""
    return shared_triple if request.param == "made-up" else dict(request.getfixturevalue("real"))


def as_merged(sources: Triple, output: Path, **parameters: Any) -> list[str]:
    """What a merge of the same sources says of their values, without what it says of the names on the card."""
    report = hsa.merge(**sources, output=output, sync=False, **parameters)
    return [text for text in report.warnings if "the card calls" not in text]


@pytest.mark.parametrize("other", ["primary", "secondary"])
def test_inspect_warns_of_a_base_exchanged_with_a_fine_tune(sound: Triple, other: str, tmp_path: Path) -> None:
    swapped = {**sound, "base": sound[other], other: sound["base"]}
    found = warned(swapped)
    assert any(f"are base and {other} exchanged" in text for text in found), found
    assert [text[:20] for text in found] == [text[:20] for text in as_merged(swapped, tmp_path / "out")]
    assert any("exchanged" in text for text in warned(swapped, tmp_path / "out"))


@pytest.mark.parametrize(("one", "two"), [("base", "primary"), ("base", "secondary"), ("secondary", "primary")])
def test_inspect_warns_of_a_model_given_twice(sound: Triple, one: str, two: str) -> None:
    (found,) = [text for text in warned({**sound, one: sound[two]}) if "equal on all" in text]
    assert one in found
    assert two in found


def test_inspect_warns_of_a_model_given_twice_in_another_element_type(triple: Triple) -> None:
    write_tensors(triple["secondary"], {name: t.half() for name, t in read_tensors(triple["primary"]).items()})
    assert any("primary and secondary are equal on all" in text for text in warned(triple))


def test_inspect_warns_of_sources_that_were_not_trained_from_base(triple: Triple) -> None:
    torch.manual_seed(3)
    write_tensors(triple["base"], {name: torch.randn(t.shape) for name, t in read_tensors(triple["base"]).items()})
    assert any("primary and secondary were hardly trained from this base" in text for text in warned(triple))


@pytest.mark.parametrize("parameters", [{"k": 0}, {"lam": 1}, {"alpha": 0}], ids=str)
def test_inspect_warns_of_parameters_that_change_next_to_nothing(
    shared_triple: Triple, merged: Path, parameters: dict[str, float]
) -> None:
    for output in (None, merged):
        assert any("the merge changes next to nothing" in text for text in warned(shared_triple, output, **parameters))


BREAKAGES: dict[str, dict[str, int]] = {
    "vocab_size off by one": {"vocab_size": 1},
    "a decoder layer too many": {"decoder_layers": 1},
    "max_target_positions off by two": {"max_target_positions": -2},
}


@pytest.mark.parametrize("sizes", BREAKAGES.values(), ids=BREAKAGES)
def test_inspect_warns_of_a_primary_that_a_merge_refuses(triple: Triple, sizes: dict[str, int], tmp_path: Path) -> None:
    config = triple["primary"] / "config.json"
    before = json.loads(config.read_text(encoding="utf-8"))
    hsa.merge(**triple, output=tmp_path / "out", sync=False)
    edit_json(config, **{key: before[key] + more for key, more in sizes.items()})
    with pytest.raises(hsa.MismatchError) as refused:
        hsa.merge(**triple, output=tmp_path / "other", sync=False)
    expected = [f"a merge would refuse these sources: {refused.value}"]
    assert next(iter(sizes)) in expected[0]
    assert warned(triple) == expected
    assert warned(triple, tmp_path / "out") == expected


def test_inspect_says_nothing_of_sound_sources(sound: Triple, tmp_path: Path) -> None:
    assert warned(sound) == []
    hsa.merge(**sound, output=tmp_path / "out", sync=False)
    assert warned(sound, tmp_path / "out") == []


def test_the_command_shows_the_warnings_of_a_merge(triple: Triple) -> None:
    swapped = {**triple, "base": triple["primary"], "primary": triple["base"]}
    edit_json(swapped["primary"] / "config.json", vocab_size=5)
    done = run_hsa("inspect", *(f"--{role}={path}" for role, path in swapped.items()), "--no-energy", "--json")
    assert done.returncode == 0, done.stderr
    refusal, exchanged = done.stderr.splitlines()
    assert refusal.startswith("hsa: warning: a merge would refuse these sources: primary ")
    assert "vocab_size 5" in refusal
    assert exchanged.startswith("hsa: warning: secondary is nearer to primary than to base")
    assert [f"hsa: warning: {text}" for text in json.loads(done.stdout)["warnings"]] == [refusal, exchanged]


def test_every_format_shows_sources_that_a_merge_would_warn_of(triple: Triple) -> None:
    swapped = {**triple, "base": triple["primary"], "primary": triple["base"]}
    edit_json(swapped["primary"] / "config.json", vocab_size=5)
    found = hsa.inspect(**swapped)
    assert len(found.warnings) == 2
    assert json.loads(json.dumps(found.as_dict()))["warnings"] == list(found.warnings)
    assert len(csv_file.render(found).splitlines()) == found.total_heads + 1
    assert page.render(found).count(b"exchanged") >= 1
    assert max(map(len, table.render(found).splitlines())) <= 80


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
        assert other.tensors[name].recorded == inspect.RecordedSelection(tensor.keep, tensor.selected)
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
        ({f"targets__{NAME}__keep": 5}, "4 heads of which 5"),
        ({f"targets__{NAME}__heads": 0, f"targets__{NAME}__scores": [], f"targets__{NAME}__selected": []}, "0 heads"),
        ({"parameters__k": "much"}, "k must be a number"),
        ({"parameters__k": {"x": 0.5}}, "k is given per tensor but has no value"),
        ({"parameters__num_layers": [1]}, "num_layers"),
        ({"parameters": {}}, "parameter 'k' is missing"),
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
    forge(tmp_path, **{f"targets__{NAME}__lambda_i": 0.25})
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

    monkeypatch.setattr(inspect, "Buffers", Watched)
    done: list[tuple[int, int]] = []
    hsa.inspect(**triple)  # imports and caches
    tracemalloc.start()
    try:
        found = hsa.inspect(**triple, progress=lambda *step: done.append(step))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(held) == 3 * (1 << 18) * 4  # a slice of each source
    assert peak < 24 << 20  # of 144 MB in three tensors
    assert found.bytes_read > 144_000_000
    assert done[-1][0] == done[-1][1]
    assert [step for step, _ in done] == sorted(step for step, _ in done)


def test_sources_are_left_alone(shared_triple: Triple, merged: Path) -> None:
    before = [snapshot(path) for path in (*shared_triple.values(), merged)]
    hsa.inspect(merged, **shared_triple)
    assert [snapshot(path) for path in (*shared_triple.values(), merged)] == before


# --- formats ------------------------------------------------------------------------------------------------------


def test_csv_reads_back(mixed: Triple) -> None:
    found = hsa.inspect(**mixed, targets="attention-all", energy=False)
    rows = list(csv.DictReader(io.StringIO(csv_file.render(found).decode("utf-8"))))
    assert len(rows) == found.total_heads
    for row in rows:
        tensor, head = found.tensors[row["tensor"]], int(row["head"])
        assert tensor.squared is not None
        assert tensor.geometry is not None
        assert float(row["score"]) == tensor.scores[head]
        assert float(row["squared_score"]) == tensor.squared[head]
        assert row["selected"] == str(int(head in tensor.selected))
        assert float(row["lambda_i"]) == tensor.coefficient
        assert float(row["tv2_norm"]) == math.sqrt(tensor.geometry.secondary[head])
        cosine = tensor.geometry.cosines[head]
        assert row["cosine"] == ("" if cosine is None else repr(cosine))
        assert (row["stack"], int(row["layer"])) == (tensor.projection.stack, tensor.projection.layer)
    assert sum(row["cosine"] == "" for row in rows) == 1
    alone = next(csv.DictReader(io.StringIO(csv_file.render(hsa.inspect(**mixed, energy=False)).decode())))
    assert list(alone) == list(csv_file.COLUMNS)


def test_png_shows_the_maps(shared_triple: Triple) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws pictures")
    from matplotlib import image

    drawn = []
    for k in (0.0, 0.5):
        pages = picture.render(hsa.inspect(**shared_triple, k=k, energy=False))
        assert pages.keys() == {""}
        data = pages[""]
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert pages == picture.render(hsa.inspect(**shared_triple, k=k, energy=False))
        width, height = struct.unpack(">II", data[16:24])
        pixels = image.imread(io.BytesIO(data))
        assert pixels.shape[:2] == (height, width)
        assert width > 1000
        assert len({tuple(pixel) for pixel in (pixels[::7, ::7] * 255).astype(int).reshape(-1, 4).tolist()}) > 50
        drawn.append(pixels)
    assert drawn[0].shape == drawn[1].shape
    black = [(pixels[..., :3] < 0.02).all(-1).sum() for pixels in drawn]
    assert black[1] > black[0] + 10_000  # the frames of the heads merged


def test_a_picture_takes_any_title(merged: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws pictures")
    strange = tmp_path / "$x_{$ \\frac \u8a9e\U0001f600"
    strange.mkdir()
    shutil.copy(merged / PROVENANCE, strange)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture.render(hsa.inspect(strange))[""][:4] == b"\x89PNG"


def size_of(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def like_large_v3(found: Inspection) -> Inspection:
    """The inspection of a model with 32 layers of 20 heads, its numbers repeated from a small one's."""
    tensors = {}
    for small in found.tensors.values():
        if small.projection.layer:
            continue
        for layer in range(32):
            name = small.name.replace("layers.0.", f"layers.{layer}.")
            place = replace(
                small.projection, layer=layer, name=small.projection.name.replace("layers.0.", f"layers.{layer}.")
            )
            scores = tuple(small.scores[head % small.heads] for head in range(20))
            selected = tuple(head for head in range(20) if head % small.heads in small.selected)
            tensors[name] = replace(
                small,
                name=name,
                projection=place,
                heads=20,
                layers=32,
                scores=scores,
                squared=None,
                selected=selected,
                geometry=None,
            )
    return replace(found, tensors=tensors)


def test_pictures_of_a_large_model_are_pages_that_fit_a_screen(shared_triple: Triple, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws pictures")
    large = like_large_v3(hsa.inspect(**shared_triple, targets="attention-all", energy=False))
    pages = picture.render(large)
    assert pages.keys() == {"", "decoder-self_attn", "decoder-encoder_attn"}
    for png in pages.values():
        width, height = size_of(png)
        assert 1000 < width < 6000 and 1000 < height < 3000


def test_pages_are_written_beside_each_other_or_none(shared_triple: Triple, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed, which draws pictures")
    sources = [f"--{role}={path}" for role, path in shared_triple.items()]
    command = ["inspect", *sources, "--targets=attention-qkv", "--no-energy", f"--png={tmp_path / 'heads.png'}"]
    names = ["heads-decoder-encoder_attn.png", "heads-decoder-self_attn.png", "heads.png"]
    (tmp_path / names[0]).write_text("somebody's")
    refused = run_hsa(*command)
    assert refused.returncode == 2 and names[0] in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == names[:1]
    done = run_hsa(*command, "--overwrite", "--json")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert sorted(json.loads(done.stdout)["written"]["png"]) == sorted(str(tmp_path / name) for name in names)


def test_tables_fit_80_columns_and_break_neither_words_nor_rows_of_heads(shared_triple: Triple, merged: Path) -> None:
    small = hsa.inspect(**shared_triple, targets="attention-all")
    for found in (small, like_large_v3(small)):
        text = table.render(found)
        assert max(map(len, text.splitlines())) <= 80
        words = set(text.split())
        for tensor in found.tensors.values():
            row = "".join("#" if head in tensor.selected else "." for head in range(tensor.heads))
            assert row in words
        assert {"projection", "lambda_i", "margin", "merged", "chance", "Jaccard", "self_attn"} <= words
        wide = table.render(found, wide=True)
        assert {"least", "greatest"} <= set(wide.split())
        assert max(map(len, wide.splitlines())) > 80


def test_a_row_of_very_many_heads_is_shown_whole_or_not_at_all(shared_triple: Triple) -> None:
    found = hsa.inspect(**shared_triple, energy=False)
    many = replace(next(iter(found.tensors.values())), heads=200, selected=tuple(range(0, 200, 2)), scores=(1.0,) * 200)
    text = table.render(replace(found, tensors={many.name: many}))
    assert max(map(len, text.splitlines())) <= 80
    assert "see --wide" in text
    assert "#." * 100 in table.render(replace(found, tensors={many.name: many}), wide=True)


def test_every_format_from_the_command_line(shared_triple: Triple, merged: Path, tmp_path: Path) -> None:
    sources = [f"--{role}={path}" for role, path in shared_triple.items()]
    files = {name: tmp_path / f"view.{name}" for name in ("csv", "png", "html")}
    options = [f"--{name}={path}" for name, path in files.items()]
    done = run_hsa("inspect", *sources, *options, "--json", "--k=0.3")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document.pop("written") == {name: [str(path)] for name, path in files.items()}
    expected = hsa.inspect(**shared_triple, k=0.3)
    assert document == json.loads(json.dumps(expected.as_dict()))
    assert document["energy"]["primary"]["inside"] + document["energy"]["primary"]["elsewhere"] == pytest.approx(1)
    assert files["csv"].read_bytes() == csv_file.render(expected)
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    assert files["html"].read_bytes() == page.render(expected)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files.values()}
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {(tmp_path / "view.csv").stat().st_mode & 0o777}
    again = run_hsa("inspect", os_path(merged), options[0])
    assert (again.returncode, again.stdout) == (2, "")
    assert "exists; give another name, or --overwrite" in again.stderr
    replaced = run_hsa("inspect", os_path(merged), options[0], "--overwrite", "--quiet")
    assert (replaced.returncode, replaced.stdout) == (0, "")
    assert files["csv"].read_bytes() == csv_file.render(hsa.inspect(merged))


def os_path(path: Path) -> str:
    return str(path)


def test_the_table_of_an_output_answers_what_how_and_which(merged: Path) -> None:
    done = run_hsa("inspect", merged)
    assert done.returncode == 0, done.stderr
    record = provenance.load(merged).record
    for source in record.sources.values():
        assert source.identity.id in done.stdout
        assert source.targets[:16] in done.stdout
    assert "k 0.6, lambda 0.5, alpha 0.2, targets encoder-qkv, numerics exact" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    for target in record.targets:
        p = target.projection
        heads = "".join("#" if head in target.selected else "." for head in range(target.heads))
        (row,) = [line for line in lines if line[:3] == [str(p.layer), p.kind, p.part] and len(line) > 4]
        assert row[3] == heads
        assert row[6] == f"{target.coefficient:.4f}"
    assert "hsa: note: cosines" in done.stderr
    assert f"bytes: still what was written, {len(list(merged.iterdir()))} files read" in done.stdout


def test_one_command_says_whether_the_bytes_are_what_was_written(merged: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(merged, tmp_path / "out"))
    weights = output / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = run_hsa("inspect", output)
    assert done.returncode == 2
    assert "hsa: problem: model.safetensors: " in done.stderr
    assert "bytes: not what was written, 1 problem\n" in done.stdout
    document = json.loads(run_hsa("inspect", output, "--json").stdout)
    assert document["verification"]["ok"] is False
    assert [problem["file"] for problem in document["verification"]["problems"]] == ["model.safetensors"]
    quick = run_hsa("inspect", output, "--no-verify", "--json")
    assert quick.returncode == 0
    assert json.loads(quick.stdout) == json.loads(json.dumps(hsa.inspect(output).as_dict()))


def test_without_digests_the_verdict_claims_no_more_than_it_can(shared_triple: Triple, tmp_path: Path) -> None:
    hsa.merge(**shared_triple, output=tmp_path / "out", digest=False, sync=False)
    done = run_hsa("inspect", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "without digests no more can be told" in done.stdout
    assert "still what was written" not in done.stdout


def test_hostile_names_are_plain_text(merged: Path, tmp_path: Path) -> None:
    shutil.copy(merged / PROVENANCE, tmp_path)
    script = "</script><script>hit()</script><!-- @DATA@ " + HOSTILE
    forge(tmp_path, sources__base__id=script, parameters__card={"notes": HOSTILE})
    done = run_hsa("inspect", tmp_path, "--no-verify")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "[red]x[/red]\\x1b[31m<img src=x onerror=hit()>" in done.stdout
    html = page.render(hsa.inspect(tmp_path)).decode("utf-8")
    assert html.count("<script") == 2
    assert html.count("</script>") == 2
    assert "<img" not in html
    assert "<!-- @" not in html
    start = html.index('id="data">') + len('id="data">')
    held = json.loads(html[start : html.index("</script>", start)])
    assert held["sources"]["base"]["id"] == script
    assert held == json.loads(json.dumps(hsa.inspect(tmp_path).as_dict()))


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


def test_without_matplotlib_the_picture_is_refused_before_anything_is_read(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(hsa.RequestError, match=r'pip install "hsa-merge\[plot\]"'):
        picture.check_installed()


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
