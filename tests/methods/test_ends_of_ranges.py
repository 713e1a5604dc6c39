"""A merge with the last value of a setting's range writes a record that can be read again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import read_tensors, same_tensors, write_tensors

import hsa
from hsa.methods.registry import methods
from hsa.methods.settings import MAX_FLOAT32, declared

LARGEST = [
    (name, each.name, sign)
    for name, method in methods().items()
    for each in declared(method.Settings)
    if each.about.high == MAX_FLOAT32 and not method.needs_heads
    for sign in ((1, -1) if each.about.low else (1,))
]
"""Methods with their settings that end where float32 does."""


@pytest.mark.parametrize(("method", "setting", "sign"), LARGEST)
def test_the_largest_float32_is_recorded(
    method: str, setting: str, sign: int, shared_triple: dict[str, Path], tmp_path: Path
) -> None:
    """Of models that are base, in another element type, so that they are no copies: any factor on what they moved gives
    base again."""
    base, model = (Path(shutil.copytree(shared_triple["base"], tmp_path / name)) for name in ("base", "model"))
    halves = {name: tensor.half() for name, tensor in read_tensors(base).items()}
    write_tensors(model, halves)
    write_tensors(base, {name: tensor.float() for name, tensor in halves.items()})
    contract = methods()[method].contract
    sources: dict[str, Any] = {"models": [model] * contract.least}
    if contract.base != "none":
        sources["base"] = base
    more = {setting: sign * MAX_FLOAT32, "dtype": "float32"}
    hsa.merge(method=method, **sources, **more, output=tmp_path / "out", sync=False)
    report = hsa.verify(tmp_path / "out", **sources)
    assert report.ok, report.problems
    same_tensors(tmp_path / "out", read_tensors(base))
