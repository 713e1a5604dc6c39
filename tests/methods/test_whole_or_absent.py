"""A merge by any method is whole or absent, and verify finds what was changed in it.

Runs that are killed or interrupted, flipped bits, changed decisions, and the memory that a verification takes.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forged_outputs import forge_with_card, named, told
from forked import run_python
from helpers import poke, read_tensors, write_tensors
from peak_memory import with_peak

import hsa
from hsa.backends import array_block, cpu
from hsa.engine import buffer_pool, consumers, pipeline, streamed
from hsa.engine.compute import ComputeThread
from hsa.methods.registry import method_named, methods
from hsa.planning import file_layout
from hsa.testing.drawn_models import DrawnModels, draw_models
from hsa.testing.whisper_checkpoints import SHAPES, WhisperShape, write_triple
from hsa.verification import recompute

Given = dict[str, Any]
REQUIRED: dict[str, dict[str, Any]] = {"slerp": {"t": 0.5}, "nearswap": {"t": 0.001}}
HEADS = "model.encoder.layers.0.self_attn.v_proj.weight"

EVERY = pytest.mark.parametrize("method", methods())


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, DrawnModels]:
    """Float32 models by whether they have heads."""
    found = {}
    for heads in (False, True):
        family = "whisper" if heads else "generic"
        models = draw_models(tmp_path_factory.mktemp(family), 2, random.Random(1), family=family, one_dtype=True)  # type: ignore[arg-type]
        for path in (models.base, *models.models):
            write_tensors(path, {name: tensor.float() for name, tensor in read_tensors(path).items()})
        found[heads] = models
    return found


def sources(method: str, base: Path, models: list[Path]) -> Given:
    """The sources of a merge by the method."""
    contract = method_named(method).contract
    given: Given = {"models": models[: contract.most]}
    return given if contract.base == "none" else {**given, "base": base}


@pytest.fixture
def given(method: str, families: Mapping[bool, DrawnModels]) -> Given:
    models = families[method_named(method).needs_heads]
    return sources(method, models.base, list(models.models))


def merge(method: str, given: Given, output: Path, **more: Any) -> hsa.MergeReport:
    return hsa.merge(method=method, **given, **REQUIRED.get(method, {}), output=output, sync=False, **more)


# --- killed and interrupted ------------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
import hsa
from hsa.engine.compute import ComputeThread
order = json.loads(sys.argv[1])
owner, name = (os, "pwritev") if order["at"] == "write" else (ComputeThread, "compute")
function, calls = getattr(owner, name), 0
def counted(*arguments):
    global calls
    calls += 1
    if calls == order["call"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)
setattr(owner, name, counted)
hsa.merge(**order["merge"], threads=1)
"""


@EVERY
def test_a_killed_merge_leaves_nothing_that_the_next_run_does_not_clear(
    method: str, given: Given, tmp_path: Path
) -> None:
    output = tmp_path / "place" / "out"
    arguments = {"method": method, **given, **REQUIRED.get(method, {}), "output": output, "max_shard_size": "9KB"}
    for at, call in (("compute", 3), ("write", 2)):
        order = json.dumps({"at": at, "call": call, "merge": arguments}, default=str)
        done = run_python(KILLED, order, env={})
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert os.listdir(output.parent) == [".out.hsa-staging"], at
    merge(method, given, output)
    assert os.listdir(output.parent) == ["out"]
    assert hsa.verify(output, **given).ok


@EVERY
@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (MemoryError(), MemoryError), (OSError(28, "full"), hsa.MachineError)],
    ids=repr,
)
def test_an_interrupted_merge_leaves_nothing(
    method: str,
    error: BaseException,
    raised: type[BaseException],
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, function = [0], ComputeThread.compute

    def failing(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise error
        return function(*arguments)

    monkeypatch.setattr(ComputeThread, "compute", failing)
    with pytest.raises(raised):
        merge(method, given, tmp_path / "place" / "out", max_shard_size="9KB", threads=3)
    assert list(tmp_path.iterdir()) == []


# --- what verify finds -----------------------------------------------------------------------------------------------


@pytest.fixture
def output(method: str, given: Given, tmp_path: Path) -> Path:
    merge(method, given, tmp_path / "out", max_shard_size="1GB")
    return tmp_path / "out"


def merged_tensor(method: str, output: Path) -> str:
    """A tensor whose merged values differ from the first model's."""
    return HEADS if method_named(method).needs_heads else "layers.0.fc.weight"


@pytest.mark.unverified("a bit was flipped")
@EVERY
def test_a_flipped_bit_is_found_with_and_without_the_sources(method: str, given: Given, output: Path) -> None:
    """In every merged tensor: without the sources by digests, and where these were made to fit by the sources."""
    name = merged_tensor(method, output)
    # Where another machine may round otherwise, a bit that rounding does not reach.
    bit = 23 if method_named(method).tolerance else 0
    values = read_tensors(output)[name].reshape(-1).numpy()
    place = int(np.abs(values).argmax())
    flipped = (values[place : place + 1].view(np.uint32) ^ np.uint32(1 << bit)).tobytes()
    poke(output / "model.safetensors", name, place, flipped)
    report = hsa.verify(output)
    assert not report.ok and named(report) == {"model.safetensors"}, told(report)
    report = hsa.verify(output, **given)
    assert (report.bytes_follow, report.decisions_follow) == (False, True) and name in told(report), told(report)
    forge_with_card(output, lambda document: None)
    assert hsa.verify(output).ok
    report = hsa.verify(output, **given)
    assert (report.bytes_follow, report.decisions_follow) == (False, True) and name in told(report), told(report)


def numbers_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """Where numbers stand in a decision: what holds each, and its key or index there."""
    entries: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in list(entries):
        if isinstance(entry, (int, float)) and not isinstance(entry, bool):
            yield value, key
        yield from numbers_of(entry)


@pytest.mark.unverified("a decision was changed")
@EVERY
def test_a_changed_decision_is_found(method: str, given: Given, output: Path) -> None:
    """Every number of a recorded decision, one at a time."""
    name, count = merged_tensor(method, output), 0
    original = (output / "hsa_merge.json").read_bytes(), (output / "README.md").read_bytes()
    while True:
        changed: list[bool] = []

        def change(document: dict[str, Any], number: int = count, changed: list[bool] = changed) -> None:
            places = list(numbers_of(document["targets"][name]["decision"]))
            if number < len(places):
                holder, key = places[number]
                holder[key] = holder[key] + 1 if isinstance(holder[key], int) else holder[key] * 1.001 + 1e-6
                changed.append(True)

        try:
            forge_with_card(output, change)
        except hsa.HsaError:  # the card cannot be written: the record is refused when it is read
            assert changed
        else:
            if not changed:
                break
            report = hsa.verify(output, **given)
            assert not report.ok and report.decisions_follow is not True, (count, told(report))
        for file, data in zip(("hsa_merge.json", "README.md"), original, strict=True):
            (output / file).write_bytes(data)
        count += 1
    assert count > 0 or "digest" in (output / "hsa_merge.json").read_text()


# --- memory ----------------------------------------------------------------------------------------------------------


def deeper(layers: int) -> WhisperShape:
    return WhisperShape(**{**vars(SHAPES["test"]), "encoder_layers": layers, "d_model": 128, "ffn_dim": 300})


def write_size(method: str, folder: Path, times: int) -> Given:
    """Sources of so many layers; one tensor, too large to be held whole, grows with them."""
    if method_named(method).needs_heads:
        base, *models = write_triple(folder, deeper(3 * times), processor=False).values()
        return sources(method, base, models)
    generator, paths = torch.Generator().manual_seed(times), []
    for number in range(3):
        held = {f"layers.{n}.fc.weight": torch.randn(64, 128, generator=generator) for n in range(4 * times)}
        held["embed_tokens.weight"] = torch.randn(256 * times, 256, generator=generator)
        path = folder / str(number)
        path.mkdir(parents=True)
        (path / "config.json").write_text('{"model_type": "drawn"}')
        write_tensors(path, held)
        paths.append(path)
    return sources(method, paths[0], paths[1:])


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held at a time is small beside the models."""
    for module, name, value in (
        (file_layout, "SLICE_ELEMENTS", 1 << 14),
        (file_layout, "MAX_WHOLE", 1 << 18),
        (streamed, "KEPT_BYTES", 0),
        (array_block, "TILE", 1 << 14),
        (cpu, "TILE", 1 << 14),
        (buffer_pool, "BUDGET_BYTES", 1 << 20),
        (buffer_pool, "SPARE_BYTES", 1 << 18),
        (pipeline, "AHEAD_BYTES", 1 << 16),
        (consumers, "CACHED_PIECE", 1 << 16),
        (consumers, "DIRECT_PIECE", 1 << 16),
        (recompute, "CACHED_PIECE", 1 << 16),
    ):
        monkeypatch.setattr(module, name, value)


@EVERY
def test_the_memory_of_a_verification_does_not_grow_with_the_models(
    method: str, tmp_path: Path, small_parts: None
) -> None:
    small, large = (write_size(method, tmp_path / f"models{times}", times) for times in (1, 8))
    growth = size_of(large) - size_of(small)
    held = peak_of_verification(method, small, tmp_path / "out1", 0)
    # What grows is the record: some kB a tensor, which are small here.
    bound = held + growth / 5
    assert peak_of_verification(method, large, tmp_path / "out8", bound) < bound, growth


def peak_of_verification(method: str, given: Given, output: Path, enough: float) -> int:
    merge(method, given, output, threads=1)
    report, peak = with_peak(lambda: hsa.verify(output, **given, threads=1), enough)
    assert report.ok and report.bytes_follow
    return peak


def size_of(given: Given) -> int:
    """Bytes of the weights of all sources."""
    sources = [each for each in (given.get("base"), *given["models"]) if each]
    return sum(file.stat().st_size for source in sources for file in source.glob("*.safetensors"))
