"""What the tests of a primary's structure share: merges of it, and how they are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from broken_primaries import Config, Tensors

import hsa

LAYER = "model.decoder.layers.1."


def merge(triple: Mapping[str, Path], output: Path, **options: Any) -> hsa.MergeReport:
    return hsa.merge(**triple, output=output, **{"sync": False, **options})


def refusal(run: Callable[[], object]) -> str | None:
    """The line with which a request is refused; None where it is carried out."""
    try:
        run()
    except hsa.HsaError as error:
        assert error.exit_code == 2
        assert str(error).isprintable()
        return str(error)
    return None


def renamed(old: str, new: str) -> Callable[[Tensors, Config], object]:
    return lambda tensors, _: [tensors.update({n.replace(old, new): tensors.pop(n)}) for n in [*tensors] if old in n]
