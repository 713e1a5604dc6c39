"""What is said of HSA merges of more than two fine-tunes: arguments, records, reports, warnings and inspections."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import read_tensors, run_hsa, snapshot, write_tensors
from merge_oracle import arguments, expected_merge, merge
from safetensors.torch import load_file
from several_models import with_more

import hsa
from hsa.cli import app
from hsa.methods.geometry import ModelGeometry, geometry_of, tile_sums
from hsa.outputs import patch_format
from hsa.system import manifest
from hsa.system.manifest import PROVENANCE

Sources = dict[str, Path]
Tensors = dict[str, torch.Tensor]
WEIGHTS = [2.0, 0.5, -0.75]


@pytest.fixture(scope="module")
def four(shared_triple: Sources, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Four models of one base."""
    return with_more(shared_triple, tmp_path_factory.mktemp("four"), 4)


@pytest.fixture(scope="module")
def three(four: Sources) -> Sources:
    return {role: path for role, path in four.items() if role != "model4"}


# --- arguments --------------------------------------------------------------------------------------------------------


def test_several_secondaries_are_given_in_many_ways(four: Sources, tmp_path: Path) -> None:
    base, *models = four.values()
    primary, *secondaries = models
    own: dict[str, Any] = {"lam": 0.25, "weights": WEIGHTS, "sync": False}
    ids = ["a/m1", "a/m2", "a/m3", "a/m4"]
    hsa.merge(base, primary, secondaries, tmp_path / "positional", primary_id=ids[0], secondary_id=ids[1:], **own)
    hsa.merge(method="hsa", base=base, models=models, model_ids=ids, output=tmp_path / "models", **own)
    by_place = {"primary_id": ids[0], "secondary_id": ids[1], "model3_id": ids[2], "model4_id": ids[3]}
    given = {"base": base, "primary": primary, "secondary": tuple(secondaries), **by_place}
    hsa.merge(**given, output=tmp_path / "names", **own)
    more = ["--lambda=0.25", *(f"--weight={weight}" for weight in WEIGHTS), "--no-sync"]
    named = [f"--primary={primary}", *(f"--secondary={path}" for path in secondaries), "--primary-id=a/m1"]
    named += [f"--secondary-id={each}" for each in ids[1:]]
    in_order = [*(f"--model={path}" for path in models), *(f"--model-id={each}" for each in ids)]
    for place, options in (("named", named), ("in_order", in_order)):
        done = run_hsa("merge", f"--base={base}", *options, *more, f"--output={tmp_path / place}")
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    expected = snapshot(tmp_path / "positional")
    for place in ("models", "names", "named", "in_order"):
        assert snapshot(tmp_path / place) == expected, place
    record = json.loads((tmp_path / "positional" / PROVENANCE).read_text())
    assert {role: source["id"] for role, source in record["sources"].items()} == {
        "base": "base",
        **dict(zip(("primary", "secondary", "model3", "model4"), ids, strict=True)),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--secondary=s --secondary=t --primary=p --primary=q", "--primary is given 2 times and takes one value"),
        (
            "--primary=p --secondary=s --secondary=t --weight=1",
            "--weight must have as many values as there are secondaries, 2, got 1",
        ),
        ("--primary=p --secondary=s --secondary=t --weight=1 --weight=-1", "--weight 1, -1 of the secondaries sum to"),
        ("--primary=p --secondary=s --secondary=t --secondary-id=a/b", "--secondary-id must be as many as secondary"),
        ("--primary=p --secondary=s --secondary=t --backend=triton", "a GPU merges 2 models by method hsa, and 3 are"),
        ("--primary=p --secondary=s --secondary=t --numerics=reference", "which merges 2 models, got 3; give one"),
        ("--primary=p --secondary=s --secondary=t --model=m", "--model and --primary both say what is merged"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["merge", "--base=b", f"--output={tmp_path / 'out'}", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", [hsa.inspect, hsa.verify])
def test_a_list_of_secondaries_holds_paths(call: Callable[..., Any], four: Sources, tmp_path: Path) -> None:
    if call is hsa.verify:
        merge(four, tmp_path / "out")
    given = {**arguments(four), **({"output": tmp_path / "out"} if call is hsa.verify else {})}
    for wrong, message in ((["a", 3], "secondary must be a path"), ([], "secondary is an empty list")):
        with pytest.raises(hsa.RequestError, match=message):
            call(**{**given, "secondary": wrong})


def test_a_recipe_lists_secondaries(three: Sources, tmp_path: Path) -> None:
    _, primary, secondary, model3 = three.values()
    recipe = tmp_path / "recipe.yaml"
    entry = {"base": str(three["base"]), "k": 0.5, "weights": [1.0, 3.0], "group": "g"}
    one = {**entry, "name": "one", "primary": str(primary), "secondary": [str(secondary), str(model3)]}
    two = {**entry, "name": "two", "models": [str(primary), str(secondary), str(model3)]}
    recipe.write_text(json.dumps({"merges": [one, two]}))
    hsa.release(recipe, output=tmp_path / "tree", sync=False)
    merge(three, tmp_path / "out", k=0.5, weights=[1.0, 3.0])
    tensors = {place: read_tensors(tmp_path / place) for place in ("tree/g/one", "tree/g/two", "out")}
    for name, tensor in tensors["out"].items():
        assert all(torch.equal(each[name], tensor) for each in tensors.values()), name
    assert hsa.verify(tmp_path / "tree").ok
    recipe.write_text(json.dumps({"merges": [{**one, "secondary": [str(secondary), 3]}]}))
    with pytest.raises(hsa.RequestError, match="secondary 2 of merge 'one' must be a text"):
        hsa.release(recipe, output=tmp_path / "other")


def test_a_merge_into_a_loaded_model(three: Sources, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    from hsa.integrations.transformers import hsa_merge_

    model = WhisperForConditionalGeneration.from_pretrained(three["primary"], dtype="auto")
    others = [three["secondary"], load_file(three["model3"] / "model.safetensors")]
    hsa_merge_(model, three["base"], others, k=0.5, lam=0.2, weights=[1.0, 3.0])
    expected, _ = expected_merge(three, k=0.5, lam=0.2, weights=[1.0, 3.0])
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    for others, message in (
        ([three["secondary"], three["base"]], "base and model3 are one"),
        ([three["secondary"], model.state_dict()], "model3 and model share memory"),
    ):
        with pytest.raises(hsa.RequestError, match=message):
            hsa_merge_(model, three["base"], others, again=True)
    with pytest.raises(hsa.RequestError, match="as many values as there are secondaries, 2, got 1"):
        hsa_merge_(model, three["base"], [three["secondary"], three["model3"]], again=True, weights=[1.0])


# --- figures ----------------------------------------------------------------------------------------------------------


def displaced(sources: Sources, name: str, weights: list[float], held: Mapping[str, Tensors]) -> list[torch.Tensor]:
    """Primary's task vector, and the weighted mean of the others', in float64."""
    base, *models = (held[role][name].double() for role in sources)
    shares = [weight / math.fsum(weights) for weight in weights]
    mean = sum(share * (model - base) for share, model in zip(shares, models[1:], strict=True))
    return [base, models[0] - base, mean]


@pytest.mark.parametrize(
    "parameters", [{}, {"k": 1.0, "lam": 0.1, "targets": "attention-all"}, {"attention_scale": 1.5, "k": 0.25}], ids=str
)
def test_the_extent_is_that_of_the_written_output(four: Sources, tmp_path: Path, parameters: dict[str, Any]) -> None:
    report = merge(four, tmp_path / "out", weights=WEIGHTS, **parameters)
    held = {role: read_tensors(path) for role, path in {**four, "output": tmp_path / "out"}.items()}
    total = dict.fromkeys(("base", "one", "two", "product", "moved"), 0.0)
    for name in report.tensors:
        base, one, two = displaced(four, name, WEIGHTS, held)
        moved = held["output"][name].double() - held["primary"][name].double()
        pairs = {"base": (base, base), "one": (one, one), "two": (two, two), "product": (one, two)}
        for key, (x, y) in {**pairs, "moved": (moved, moved)}.items():
            total[key] += float((x * y).sum())
    assert report.extent.primary == pytest.approx(math.sqrt(total["one"] / total["base"]), rel=1e-5)
    assert report.extent.secondary == pytest.approx(math.sqrt(total["two"] / total["base"]), rel=1e-5)
    assert report.extent.cosine == pytest.approx(total["product"] / math.sqrt(total["one"] * total["two"]), abs=1e-5)
    assert report.extent.change == pytest.approx(math.sqrt(total["moved"] / total["one"]), rel=2e-4)
    assert report.extent.secondaries == 3
    assert report.extent.text.startswith("the 3 secondaries together weigh ")
    assert hsa.verify(tmp_path / "out").record.method.recorded_summary(report.tensors.values()).secondaries == 3


def test_blended_geometries_are_those_of_float64() -> None:
    """Shares of both signs, equal vectors, and one that is zero."""
    generator = np.random.default_rng(7)
    base, *vectors = (generator.standard_normal((5, 33)).astype(np.float32) for _ in range(6))
    for models in (3, 4, 5):
        for tvs in (vectors[:models], [vectors[0]] * models, [vectors[0], *[np.zeros_like(base)] * (models - 1)]):
            for weights in ([1.0] * (models - 1), [3.0, -1.0, 0.5, 0.0][: models - 1]):
                shares = tuple(weight / sum(weights) for weight in weights)
                found = geometry_of([[tile_sums(base, *tvs)]], models)
                assert isinstance(found, ModelGeometry)
                blended = found.blended(shares)
                one, *others = (each.astype(np.float64) for each in tvs)
                mean = sum(share * other for share, other in zip(shares, others, strict=True))
                scale = sum(float((each * each).sum()) for each in (one, *others)) + 1.0
                assert blended.secondary[0] == pytest.approx(float((mean * mean).sum()), abs=1e-5 * scale)
                assert blended.product[0] == pytest.approx(float((one * mean).sum()), abs=1e-5 * scale)
                assert blended.difference[0] == pytest.approx(float(((one - mean) ** 2).sum()), abs=1e-5 * scale)
                assert min(blended.secondary[0], blended.difference[0]) >= 0.0
    for pair in combinations(range(4), 2):
        found = geometry_of([[tile_sums(base, *vectors[:4])]], 4)
        two = geometry_of([[tile_sums(base, *(vectors[number] for number in pair))]], 2)
        assert found.between(pair) == two


def test_distances_are_those_of_the_written_output(four: Sources, tmp_path: Path) -> None:
    own = {"k": 0.5, "lam": 0.3, "targets": "attention-qkv", "weights": WEIGHTS}
    report = hsa.merge_patch(**arguments(four), output=tmp_path / "p.safetensors", sync=False, **own)
    merge(four, tmp_path / "out", **own)
    raw = (tmp_path / "p.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    found = json.loads(header["__metadata__"][patch_format.KEY])["distances"]
    assert list(found) == ["encoder", "all", "decoder"] or set(found) == {"encoder", "decoder", "all"}
    output = read_tensors(tmp_path / "out")
    for stack in found:
        names = [name for name in report.tensors if stack == "all" or f".{stack}." in name]
        assert list(found[stack]) == ["primary", "secondary", "model3", "model4"]
        for role, distance in found[stack].items():
            model = read_tensors(four[role])
            apart = sum(float((output[name].double() - model[name].double()).square().sum()) for name in names)
            whole = sum(float(model[name].double().square().sum()) for name in names)
            assert distance == pytest.approx(math.sqrt(apart / whole), rel=1e-4), (stack, role)


# --- warnings ---------------------------------------------------------------------------------------------------------


def warned(sources: Sources, tmp_path: Path, **more: Any) -> list[str]:
    return list(merge(sources, tmp_path / "out", overwrite=True, **more).warnings)


def test_sources_that_belong_together_give_no_warning(four: Sources, tmp_path: Path) -> None:
    assert warned(four, tmp_path) == []


def test_equal_sources_are_told_once(four: Sources, tmp_path: Path) -> None:
    base, primary, secondary, model3, _ = four.values()
    twice = {"base": base, "primary": primary, "secondary": secondary, "model3": secondary}
    same = "are equal on all 10 target tensors"
    assert warned(twice, tmp_path) == [f"secondary and model3 {same}: is the same model given twice?"]
    still = {"base": base, "primary": primary, "secondary": model3, "model3": base}
    assert warned(still, tmp_path) == [f"base and model3 {same}: is model3 really a fine-tune, and of this base?"]
    alone = dict.fromkeys(("base", "primary", "secondary", "model3"), base)
    assert [each.partition(" are ")[0] for each in warned(alone, tmp_path)] == [
        "base and primary",
        "base and secondary",
        "base and model3",
    ]


def test_a_model_of_another_base_is_named(four: Sources, tmp_path: Path) -> None:
    far = with_more(four, tmp_path, 3)
    write_tensors(far["model3"], {name: tensor.flip(0) for name, tensor in read_tensors(far["model3"]).items()})
    (warning,) = warned(far, tmp_path)
    assert warning.startswith("model3 was hardly trained from this base: it lies 1.4 times the norm of base's")
    assert warning.endswith("give a fine-tune of the same base as the others")
    base = with_more(four, tmp_path / "b", 3)
    other = {**base, "base": far["model3"]}
    (warning,) = warned(other, tmp_path)
    assert warning.startswith("primary, secondary and model3 were hardly trained from this base: they lie 1.4, 1.4 and")
    assert "(the cosine of their task vectors is 1.00)" in warning and warning.endswith("that all were trained from")


def test_of_sources_that_are_exchanged_the_nearest_pair_is_named(four: Sources, tmp_path: Path) -> None:
    exchanged = {**four, "base": four["model3"], "model3": four["base"]}
    (warning,) = warned(exchanged, tmp_path)
    assert "nearer to model3 than to base" in warning and "are base and model3 exchanged" in warning


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lam": 1.0}, "the secondaries have no weight where lambda is 1 or alpha is 0; lower lam, or raise alpha"),
        ({"k": 0.0}, "k selects no head; raise k"),
    ],
    ids=str,
)
def test_a_merge_that_changes_nothing_is_told(
    four: Sources, tmp_path: Path, parameters: dict[str, Any], message: str
) -> None:
    warnings = warned(four, tmp_path, **parameters)
    assert any(message in warning for warning in warnings), warnings


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_holds_weights_where_they_are_given_and_shares_always(four: Sources, tmp_path: Path) -> None:
    for weights, shares in ((None, [1 / 3] * 3), ([3.0, 1.0, 4.0], [0.375, 0.125, 0.5])):
        merge(four, tmp_path / "out", overwrite=True, **({} if weights is None else {"weights": weights}))
        record = json.loads((tmp_path / "out" / PROVENANCE).read_text())
        assert record["parameters"].get("weights") == weights
        for target in record["targets"].values():
            assert list(target["decision"]) == ["keep", "lambda_i", "shares", "selected", "scores", "margin"]
            assert target["decision"]["shares"] == shares
        card = (tmp_path / "out" / "README.md").read_text()
        assert "`tv2` to `tv4`" in card and ("weighted by `weights`" in card) == (weights is not None)


def forge(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the record, with a digest that fits."""
    document = json.loads((output / PROVENANCE).read_text())
    change(document)
    document[manifest.DIGEST] = manifest.document_digest(document)
    (output / PROVENANCE).write_bytes(manifest.render(document))


def targets(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [target["decision"] for target in document["targets"].values()]


def other_shares(document: dict[str, Any]) -> None:
    targets(document)[3]["shares"] = [0.5, 0.25, 0.25]


def fewer_shares(document: dict[str, Any]) -> None:
    for decision in targets(document):
        decision["shares"] = [0.5, 0.5]


def no_shares(document: dict[str, Any]) -> None:
    for decision in targets(document):
        del decision["shares"]


def huge_share(document: dict[str, Any]) -> None:
    targets(document)[0]["shares"] = [1e300, -1e300, 1.0]


def other_weights(document: dict[str, Any]) -> None:
    document["parameters"]["weights"] = [1.0, 2.0, 4.0]


def more_weights(document: dict[str, Any]) -> None:
    document["parameters"]["weights"] = [1.0] * 4


def cancelling_weights(document: dict[str, Any]) -> None:
    document["parameters"]["weights"] = [1.0, -1.0, 0.0]


@pytest.mark.unverified("forged")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_shares, "is listed with the shares [0.5, 0.25, 0.25] of its secondaries; the parameters give"),
        (fewer_shares, "is not of 4 models"),
        (no_shares, "is not of 4 models"),
        (huge_share, "expected a number from -1e+10 to 1e+10"),
        (other_weights, "is listed with the shares [0.333"),
        (more_weights, "weights must have as many values as there are secondaries, 3, got 4"),
        (cancelling_weights, "weights 1, -1, 0 of the secondaries sum to 0"),
    ],
)
def test_a_forged_record_is_found_without_the_sources(
    four: Sources, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    merge(four, tmp_path / "out")
    assert hsa.verify(tmp_path / "out").ok
    forge(tmp_path / "out", change)
    problems = [problem.what for problem in hsa.verify(tmp_path / "out").problems]
    assert any(message in problem for problem in problems), problems


@pytest.mark.unverified("forged")
def test_with_the_sources_the_two_questions_are_answered_apart(four: Sources, tmp_path: Path) -> None:
    merge(four, tmp_path / "out", k=1.0, lam=0.1)
    forge(tmp_path / "out", other_shares)
    report = hsa.verify(tmp_path / "out", **arguments(four))
    assert (report.bytes_follow, report.decisions_follow) == (False, False)
    assert any("shares [0.5, 0.25, 0.25] is recorded, the sources give" in each.what for each in report.problems)
    merge(four, tmp_path / "two", k=1.0, lam=0.1)
    other = {**four, "model3": four["model4"], "model4": four["model3"]}
    assert not hsa.verify(tmp_path / "two", **arguments(other)).ok
    for given in (arguments({role: four[role] for role in list(four)[:4]}), {"base": four["base"]}):
        with pytest.raises(hsa.RequestError, match="merged by method hsa from base, primary, secondary, model3 and"):
            hsa.verify(tmp_path / "two", **given)


# --- inspection -------------------------------------------------------------------------------------------------------


def test_an_inspection_shows_the_mean_and_every_energy(four: Sources, tmp_path: Path) -> None:
    own = {"k": 0.5, "weights": WEIGHTS}
    found = hsa.inspect(**arguments(four), **own)
    report = merge(four, tmp_path / "out", **own)
    held = {role: read_tensors(path) for role, path in four.items()}
    for name, tensor in found.tensors.items():
        assert (tensor.selected, tensor.scores) == (report.tensors[name].selected, report.tensors[name].scores)
        _, one, two = displaced(four, name, WEIGHTS, held)
        assert tensor.geometry is not None
        assert sum(tensor.geometry.secondary) == pytest.approx(float((two * two).sum()), rel=1e-9)
        assert sum(tensor.geometry.product) == pytest.approx(float((one * two).sum()), rel=1e-9, abs=1e-12)
    assert found.energy is not None
    for energy in found.energy:
        inside = sum(
            float((held[energy.role][n].double() - held["base"][n].double()).square().sum()) for n in found.tensors
        )
        assert energy.inside == pytest.approx(inside, rel=1e-9)
    assert [energy.role for energy in found.energy] == ["primary", "secondary", "model3", "model4"]
    note = (
        "tv2 is the weighted mean of the task vectors of secondary, model3 and model4, and a score adds the magnitudes"
    )
    assert any(note in each for each in found.notes)
    both = hsa.inspect(tmp_path / "out", **arguments(four))
    assert {n: t.geometry for n, t in both.tensors.items()} == {n: t.geometry for n, t in found.tensors.items()}
    alone = hsa.inspect(tmp_path / "out")
    assert {n: t.selected for n, t in alone.tensors.items()} == {n: t.selected for n, t in found.tensors.items()}
    with pytest.raises(hsa.RequestError, match="model4 is not given"):
        hsa.inspect(tmp_path / "out", **arguments({role: four[role] for role in list(four)[:4]}))


def test_two_outputs_of_several_models_are_compared(four: Sources, three: Sources, tmp_path: Path) -> None:
    from hsa.inspection.diff import compare

    merge(four, tmp_path / "a")
    merge(three, tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.sources["model4"]["b"] is None and found.heads is not None
    assert found.sources["model3"]["same_targets"]
