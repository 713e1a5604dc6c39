"""Mergers of the methods that mask and vote: many candidates of one reading, models of other types, missing tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import read_tensors, same_tensors, write_tensors
from masking_models import DTYPES, METHODS, MIXED, MOST, RANDOM, cases, chosen, expected, settings_for, write_family
from sampling import EVERYTHING

import hsa
from hsa.backends import array_block, cpu
from hsa.engine import streamed
from hsa.methods.registry import method_named
from hsa.planning import file_layout

Family = dict[str, Path]
Cut = Callable[[int], None]

TYPES = {**{name: (name,) for name in DTYPES}, "mixed": MIXED}
"""Element types of base and the models, in turn."""


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_torch() -> Iterator[None]:
    """The oracles' tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return {name: write_family(tmp_path_factory.mktemp(name), dtypes) for name, dtypes in TYPES.items()}


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Cut:
    """Cuts tensors into small slices and blocks, by a number from 0, which leaves them whole."""

    def apply(number: int) -> None:
        slices, tile, kept = [(1 << 18, 1 << 17, 1 << 27), (3072, 1024, 0), (1024, 5000, 1 << 20), (9999, 2100, 0)][
            number
        ]
        monkeypatch.setattr(file_layout, "SLICE_ELEMENTS", slices)
        monkeypatch.setattr(file_layout, "MAX_WHOLE", 24 << 20 if not number else 2000)
        monkeypatch.setattr(streamed, "KEPT_BYTES", kept)
        for module in (cpu, array_block):
            monkeypatch.setattr(module, "TILE", tile)

    return apply


def counts(method: str) -> range:
    contract = method_named(method).contract
    return range(contract.least, min(contract.most, MOST) + 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_merger_makes_every_candidate_of_one_reading(method: str, families: dict[str, Family], cut: Cut) -> None:
    draw = random.Random(method)
    count = draw.choice(counts(method))
    sources = chosen(families[draw.choice(list(TYPES))], count)
    base, *models = sources.values()
    cut(draw.randrange(4))
    merger = hsa.Merger(method=method, base=base, models=models, threads=draw.randint(1, 3))
    candidates = [options for own, options in cases() if own == method]
    for options in candidates if EVERYTHING else draw.sample(candidates, 3):
        settings = settings_for(options, count)
        same_tensors(merger.merge(**settings), expected(method, sources, settings))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merger_writes_into_a_model_of_another_type(method: str, dtype: str, families: dict[str, Family]) -> None:
    count = counts(method)[-1]
    sources = chosen(families["mixed"], count)
    options = next(options for own, options in reversed(cases()) if own == method)
    settings = settings_for(options, count)
    base, *models = sources.values()
    state = {name: torch.full(t.shape, torch.nan, dtype=DTYPES[dtype]) for name, t in read_tensors(models[0]).items()}
    hsa.Merger(method=method, base=base, models=models).apply_(state, **settings)
    same_tensors(state, expected(method, sources, {**settings, "out_dtype": DTYPES[dtype]}))


@pytest.mark.parametrize("method", sorted(RANDOM))
def test_a_model_that_lacks_a_tensor_leaves_the_others_masks(
    method: str, families: dict[str, Family], tmp_path: Path
) -> None:
    sources = chosen(families["float32"], 3)
    tensors = read_tensors(sources["model2"])
    lacking = "model.decoder.embed_tokens.weight"
    tensors[lacking] = tensors[lacking][:-1]
    write_tensors(sources["model2"], tensors)
    base, *models = sources.values()
    options = {"density": 0.5}
    try:
        hsa.merge(method=method, base=base, models=models, output=tmp_path / "out", on_mismatch="skip-model", **options)
    finally:
        tensors[lacking] = torch.cat([tensors[lacking], torch.zeros(1, 64)])
        write_tensors(sources["model2"], tensors)
    wanted = expected(method, {role: path for role, path in sources.items() if role != "model2"}, options, [0, 2])
    assert read_tensors(tmp_path / "out")[lacking].equal(wanted[lacking])
