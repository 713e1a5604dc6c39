"""The sources of a request, opened: any number of models, with a base or without one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from hsa.actions.request import Request, open_sources
from hsa.errors import RequestError
from hsa.methods.hsa import HsaSettings
from hsa.sources.hub.client import Hub
from hsa.system.fsio import Tally
from hsa.testing.whisper_checkpoints import SHAPES, write_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Models of one name in different directories, by role."""
    root = tmp_path_factory.mktemp("models")
    names = ("base", "primary", "second", "third")
    return {name: write_checkpoint(root / name / "checkpoint", SHAPES["test"], processor=False) for name in names}


@pytest.mark.parametrize("roles", [("primary", "second"), ("third", "primary", "second"), ("base", "primary", "third")])
def test_sources_are_opened_in_their_order_after_base(models: Mapping[str, Path], roles: tuple[str, ...]) -> None:
    request = Request({role: models[role] for role in roles}, "out", HsaSettings())
    with ExitStack() as stack:
        sources = open_sources(request, Tally(), Hub(), stack, headers_only=True)
        assert sources.roles == tuple(sorted(roles, key=lambda role: role != "base"))
        assert sources.base == ("base" if "base" in roles else None)
        assert sources.anchor_checkpoint.path == models[next(role for role in roles if role != "base")]
        assert [source.identity.id for source in sources] == [f"checkpoint in {role}" for role in sources.roles]


def test_small_files_come_from_one_of_the_sources(models: Mapping[str, Path]) -> None:
    paths = {role: models[role] for role in ("primary", "second")}
    assert Request(paths, "out", HsaSettings(), assets_from="second").assets_from == "second"
    with pytest.raises(RequestError, match="must be one of primary, second, got 'base'"):
        Request(paths, "out", HsaSettings(), assets_from="base")
