"""The sources of a merge: any number of models, with a base or without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsa.architectures.whisper import WHISPER
from hsa.errors import MismatchError, SourceError
from hsa.sources.checkpoint import Checkpoint
from hsa.sources.identity import Identity
from hsa.sources.source_set import Sources
from hsa.sources.tensor_places import TensorRef
from hsa.system.fsio import Tally


def checkpoint(role: str, *refs: TensorRef) -> Checkpoint:
    tensors = {ref.name: ref for ref in refs}
    return Checkpoint(role, Path(role), Identity(f"org/{role}"), {}, WHISPER, Tally(), tensors=tensors)


def weight(code: str = "F32", shape: tuple[int, ...] = (2, 2)) -> TensorRef:
    return TensorRef("weight", code, shape, 0, 0, 16)


@pytest.mark.parametrize("models", [("primary",), ("primary", "secondary"), ("primary", "second", "third", "fourth")])
@pytest.mark.parametrize("base", [None, "base"])
def test_roles_keep_their_order(base: str | None, models: tuple[str, ...]) -> None:
    roles = models if base is None else (base, *models)
    sources = Sources.of_checkpoints(map(checkpoint, roles))
    assert sources.roles == roles
    assert [source.role for source in sources] == list(roles)
    assert (sources.base, sources.anchor, sources.models) == (base, "primary", models)
    assert sources.anchor_checkpoint is sources.of("primary")
    assert len(sources.pairs) == len(roles) * (len(roles) - 1) // 2
    assert all(roles.index(one) < roles.index(two) for one, two in sources.pairs)


def test_the_pairs_of_three_sources() -> None:
    sources = Sources.of_checkpoints(map(checkpoint, ("base", "primary", "secondary")))
    assert sources.pairs == (("base", "primary"), ("base", "secondary"), ("primary", "secondary"))


def test_there_is_no_base_to_ask_for_in_a_merge_without_one() -> None:
    sources = Sources.of_checkpoints(map(checkpoint, ("primary", "second")))
    with pytest.raises(LookupError):
        _ = sources.base_checkpoint


def test_other_identities_leave_the_sources_as_they_were() -> None:
    sources = Sources.of_checkpoints(map(checkpoint, ("base", "primary", "third")))
    renamed = sources.with_identities({"third": Identity("org/other")})
    assert [source.identity.id for source in renamed] == ["org/base", "org/primary", "org/other"]
    assert [source.identity.id for source in sources] == ["org/base", "org/primary", "org/third"]
    assert (renamed.roles, renamed.anchor, renamed.base) == (sources.roles, sources.anchor, sources.base)


def test_bases_tensor_where_the_arithmetic_needs_it() -> None:
    sources = Sources.of_checkpoints([checkpoint("base", weight("F16")), checkpoint("primary", weight())])
    assert sources.base_of("weight", weight(), "a scale") == weight("F16")


@pytest.mark.parametrize(
    ("refs", "kind", "message"),
    [
        ((), MismatchError, "tensor weight is missing from base, and a scale needs it"),
        ((weight(shape=(4, 1)),), MismatchError, r"the shape differs: base \[4, 1\], primary \[2, 2\]"),
        ((weight("I32"),), SourceError, "base base: tensor weight has dtype I32, and a scale needs one of"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(refs: tuple[TensorRef, ...], kind: type[Exception], message: str) -> None:
    sources = Sources.of_checkpoints([checkpoint("base", *refs), checkpoint("primary", weight())])
    with pytest.raises(kind, match=message):
        sources.base_of("weight", weight(), "a scale")
