"""Adapters that were trained on another base are told by their own configs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import read_tensors, write_adapter
from warned_merges import EVERY, warnings_of

Triple = Mapping[str, Path]


@pytest.mark.parametrize(
    ("trained_on", "base_id", "told"),
    [
        ("openai/whisper-small", "openai/whisper-base", True),
        ("openai/whisper-small", "other/whisper-small@v1", True),
        ("openai/whisper-small", "openai/whisper-small@v1", False),
        ("OpenAI/whisper-small", "openai/whisper-small", False),
        ("whisper-small", "openai/whisper-base", False),
        ("/home/somebody/whisper-small", "openai/whisper-base", False),
        ("openai/whisper-small", None, False),
        (None, "openai/whisper-base", False),
        (17, "openai/whisper-base", False),
    ],
)
@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_an_adapter_made_for_another_base_is_told(
    shared_triple: Triple, role: str, trained_on: Any, base_id: str | None, told: bool, tmp_path: Path
) -> None:
    weights = {n: t for n, t in read_tensors(shared_triple["base"]).items() if n.endswith(EVERY)}
    write_adapter(tmp_path / "adapter", weights, base_model_name_or_path=trained_on)
    found = warnings_of({**shared_triple, role: tmp_path / "adapter"}, tmp_path / "out", base_id=base_id)
    assert ("adapter was trained on" in found) == told, found
    if told:
        assert re.search(
            f"{role}'s adapter was trained on '{trained_on}'.*base is '{base_id.partition('@')[0]}'", found
        )
