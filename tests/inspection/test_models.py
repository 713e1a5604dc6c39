"""`hsa.inspect` of methods that merge whole models: the numbers against naive torch, and decisions against merges."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import vectors_oracle
from helpers import read_tensors, write_tensors
from masking_models import DTYPES, METHODS, MIXED, cases, chosen, settings_for, write_family

import hsa
from hsa.backends import array_block, cpu
from hsa.engine import streamed
from hsa.errors import MismatchError, NonFiniteError, RequestError
from hsa.inspection.inspect import ModelInspection
from hsa.inspection.model_report import Group
from hsa.methods.registry import method_named, methods
from hsa.planning import file_layout
from hsa.testing.llama_checkpoints import write_llamas

Family = dict[str, Path]
Cut = Callable[[int], None]
EQUAL = "model.encoder.layer_norm.weight"
"""The tensor that is equal in all models of a family."""

OPTIONS: dict[str, dict[str, Any]] = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.003}}
"""Settings that a method needs."""


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_torch() -> Iterator[None]:
    """The oracle's tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    types = {**{name: (name,) for name in DTYPES}, "mixed": MIXED}
    return {name: write_family(tmp_path_factory.mktemp(name), dtypes) for name, dtypes in types.items()}


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Cut:
    """Cuts tensors into small slices and blocks, by a number from 0, which leaves them whole."""

    def apply(number: int) -> None:
        slices, tile, kept = [(1 << 18, 1 << 17, 1 << 27), (3072, 1024, 0), (1024, 5000, 1 << 20)][number]
        monkeypatch.setattr(file_layout, "SLICE_ELEMENTS", slices)
        monkeypatch.setattr(file_layout, "MAX_WHOLE", 24 << 20 if not number else 2000)
        monkeypatch.setattr(streamed, "KEPT_BYTES", kept)
        for module in (cpu, array_block):
            monkeypatch.setattr(module, "TILE", tile)

    return apply


def look(method: str, sources: Mapping[str, Path], **keywords: Any) -> ModelInspection:
    """An inspection of sources by role, base first where there is one."""
    models = [path for role, path in sources.items() if role != "base"]
    found = hsa.inspect(method=method, base=sources.get("base"), models=models, **keywords)
    assert isinstance(found, ModelInspection)
    return found


def taken(method: str, family: Family, count: int = 3) -> Family:
    """As many models of a family as a method takes, at most so many."""
    contract = method_named(method).contract
    return chosen(family, min(count, contract.most))


def near(found: Iterable[float | None], wanted: Iterable[float | None]) -> bool:
    """Whether numbers are equal up to the rounding of sums in float64; None is equal to itself alone."""
    pairs = list(zip(found, wanted, strict=True))
    return all(b is None if a is None else b is not None and math.isclose(a, b, rel_tol=1e-12) for a, b in pairs)


def assert_vectors(group: Group, wanted: vectors_oracle.Vectors, *, based: bool = True) -> None:
    sums, numbers = group.vectors, range(len(wanted.norms))
    assert sums is not None
    assert [math.sqrt(each) for each in sums.squares] == pytest.approx(wanted.norms, rel=1e-12)
    assert sums.moved == tuple(wanted.moved)
    assert (sums.shared, sums.disagreeing) == (wanted.shared, wanted.disagreeing)
    for one in numbers:
        for two in numbers:
            cosine = wanted.cosines[one][two]
            assert sums.cosine(one, two) == (None if cosine is None else pytest.approx(cosine, abs=1e-12))
    if based:
        assert sums.base is not None and math.sqrt(sums.base) == pytest.approx(wanted.base, rel=1e-12)
        relative = [sums.relative(number) for number in numbers]
        assert near(relative, [each / wanted.base if wanted.base else None for each in wanted.norms])
    else:
        assert sums.base is None and sums.relative(0) is None


# --- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", [*DTYPES, "mixed"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_task_vectors_are_those_of_the_oracle(families: dict[str, Family], types: str, count: int) -> None:
    sources = chosen(families[types], count)
    found = look("task_arithmetic", sources)
    base, *models = map(read_tensors, sources.values())
    assert found.tensors.keys() == base.keys() and found.whole.elements == sum(t.numel() for t in base.values())
    for name, tensor in found.tensors.items():
        wanted = vectors_oracle.vectors(base[name], [model[name] for model in models])
        assert_vectors(Group.of([tensor]), wanted)
    layers = {
        kind: [n for n, t in found.tensors.items() if t.spot.kind == kind] for kind in ("feed-forward fc1", "norm")
    }
    for kind, names in layers.items():
        joined = [torch.cat([model[name].flatten().float() for name in names]) for model in (base, *models)]
        assert_vectors(found.groups(lambda spot: spot.kind)[kind], vectors_oracle.vectors(joined[0], joined[1:]))
    every = [torch.cat([model[name].flatten().float() for name in base]) for model in (base, *models)]
    assert_vectors(found.whole, vectors_oracle.vectors(every[0], every[1:]))


KEEPING = [(*case, 0) for case in cases() if case[0] != "nearswap"]
KEEPING += [
    (*case, cut) for *case, _ in KEEPING if case[1] in ({"density": 0.5}, {"select_topk": 0.5}) for cut in (1, 2)
]
"""Methods with their options, and how tensors are cut."""


@pytest.mark.parametrize(("method", "options", "number"), KEEPING)
def test_what_is_kept_is_what_the_oracle_keeps(
    families: dict[str, Family], method: str, options: dict[str, Any], number: int, cut: Cut
) -> None:
    cut(number)
    settings = settings_for(options, 3)
    sources = chosen(families["mixed"], 3)
    found = look(method, sources, **settings)
    base, *models = map(read_tensors, sources.values())
    for name, tensor in found.tensors.items():
        every = [base[name], *(model[name] for model in models)]
        wanted = vectors_oracle.kept(method, every[0], every[1:], name.removeprefix("model."), settings)
        kept = tensor.kept
        assert kept is not None and kept.elements == (base[name].numel(),) * 3
        assert (kept.kept, kept.kept_moved) == (tuple(wanted.kept), tuple(wanted.moved)), name
        assert kept.agreeing == (None if wanted.agreeing is None else tuple(wanted.agreeing)), name
        assert near([kept.energy(model) for model in range(3)], wanted.energy), name
        counts = method_named(method).kept_counts
        assert tensor.decision is not None
        if "kept" in tensor.decision:
            assert tensor.decision["kept"] in (list(kept.kept), kept.kept[0])
        assert counts(None) is None
    whole = found.whole.kept
    assert whole is not None and whole.kept == tuple(
        sum(t.kept.kept[n] for t in found.tensors.values()) for n in range(3)
    )


@pytest.mark.parametrize("method", sorted(name for name, each in methods().items() if not each.needs_heads))
def test_decisions_are_those_that_a_merge_records(families: dict[str, Family], method: str, tmp_path: Path) -> None:
    options = {**OPTIONS.get(method, {}), **({"density": 0.5} if method in METHODS[:7] else {})}
    sources = taken(method, families["float32"])
    merged = dict(sources) if method_named(method).contract.base != "none" else {r: sources[r] for r in [*sources][1:]}
    models = [path for role, path in merged.items() if role != "base"]
    out = tmp_path / "out"
    hsa.merge(
        method=method,
        **({"base": merged["base"]} if "base" in merged else {}),
        models=models,
        output=out,
        sync=False,
        **options,
    )
    alone = hsa.inspect(out)
    assert isinstance(alone, ModelInspection) and alone.origin == "output" and alone.whole.vectors is None
    both = hsa.inspect(out, **({"base": merged["base"]} if "base" in merged else {}), models=models)
    assert isinstance(both, ModelInspection) and not both.warnings
    fresh = look(method, merged, **options)
    assert fresh.tensors.keys() == both.tensors.keys() == alone.tensors.keys()
    open_ = 0
    for name, tensor in fresh.tensors.items():
        recorded = alone.tensors[name]
        open_ += tensor.decision is None
        assert tensor.decision in (None, recorded.decision)
        assert both.tensors[name].recorded == recorded.decision
        assert (tensor.vectors, tensor.kept) == (both.tensors[name].vectors, both.tensors[name].kept)
        if recorded.kept is not None:
            assert tensor.kept is not None and recorded.kept.kept == tensor.kept.kept
        if tensor.decision is not None and "digest" not in recorded.decision:
            assert recorded.coefficients == tensor.coefficients
        copied = name == EQUAL and method_named(method).copies_equal(method_named(method).Settings(**options))
        assert tensor.copied == recorded.copied == copied
    assert bool(open_) == (method in ("tsv_m", "tsv_m_boosted", "iso_c", "iso_cts"))
    json.dumps([each.as_dict() for each in (alone, both, fresh)], allow_nan=False)


def test_coefficients_by_role(families: dict[str, Family]) -> None:
    sources = chosen(families["float32"], 3)
    stock = look("model_stock", sources)
    for tensor in stock.tensors.values():
        if tensor.copied:
            assert tensor.coefficients == {}
            continue
        sums = tensor.vectors
        assert sums is not None
        cosines = [sums.cosine(a, b) or 0.0 for a, b in ((0, 1), (0, 2), (1, 2))]
        c = sum(cosines) / 3
        if min(sums.squares) > 1e-5:  # below it the divisor is a constant
            assert sum(tensor.coefficients.values()) == pytest.approx(3 * c / (1 + 2 * c), rel=1e-6)
    by_row = look("model_stock", sources, filter_wise=True)
    assert any("digest" in (t.decision or {}) and len(t.coefficients) == 3 for t in by_row.tensors.values())
    slerp = look("slerp", chosen(families["float32"], 1), t=0.25)
    base, model = map(read_tensors, chosen(families["float32"], 1).values())
    for name, tensor in slerp.tensors.items():
        b, m = base[name].double().flatten(), model[name].double().flatten()
        if tensor.angle is not None:
            wanted = math.acos(max(-1.0, min(1.0, float(b @ m / (b.norm() * m.norm())))))
            assert tensor.angle == pytest.approx(wanted, abs=2e-7)
        assert list(tensor.coefficients) in ([], ["base", "model1"])
    assert any("need two models" in note for note in slerp.notes)
    least, middle, greatest = slerp.coefficients["model1"]
    assert least <= middle <= greatest


# --- base, or none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "karcher", "nuslerp", "multislerp"])
def test_without_a_base_the_models_themselves_are_shown_and_it_is_said(
    families: dict[str, Family], method: str
) -> None:
    sources = chosen(families["mixed"], 2)
    models = {role: path for role, path in sources.items() if role != "base"}
    found = look(method, models)
    assert not found.based and found.as_dict()["vectors"] == "models"
    [note] = [note for note in found.notes if "without base there are no task vectors" in note]
    assert "sign conflicts" in note
    tensors = [read_tensors(path) for path in models.values()]
    for name, tensor in found.tensors.items():
        assert_vectors(Group.of([tensor]), vectors_oracle.vectors(None, [t[name] for t in tensors]), based=False)
        entry = tensor.as_dict(found.models, based=found.based)
        assert entry["conflicts"] is None and entry["relative"] is None and entry["base_norm"] is None


@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_a_base_that_a_method_does_not_take_shows_task_vectors_and_changes_no_decision(
    families: dict[str, Family], method: str, cut: Cut
) -> None:
    sources = chosen(families["mixed"], 3)
    alone = look(method, {role: path for role, path in sources.items() if role != "base"})
    for number in (0, 1):
        cut(number)
        based = look(method, sources)
        assert based.based and any("takes no base" in note for note in based.notes)
        assert [t.decision for t in based.tensors.values()] == [t.decision for t in alone.tensors.values()]
        assert based.whole.vectors == look("task_arithmetic", sources).whole.vectors


def test_tensors_that_a_base_lacks_are_named(families: dict[str, Family], tmp_path: Path) -> None:
    sources = chosen(families["float32"], 2)
    base = Path(shutil.copytree(sources["base"], tmp_path / "base"))
    tensors = read_tensors(base)
    del tensors["model.decoder.layer_norm.bias"]
    write_tensors(base, tensors)
    found = look("linear", {**sources, "base": base})
    assert "model.decoder.layer_norm.bias" not in found.tensors
    assert any("1 tensors are merged and not shown, for base lacks" in note for note in found.notes)
    stays = look("task_arithmetic", {**sources, "base": base})
    assert any("1 tensors stay model1's" in note for note in stays.notes)


def test_a_model_that_lacks_a_tensor_counts_as_zero_there(families: dict[str, Family], tmp_path: Path) -> None:
    sources = chosen(families["float32"], 3)
    model = Path(shutil.copytree(sources["model2"], tmp_path / "model2"))
    tensors = read_tensors(model)
    gone = "model.encoder.layers.0.fc1.weight"
    del tensors[gone]
    write_tensors(model, tensors)
    found = look("ties", {**sources, "model2": model}, density=0.5, on_mismatch="skip-model")
    base, one, _, three = (read_tensors(path) for path in sources.values())
    wanted = vectors_oracle.vectors(base[gone], [one[gone], base[gone], three[gone]])
    assert_vectors(Group.of([found.tensors[gone]]), wanted)
    kept = found.tensors[gone].kept
    assert kept is not None and kept.elements[1] == kept.kept[1] == 0 and kept.share(1) is None
    assert any("merged of some of the models" in note for note in found.notes)


# --- what repeats, and how much is read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"), [("ties", {"density": 0.4}), ("della", {"density": 0.5}), ("karcher", {})]
)
def test_threads_slices_and_shards_change_no_byte(
    families: dict[str, Family], method: str, options: dict[str, Any], cut: Cut, tmp_path: Path
) -> None:
    sources = chosen(families["mixed"], 3)
    sharded = {role: Path(shutil.copytree(path, tmp_path / role)) for role, path in sources.items()}
    for number, path in enumerate(sharded.values()):
        write_tensors(path, read_tensors(path), shards=4 - number)
    for number in (0, 1, 2):
        cut(number)
        texts = [json.dumps(look(method, sources, threads=n, **options).as_dict(), allow_nan=False) for n in (1, 2, 3)]
        assert texts[0] == texts[1] == texts[2]
        if not number:
            first = json.loads(texts[0])
        again = look(method, sharded, threads=2, **options).as_dict()
        for each in (json.loads(texts[0]), again):
            for key in ("whole", "by_layer", "by_kind", "by_layer_and_kind", "coefficients"):
                assert each[key] == first[key]


def test_every_byte_is_read_once_where_tensors_fit(families: dict[str, Family]) -> None:
    sources = chosen(families["float32"], 3)
    total = sum(t.numel() * t.element_size() for path in sources.values() for t in read_tensors(path).values())
    done: list[tuple[int, int]] = []
    for method, options in (("ties", {"density": 0.5}), ("task_arithmetic", {})):
        found = look(method, sources, progress=lambda count, whole: done.append((count, whole)), **options)
        assert total <= found.bytes_read <= total + 200_000  # headers and config.json
        assert done[-1] == (total, total)


def test_a_llama_is_shown_by_the_names_of_its_tensors(tmp_path: Path) -> None:
    sources = write_llamas(tmp_path)
    models = [path for role, path in sources.items() if role != "base"]
    found = hsa.inspect(method="ties", density=0.5, base=sources["base"], models=models)
    assert isinstance(found, ModelInspection)
    kinds = set(found.groups(lambda spot: spot.kind))
    assert {"attention q_proj", "feed-forward up_proj", "norm", "embedding"} <= kinds
    assert {spot[:2] for spot in found.groups(lambda spot: (spot.stack, spot.layer))} >= {("model", 0), ("model", None)}
    assert found.whole.vectors is not None and found.whole.vectors.conflict is not None


def test_only_a_part_of_the_model(families: dict[str, Family]) -> None:
    sources = chosen(families["float32"], 2)
    found = look("ties", sources, stack="encoder", layers="0")
    assert {(t.spot.stack, t.spot.layer) for t in found.tensors.values()} == {("encoder", 0)}


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"method": "ties"}, "nothing to inspect; give an output, or base and models"),
        ({"method": "ties", "models": 2}, "base not given; base and models are needed together"),
        ({"method": "ties", "base": True, "primary": True}, "method ties has no primary; give its sources by base and"),
        ({"method": "ties", "base": True, "models": 2, "t": 0.5}, "method ties has no t; its settings are"),
        ({"method": "ties", "base": True, "models": 2, "density": 2.0}, "density must be in \\[0, 1\\], got 2.0"),
        (
            {"method": "ties", "base": True, "models": 2, "weights": [1, 2, 3]},
            "weights must have as many values as there are models, 2, got 3",
        ),
        ({"method": "slerp", "base": True, "models": 1}, "method slerp needs t; give it"),
        ({"method": "slerp", "base": True, "models": 2, "t": 0.5}, "method slerp merges 1 model, got 2"),
        ({"method": "della", "base": True, "models": 2, "density": 0.1}, "give probabilities from"),
        ({"method": "linear", "models": 2, "weights": [1, -1]}, "sum to 0"),
        ({"method": "tis", "models": 2}, "method must be one of breadcrumbs"),
        ({"method": "linear", "models": 2, "threads": 0}, "threads must be a whole number from 1"),
    ],
)
def test_bad_requests(families: dict[str, Family], keywords: dict[str, Any], message: str) -> None:
    family = families["float32"]
    given = dict(keywords)
    for name in ("base", "primary"):
        if given.get(name) is True:
            given[name] = family["base"]
    if "models" in given:
        given["models"] = [family[f"model{number + 1}"] for number in range(given["models"])]
    with pytest.raises(RequestError, match=message):
        hsa.inspect(**given)


@pytest.mark.parametrize(
    ("method", "damaged"), [("ties", "model2"), ("linear", "base"), ("linear", "model1"), ("tsv_m", "base")]
)
def test_what_is_not_finite_is_named(families: dict[str, Family], method: str, damaged: str, tmp_path: Path) -> None:
    sources = chosen(families["float32"], 2)
    path = Path(shutil.copytree(sources[damaged], tmp_path / damaged))
    tensors = read_tensors(path)
    tensors["model.encoder.layers.0.fc1.weight"][1, 1] = math.nan
    write_tensors(path, tensors)
    with pytest.raises(NonFiniteError, match=r"fc1.weight holds NaN or Inf"):
        look(method, {**sources, damaged: path})


def test_an_output_is_held_against_its_own_sources(families: dict[str, Family], tmp_path: Path) -> None:
    base, *models = chosen(families["float32"], 3).values()
    out = tmp_path / "out"
    hsa.merge(method="ties", density=0.5, base=base, models=models[:2], output=out, sync=False)
    with pytest.raises(MismatchError, match="model2: its merged tensors are not those that"):
        hsa.inspect(out, base=base, models=[models[0], models[2]])
    with pytest.raises(RequestError, match="density: settings of method ties are recorded in an output"):
        hsa.inspect(out, density=0.4)
    with pytest.raises(RequestError, match="was merged by method ties, not by 'dare_ties'; leave out method"):
        hsa.inspect(out, method="dare_ties")
    with pytest.raises(RequestError, match="model3 is none of these"):
        hsa.inspect(out, base=base, models=models)


def test_two_models_that_are_one_are_warned_of(families: dict[str, Family]) -> None:
    base, one, _ = chosen(families["float32"], 2).values()
    found = look("ties", {"base": base, "model1": one, "model2": one})
    assert any("model1 and model2 are equal" in warning for warning in found.warnings)
    assert found.whole.vectors is not None and found.whole.vectors.conflict == 0.0
    assert found.whole.vectors.cosine(0, 1) == pytest.approx(1.0, abs=1e-15)
