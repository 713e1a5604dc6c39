"""Every registered method against its formula: drawn models, settings, slices, threads, shards and element types.

A method that is registered and has no formula in `tests/support/oracles.py` fails here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracles import EXPECTATIONS
from sampling import EVERYTHING

from hsa.methods.registry import methods
from hsa.testing.conformance import check_count, counts

MERGES = 8
"""Merges of each method, at least, over all numbers of models."""

CASES = [(name, count) for name, method in methods().items() for count in counts(method)]


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_torch() -> Iterator[None]:
    """The oracles' tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("method", "count"), CASES)
def test_a_method_is_its_formula(method: str, count: int, tmp_path: Path) -> None:
    assert method in EXPECTATIONS, (
        f"method {method} is registered and nothing says what it must compute: write its formula in plain torch into "
        f"hsa/reference/ and add it to EXPECTATIONS in tests/support/oracles.py"
    )
    trials = -(-MERGES // len(counts(methods()[method])))
    check_count(method, count, EXPECTATIONS[method], tmp_path, trials=10 * trials if EVERYTHING else trials)


def test_no_formula_is_left_over() -> None:
    assert EXPECTATIONS.keys() == methods().keys()
