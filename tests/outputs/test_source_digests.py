"""Records name the tensors of a source by one digest: whatever method, slices, threads and other sources there are."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from helpers import raw_bytes, read_tensors

import hsa
from hsa.engine import streamed
from hsa.inspection.diff import compare
from hsa.methods.registry import AnyMethod, method_named, methods
from hsa.methods.settings import declared
from hsa.planning import file_layout, tensor_digests
from hsa.testing.conformance import counts
from hsa.testing.drawn_models import DrawnModels, draw_models

CHUNK = 1500
"""Elements of a chunk in these tests, where tensors are small; it divides no slice."""

WAYS = ((1 << 18, 24 << 20, 128 << 20), (1024, 0, 0), (3072, 0, 20_000), (2048, 2000, 128 << 20), (1 << 18, 0, 0))
"""Elements of a slice, bytes of a tensor that is held whole, and bytes that are kept between passes."""

Places = tuple[DrawnModels, DrawnModels]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Models for methods of whole tensors, and for those that need attention heads."""
    generic = draw_models(tmp_path_factory.mktemp("generic"), 5, random.Random(7), one_dtype=True)
    heads = draw_models(tmp_path_factory.mktemp("whisper"), 5, random.Random(8), family="whisper", one_dtype=True)
    return generic, heads


def use(monkeypatch: pytest.MonkeyPatch, way: int) -> None:
    elements, whole, kept = WAYS[way % len(WAYS)]
    monkeypatch.setattr(tensor_digests, "DIGEST_ELEMENTS", CHUNK)
    monkeypatch.setattr(file_layout, "SLICE_ELEMENTS", elements)
    monkeypatch.setattr(file_layout, "MAX_WHOLE", whole)
    monkeypatch.setattr(streamed, "KEPT_BYTES", kept)


def sources_of(method: AnyMethod, places: Places, count: int) -> dict[str, Any]:
    models = places[method.needs_heads]
    base = {} if method.contract.base == "none" else {"base": models.base}
    return {**base, "models": list(models.models[:count])}


def settings_of(method: AnyMethod) -> dict[str, Any]:
    """Settings without a default, and others than the defaults where these would cut no tensor at rows."""
    required = {each.name: 0.25 for each in declared(method.Settings) if each.about.required}
    return {**required, **({"filter_wise": True} if method.name == "model_stock" else {})}


def tensor_digest(tensor: torch.Tensor, *, whole: bool) -> str:
    data, step = raw_bytes(tensor), CHUNK * tensor.element_size()
    if whole or len(data) <= step:
        return str(blake3(data).hexdigest())
    chunks = [blake3(data[start : start + step]).hexdigest() for start in range(0, len(data), step)]
    return str(blake3("\n".join(chunks).encode()).hexdigest())


def source_digest(path: Path, names: set[str], *, whole: bool) -> str:
    """The digest over these tensors of a source, spelt out."""
    codes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    lines = []
    for stored, tensor in read_tensors(path).items():
        if stored in names:
            name, digest = stored.removeprefix("model."), tensor_digest(tensor, whole=whole)
            lines.append(json.dumps([name, codes[tensor.dtype], list(tensor.shape), digest], separators=(",", ":")))
    return str(blake3("\n".join(sorted(lines)).encode()).hexdigest())


def recorded(output: Path) -> tuple[dict[str, str], set[str]]:
    """The digest by the name of each source's directory, and the names of the merged tensors."""
    record = json.loads((output / "hsa_merge.json").read_text(encoding="utf-8"))
    return {each["id"].split(" in ")[0]: each["targets_blake3"] for each in record["sources"].values()}, set(
        record["targets"]
    )


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_records_the_digest_of_the_tensors_alone(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """For the smallest and the largest number of models, in two ways to slice; what one way wrote, verify takes in
    another."""
    method = method_named(name)
    for count in sorted({min(counts(method)), max(counts(method))}):
        sources = sources_of(method, places, count)
        given = {path.name: path for path in (*sources["models"], sources.get("base")) if path is not None}
        for number in (count, count + 1 + len(name) % 2):
            output, threads = tmp_path / f"{count}-{number}", number % 5 + 1
            use(monkeypatch, number)
            hsa.merge(method=name, **sources, **settings_of(method), output=output, threads=threads, sync=False)
            digests, targets = recorded(output)
            expected = {each: source_digest(given[each], targets, whole=method.needs_heads) for each in digests}
            assert digests == expected, (count, number)
            use(monkeypatch, number + 2)
            report = hsa.verify(output, **sources, threads=5 - number % 5)
            assert report.ok, [problem.what for problem in report.problems]


def test_a_source_has_one_digest_whatever_it_was_merged_by(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of methods that merge the same tensors are equal, and the comparison of two outputs says so."""
    found: dict[tuple[frozenset[str], str], set[str]] = defaultdict(set)
    outputs = []
    for number, name in enumerate(sorted(methods())):
        method = method_named(name)
        if method.needs_heads:
            continue
        use(monkeypatch, number)
        output = tmp_path / name
        sources = sources_of(method, places, max(2, method.contract.least) if method.contract.most > 1 else 1)
        hsa.merge(method=name, **sources, **settings_of(method), output=output, threads=1 + number % 5, sync=False)
        digests, targets = recorded(output)
        for source, digest in digests.items():
            found[frozenset(targets), source].add(digest)
        outputs.append(output)
    assert len(outputs) > 10 and set(map(len, found.values())) == {1}
    assert {source for _, source in found} >= {"base", "model1", "model2"}
    compared = compare(tmp_path / "ties", tmp_path / "model_stock")
    assert len(compared.sources) == 3
    assert all(source["same_targets"] for source in compared.sources.values()), compared.sources


def test_a_merged_source_is_known_again_whatever_it_was_merged_by(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a merge by ties with three models was made from, a merge by model stock with two of them finds again."""
    generic = places[0]
    use(monkeypatch, 2)
    hsa.merge(method="ties", base=generic.base, models=generic.models[:3], output=tmp_path / "first", sync=False)
    use(monkeypatch, 1)
    report = hsa.merge(
        method="model_stock",
        filter_wise=True,
        base=generic.base,
        models=[tmp_path / "first", generic.models[0]],
        output=tmp_path / "second",
        sync=False,
    )
    assert any("model1 was merged from model2 already" in warning for warning in report.warnings), report.warnings
