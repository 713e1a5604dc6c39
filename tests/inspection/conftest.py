"""What the tests inspect: an output, and a triple of mixed element types."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import read_tensors, write_tensors

import hsa

Triple = dict[str, Path]


@pytest.fixture(scope="session")
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
