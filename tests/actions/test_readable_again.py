"""What is written can be read again: names that are not UTF-8, and outputs as large as the limits of the readers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import merge_arguments, read_tensors, run_hsa, write_openai, write_pickle

import hsa
from hsa.actions.merge import Request, dry_run
from hsa.methods.hsa import HsaSettings
from hsa.outputs import patch_format, provenance
from hsa.outputs.patch_reader import SUFFIX
from hsa.outputs.report import PlanReport
from hsa.releases import index
from hsa.releases.index import Row
from hsa.releases.plan import plan_release
from hsa.releases.recipe import Recipe, loads
from hsa.system import manifest
from hsa.system.manifest import LONGEST_NUMBER, PROVENANCE
from hsa.system.strict_json import MAX_MARKS
from hsa.testing.whisper_checkpoints import SHAPES, write_triple

Triple = dict[str, Path]

LATIN = os.fsdecode(b"caf\xe9")
"""A name in Latin-1, which is no UTF-8; Python gives its last byte as half of a surrogate pair."""

SHOWN = "caf\\xe9"
HALF = "\ud83d"


@pytest.fixture
def latin(triple: Triple, tmp_path: Path) -> Triple:
    """The triple in directories of such names, which differ in what comes after."""
    folder = tmp_path / LATIN
    folder.mkdir()
    return {role: path.rename(folder / f"{LATIN}-{role}") for role, path in triple.items()}


def recorded(directory: Path) -> dict[str, str]:
    document = json.loads((directory / PROVENANCE).read_bytes())
    return {role: source["id"] for role, source in document["sources"].items()}


# Names that are not UTF-8 ----------------------------------------------------------------------------------


def test_sources_in_directories_whose_names_are_not_utf8(latin: Triple, tmp_path: Path) -> None:
    out = tmp_path / LATIN / "out"
    done = run_hsa(*merge_arguments(latin, out))
    assert done.returncode == 0, done.stderr
    assert recorded(out) == {role: f"{SHOWN}-{role}" for role in latin}
    assert hsa.verify(out, **latin).ok
    assert r"caf?xe9\-primary" in (out / "README.md").read_text("utf-8") or SHOWN in (out / "README.md").read_text(
        "utf-8"
    )
    done = run_hsa("verify", str(out), "--sources", *(f"--{role}={path}" for role, path in latin.items()))
    assert done.returncode == 0, done.stderr


def test_an_output_whose_name_is_not_utf8(shared_triple: Triple, tmp_path: Path) -> None:
    out = tmp_path / LATIN
    for _ in range(2):
        assert run_hsa(*merge_arguments(shared_triple, out, "--overwrite")).returncode == 0
    assert hsa.verify(out).ok
    done = run_hsa("verify", str(out), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["ok"]


def test_patches_and_apply_with_names_that_are_not_utf8(latin: Triple, tmp_path: Path) -> None:
    patch, out = tmp_path / f"{LATIN}{SUFFIX}", tmp_path / "out"
    hsa.merge_patch(**latin, output=patch)
    hsa.apply(latin["primary"], patch, output=out)
    assert hsa.verify(out, **latin).ok
    hsa.merge(**latin, output=tmp_path / "whole")
    assert (out / PROVENANCE).read_bytes() == (tmp_path / "whole" / PROVENANCE).read_bytes()


@pytest.mark.parametrize("full", [False, True], ids=["patches", "checkpoints"])
def test_sweeps_with_names_that_are_not_utf8(latin: Triple, tmp_path: Path, full: bool) -> None:
    out = tmp_path / f"{LATIN}-sweep"
    made = hsa.sweep(**latin, output=out, lam=(0.2, 0.5), full=full).made
    assert hsa.sweep(**latin, output=out, lam=(0.2, 0.5), full=full).skipped == made
    assert (out / "index.json").read_bytes().decode("ascii").count('"id": "caf') == 3
    (out / "index.csv").read_bytes().decode("utf-8")


def test_a_release_tree_with_names_that_are_not_utf8(latin: Triple, tmp_path: Path) -> None:
    """A recipe is UTF-8, so it names such directories through links."""
    for role, path in latin.items():
        (tmp_path / role).symlink_to(path)
    recipe = tmp_path / LATIN / "recipe.yaml"
    recipe.write_text("merges: [{name: a, group: g, base: ../base, primary: ../primary, secondary: ../secondary}]")
    output = tmp_path / f"{LATIN}-tree"
    assert hsa.release(recipe, output).ok
    again = hsa.release(recipe, output)
    assert again.ok and again.count("verified") == 1 and not again.index_written
    assert recorded(output / "g" / "a") == {role: f"{SHOWN}-{role}" for role in latin}


def test_inspections_with_names_that_are_not_utf8(latin: Triple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hsa.merge(**latin, output=out)
    files = [f"--{kind}={tmp_path / LATIN / f'heads.{kind}'}" for kind in ("csv", "html")]
    sources = [f"--{role}={path}" for role, path in latin.items()]
    for arguments in ([str(out)], sources, ["--diff", str(out), str(out)]):
        more = files if "--diff" not in arguments else []
        done = run_hsa("inspect", *arguments, *more, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert run_hsa("inspect", *arguments, "--json").returncode == 0
    for kind in ("csv", "html"):
        (tmp_path / LATIN / f"heads.{kind}").read_bytes().decode("utf-8")


def test_a_file_of_openais_whose_name_is_not_utf8(triple: Triple, tmp_path: Path) -> None:
    triple["base"] = write_openai(tmp_path / f"{LATIN}.pt", triple["base"])
    hsa.merge(**triple, output=tmp_path / "out")
    assert hsa.verify(tmp_path / "out", **triple).ok
    assert recorded(tmp_path / "out")["base"] == f"{SHOWN}.pt"


def test_a_name_in_utf8_stays_as_it_is(triple: Triple, tmp_path: Path) -> None:
    triple["base"] = triple["base"].rename(triple["base"].with_name("größe-模型-🎙"))
    hsa.merge(**triple, output=tmp_path / "out")
    assert recorded(tmp_path / "out")["base"] == "größe-模型-🎙"


# Card values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["title", "language", "license", "citation", "intended_use"])
def test_a_card_value_that_is_not_utf8_is_refused(shared_triple: Triple, tmp_path: Path, field: str) -> None:
    for command, out in (
        ("merge", tmp_path / "out"),
        ("merge --patch", tmp_path / f"p{SUFFIX}"),
        ("sweep", tmp_path / "s"),
    ):
        name, *more = command.split()
        sources = [f"--{role}={path}" for role, path in shared_triple.items()]
        done = run_hsa(name, *sources, f"--output={out}", f"--card={field}={LATIN}", *more)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert f"card field {field} is" in done.stderr and "not valid UTF-8" in done.stderr
    assert os.listdir(tmp_path) == []


def test_half_a_surrogate_pair_in_a_recipe_is_refused_with_its_line() -> None:
    for text in ('title: "\\ud83d"', 'title: x\n"\\ud83d": y', 'title: x\ndefaults: {card: {role: "a\\ud83db"}}'):
        with pytest.raises(hsa.RequestError, match=r"r\.yaml:\d: .*half of a surrogate pair"):
            loads(f"{text}\nmerges: []".encode(), "r.yaml", Path("/nowhere"))


# Names of tensors ------------------------------------------------------------------------------------------


def named_metadata(tensors: dict[str, torch.Tensor]) -> None:
    tensors["__metadata__"] = torch.zeros(3)


def named_metadata_in_a_wrapper(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)
    tensors["module.__metadata__"] = torch.zeros(3)


def named_half(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"model.encoder.{HALF}"] = torch.zeros(3)


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
@pytest.mark.parametrize("add", [named_metadata, named_metadata_in_a_wrapper, named_half], ids=lambda add: add.__name__)
def test_a_tensor_whose_name_no_safetensors_file_can_hold_is_refused(
    triple: Triple, tmp_path: Path, role: str, add: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    tensors = read_tensors(triple[role])
    add(tensors)
    write_pickle(triple[role], tensors)
    with pytest.raises(hsa.SourceError) as caught:
        hsa.merge(**triple, output=tmp_path / "out")
    assert role in str(caught.value) and str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


# As large as the limits of the readers ---------------------------------------------------------------------


def many_heads(folder: Path, layers: int, heads: int, **more: Any) -> Triple:
    shape = replace(
        SHAPES["test"], d_model=heads, encoder_heads=heads, decoder_heads=heads, encoder_layers=layers,
        decoder_layers=layers, ffn_dim=8, num_mel_bins=1, max_source_positions=4, max_target_positions=4,
    )  # fmt: skip
    return write_triple(folder, shape, dtype="float16", processor=False, **more)


def test_720_targets_of_128_heads_are_written_and_verified(tmp_path: Path) -> None:
    """Several times what any published Whisper has."""
    triple = many_heads(tmp_path / "sources", 40, 128)
    report = hsa.merge(**triple, output=tmp_path / "out", targets="attention-all", k=1, sync=False)
    assert (len(report.tensors), report.total_heads) == (720, 720 * 128)
    assert hsa.verify(tmp_path / "out").ok


def test_a_record_of_as_many_heads_as_a_patch_may_have_is_read(shared_triple: Triple, tmp_path: Path) -> None:
    hsa.merge(**shared_triple, output=tmp_path / "out", sync=False)
    document = json.loads((tmp_path / "out" / PROVENANCE).read_bytes())
    count = patch_format.MAX_GROUPS // len(document["targets"])
    for target in document["targets"].values():
        target.update(groups=count, shape=[count, *target["shape"][1:]])
        heads = {"keep": count, "selected": list(range(count)), "scores": [LONGEST_NUMBER] * count}
        target["decision"].update(heads, margin=None)
    manifest.check_fits(document, patch_format.MAX_GROUPS)
    document["digest"] = manifest.document_digest(document)
    record = provenance.loads(manifest.render(document), "here").record
    assert sum(target.heads for target in record.targets) > 0.99 * patch_format.MAX_GROUPS


def test_more_heads_than_a_record_can_hold_are_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triple = many_heads(tmp_path / "sources", 152, 96)
    monkeypatch.setattr("hsa.actions.merge.execute", None)
    monkeypatch.setattr("hsa.actions.patch.write_patches", lambda *arguments, **keywords: pytest.fail("computed"))
    for run in (hsa.merge, lambda **given: run_dry(**given)):
        with pytest.raises(hsa.RequestError, match=r"of this merge would list 262656 heads"):
            run(**triple, output=tmp_path / "out", targets="attention-all", k=1)
    monkeypatch.undo()
    for write, place in ((hsa.merge_patch, f"p{SUFFIX}"), (sweep_presets, "sweep")):
        with pytest.raises(hsa.RequestError, match="262656 heads"):
            write(**triple, output=tmp_path / place, targets="attention-all", k=1)
    assert sorted(os.listdir(tmp_path)) == ["sources"]


def run_dry(**given: Any) -> PlanReport:

    sources = {role: given[role] for role in ("base", "primary", "secondary")}
    return dry_run(Request(sources, given["output"], HsaSettings(k=given["k"], targets=given["targets"])))


def sweep_presets(**given: Any) -> object:
    return hsa.sweep(**{**given, "targets": (given["targets"],), "k": (given["k"],)})


def test_headers_that_could_not_be_read_again_are_refused(tmp_path: Path) -> None:
    """In one file the tensors fit; with a header for each of them there are more brackets and commas than are read."""
    triple = many_heads(tmp_path / "sources", 400, 1)
    with pytest.raises(hsa.RequestError, match=r"the output's headers would have .* are read again; choose larger"):
        hsa.merge(**triple, output=tmp_path / "out", max_shard_size=1)
    assert not (tmp_path / "out").exists()
    assert run_dry(**triple, output=tmp_path / "out", targets="encoder-qkv", k=1).targets


def test_a_config_that_grows_beyond_what_is_read_is_refused(triple: Triple, tmp_path: Path) -> None:
    """A cast writes config.json again, with a line for each value."""
    config = triple["primary"] / "config.json"
    document = json.loads(config.read_text("utf-8"))
    document["nested"] = [[[[[[[[[[0] * 120_000]]]]]]]]]
    config.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    document["text"] = "x" * ((8 << 20) - config.stat().st_size - 20)
    config.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    hsa.merge(**triple, output=tmp_path / "kept", sync=False)
    with pytest.raises(hsa.HsaError, match=r"output: config\.json of primary with another dtype"):
        hsa.merge(**triple, output=tmp_path / "cast", dtype="float16", sync=False)
    assert not (tmp_path / "cast").exists()


def test_the_index_of_a_tree_of_any_size_is_known_as_its_own(shared_triple: Triple, tmp_path: Path) -> None:
    """Ten thousand entries: more than a JSON text may have marks to be parsed."""
    recipe = tmp_path / "recipe.yaml"
    sources = "".join(f", {role}: {json.dumps(str(path))}" for role, path in shared_triple.items())
    recipe.write_text(f"merges: [{{name: a, group: g{sources}}}]")
    output = tmp_path / "tree"
    assert hsa.release(recipe, output, sync=False).ok
    planned = plan_release(recipe, output)
    entry = planned.entries[0].entry
    many: Recipe = replace(planned.recipe, entries=(entry,) * 10_000)
    row = Row(entry, "complete", provenance.load(output / "g" / "a"))
    files = index.render(many, [row] * 10_000)
    assert files["index.json"].count(b",") > MAX_MARKS
    assert index.write(output, files, sync=False)
    assert hsa.release(recipe, output, sync=False).ok
    (output / "index.json").write_text('{"kind": "hsa-release", "mine": true}')
    with pytest.raises(hsa.DestinationError, match=r"index\.json is no index that hsa release wrote"):
        hsa.release(recipe, output, sync=False)
