"""Families of models are found in the package and in plugin files, and a family decides how a checkpoint is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from murmur_checkpoints import STACKS, murmur_name, write_murmur

import hsa
from hsa.architectures import registry
from hsa.architectures.base import PRESETS
from hsa.architectures.generic import GENERIC
from hsa.architectures.whisper import WHISPER
from hsa.errors import MismatchError, RequestError
from hsa.sources.checkpoint import open_checkpoint
from hsa.sources.structure import faults
from hsa.system.fsio import Tally
from hsa.system.plugins import VARIABLE

PLUGIN = Path(__file__).parents[1] / "support" / "murmur_family.py"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(PLUGIN))
    return PLUGIN


@pytest.fixture
def murmurs(shared_triple: dict[str, Path], tmp_path: Path, plugin: Path) -> dict[str, Path]:
    return {role: write_murmur(path, tmp_path / "murmurs" / role) for role, path in shared_triple.items()}


def test_the_package_has_whisper_and_what_any_other_model_is() -> None:
    assert dict(registry.architectures()) == {"generic": GENERIC, "whisper": WHISPER}
    assert registry.with_heads() == [WHISPER]
    assert registry.named("whisper") is registry.default() is WHISPER


def test_a_plugin_is_found_beside_the_package_and_loaded_once(plugin: Path) -> None:
    families = registry.architectures()
    assert list(families) == ["generic", "whisper", "murmur"]
    assert registry.named("murmur") is families["murmur"]
    assert registry.architecture_of({"model_type": "murmur"}) is families["murmur"]
    assert registry.architecture_of({"model_type": "whisper"}) is WHISPER


def test_a_checkpoint_of_the_plugin_opens_with_its_places(
    murmurs: dict[str, Path], shared_triple: dict[str, Path]
) -> None:
    with (
        open_checkpoint("primary", murmurs["primary"], Tally()) as checkpoint,
        open_checkpoint("primary", shared_triple["primary"], Tally()) as whisper,
    ):
        family = checkpoint.architecture
        assert family is registry.named("murmur")
        assert set(checkpoint.tensors) == {murmur_name(name) for name in whisper.tensors}
        assert list(faults(checkpoint)) == []
        for name in whisper.tensors:
            theirs, place = WHISPER.place(name), family.place(murmur_name(name))
            assert (theirs is None) == (place is None)
            if theirs is not None and place is not None:
                assert (place.name, place.stack) == (murmur_name(name), STACKS[theirs.stack])
                assert (place.layer, place.block, place.kind, place.part, place.presets) == (
                    *(theirs.layer, theirs.block, theirs.kind, theirs.part),
                    theirs.presets,
                )


@pytest.mark.parametrize("preset", PRESETS)
def test_the_heads_of_the_plugin_are_scored_as_those_of_whisper(
    murmurs: dict[str, Path], shared_triple: dict[str, Path], preset: str
) -> None:
    found = hsa.inspect(**murmurs, targets=preset)
    expected = hsa.inspect(**shared_triple, targets=preset)
    assert list(found.tensors) == [murmur_name(name) for name in expected.tensors]
    for name, tensor in expected.tensors.items():
        same = found.tensors[murmur_name(name)]
        assert (same.heads, same.layers, same.scores, same.selected) == (
            *(tensor.heads, tensor.layers, tensor.scores, tensor.selected),
        )


def test_messages_name_the_family_and_its_keys(murmurs: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((murmurs["primary"] / "config.json").read_text())
    (murmurs["primary"] / "config.json").write_text(json.dumps(config | {"text_decoder_layers": 9}))
    with pytest.raises(MismatchError, match=r"text_decoder\.layers\.\d.*MurmurForSpeech, text_decoder_layers 9"):
        hsa.merge(**murmurs, output=tmp_path / "out")


def test_sources_of_two_families_are_refused(
    murmurs: dict[str, Path], shared_triple: dict[str, Path], tmp_path: Path
) -> None:
    mixed = {**murmurs, "secondary": shared_triple["secondary"]}
    with pytest.raises(
        MismatchError, match=r"primary .* is a Murmur checkpoint, and secondary .* a Whisper checkpoint"
    ):
        hsa.merge(**mixed, output=tmp_path / "out")


def test_a_model_type_of_no_family_is_generic_and_the_error_names_those_with_heads(plugin: Path) -> None:
    assert registry.architecture_of({"model_type": "bert"}) is GENERIC
    error = registry.not_with_heads({"model_type": "bert"}, "x")
    assert str(error) == (
        "x is not a Whisper or Murmur checkpoint: its config.json has model_type 'bert', supported are 'whisper', "
        "'murmur'"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("exit(0)", "SystemExit: 0"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named_in_one_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    monkeypatch.setenv(VARIABLE, os.pathsep.join([str(PLUGIN), str(path)]))
    with pytest.raises(RequestError) as caught:
        registry.architectures()
    assert str(caught.value).startswith(f"HSA_PLUGINS: {path} cannot be loaded ({message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [("none.py", "cannot be loaded"), ("family.txt", "is no Python file")])
def test_a_path_that_is_no_python_file_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / name))
    with pytest.raises(RequestError, match=f"{name} {message}"):
        registry.architectures()


def test_a_family_that_lacks_something_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bare.py"
    text = PLUGIN.read_text().replace("    name = ", "    called = ").replace("    width = ", "    size = ")
    path.write_text(text)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(RequestError, match=r"bare\.py: the family Murmur has no name and width; docs/contributing/"):
        registry.architectures()


@pytest.mark.parametrize("change", ["name", "model_types"])
def test_two_families_of_one_name_or_model_type_are_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"{change}.py"
    value = "'other'" if change == "name" else "frozenset({'other'})"
    path.write_text(
        "from hsa.architectures.whisper import Whisper\n\n\n"
        f"class Other(Whisper):\n    {change} = {value}\n\n\nOTHER = Other()\n"
    )
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(RequestError, match=r"two families of models are named .* or have one model_type"):
        registry.architectures()
