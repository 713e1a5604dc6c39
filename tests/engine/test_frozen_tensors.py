"""Tensors that are equal in all sources, or where they begin: each source is read once, and no byte changes."""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import raw_bytes, read_tensors, snapshot, write_tensors

import hsa
from hsa.engine import streamed
from hsa.engine.buffer_pool import BufferPool
from hsa.engine.kept_slices import KeptSlices
from hsa.planning import file_layout
from hsa.system.fsio import SourceFile
from hsa.system.plugins import VARIABLE
from hsa.system.scratch_file import ScratchFile
from hsa.testing.whisper_checkpoints import SHAPES, WhisperShape, write_checkpoint

SHAPE = WhisperShape(**{**vars(SHAPES["test"]), "vocab_size": 1031})
EMBEDDING = "model.decoder.embed_tokens.weight"
PASSES = Path(__file__).parents[1] / "support" / "two_pass_method.py"
METHODS = ("linear", "task_arithmetic", "slerp", "model_stock", "ties", "two_passes")
LESS_THAN_THE_EMBEDDING = 9_000
"""Bytes that are kept in memory; the embedding has 131 KB or more in one model."""

Ranges = Mapping[str, list[tuple[int, int]]]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(PASSES))
    monkeypatch.setattr(file_layout, "MAX_WHOLE", 0)
    monkeypatch.setattr(file_layout, "SLICE_ELEMENTS", 1024)


def write_models(folder: Path, count: int, dtype: str, change_last: bool = False) -> dict[str, Any]:
    """A base and fine-tunes of its encoder, whose decoders are base's; or differ in the embedding's last element."""
    write_checkpoint(folder / "base", SHAPE, seed=1, dtype=dtype)
    base = read_tensors(folder / "base")
    models = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: tensor + torch.randn(tensor.shape, generator=generator).to(tensor.dtype) / 64
            if ".encoder." in name
            else tensor
            for name, tensor in base.items()
        }
        if change_last:
            tensors[EMBEDDING] = tensors[EMBEDDING].clone()
            tensors[EMBEDDING].view(-1)[-1] += number + 1
        models.append(folder / f"fine{number}")
        write_checkpoint(models[-1], SHAPE, seed=1, dtype=dtype)
        write_tensors(models[-1], tensors)
    return {"base": folder / "base", "models": models}


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranges]:
    """The ranges of weights files that are read, by the source's directory."""
    ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
    really = SourceFile.read_into

    def reading(file: SourceFile, view: memoryview, offset: int) -> None:
        if file.path.suffix == ".safetensors":
            ranges[file.path.parent.name].append((offset, offset + len(view)))
        really(file, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(SourceFile, "read_into", reading)
        yield ranges


def assert_read_once(ranges: Ranges, sources: Mapping[str, Any]) -> None:
    for path in (sources["base"], *sources["models"]):
        if path.name not in ranges:
            continue
        end = 0
        for start, stop in sorted(ranges[path.name]):
            assert start == end, f"{path.name}: bytes {end} to {start} lie between two reads"
            end = stop
        assert end == (path / "model.safetensors").stat().st_size, f"{path.name} was not read to its end"


def request(method: str, sources: Mapping[str, Any]) -> dict[str, Any]:
    models = sources["models"][: 2 if method == "slerp" else None]
    base = {} if method in ("linear", "slerp") else {"base": sources["base"]}
    return {"method": method, **base, "models": models, "sync": False}


@pytest.mark.unverified("the reads of verify would be counted too")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("kept", [1 << 20, LESS_THAN_THE_EMBEDDING])
def test_each_source_of_a_frozen_decoder_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, count: int, kept: int
) -> None:
    """Also where the embedding, or one tensor of all sources, exceeds what is kept in memory. Only what methods with
    passes measure of a tensor that differs and exceeds it is read once for each pass."""
    sources = write_models(tmp_path, count, dtype)
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for method in METHODS:
        hsa.merge(**request(method, sources), output=tmp_path / "expected" / method)
        expected[method] = read_tensors(tmp_path / "expected" / method)
    monkeypatch.setattr(streamed, "KEPT_BYTES", kept)
    for number, method in enumerate(METHODS):
        limits = {} if kept == 1 << 20 or number < 2 else {"only": "decoder.*"}
        for threads in (1 + number % 3, 4):
            output = tmp_path / f"{method}-{threads}"
            with watched(monkeypatch) as ranges:
                hsa.merge(**request(method, sources), **limits, output=output, threads=threads)
            assert "fine0" in ranges and (not limits or "fine1" in ranges)
            if not limits:
                assert_read_once(ranges, sources)
            else:
                assert_no_range_twice(ranges)
            found = read_tensors(output)
            for name, tensor in found.items():
                if not limits or ".decoder." in name:
                    assert raw_bytes(tensor) == raw_bytes(expected[method][name]), (method, name)
            assert raw_bytes(found[EMBEDDING]) == raw_bytes(read_tensors(sources["base"])[EMBEDDING])


def assert_no_range_twice(ranges: Ranges) -> None:
    for name, each in ranges.items():
        ordered = sorted(each)
        for (_, stop), (start, _) in zip(ordered, ordered[1:], strict=False):
            assert stop <= start, f"{name}: bytes {start} to {stop} were read twice"


@pytest.mark.unverified("the reads of verify would be counted too")
@pytest.mark.parametrize("kept", [1 << 20, LESS_THAN_THE_EMBEDDING, 0])
@pytest.mark.parametrize("method", METHODS)
def test_a_difference_at_the_end_is_merged_of_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kept: int
) -> None:
    """The whole embedding is computed by the method then, and its equal slices are not read again."""
    sources = write_models(tmp_path, 3, "float32", change_last=True)
    with monkeypatch.context() as patch:
        patch.setattr(file_layout, "MAX_WHOLE", 24 << 20)
        hsa.merge(**request(method, sources), output=tmp_path / "whole" / "out")
    monkeypatch.setattr(streamed, "KEPT_BYTES", kept)
    for threads in (1, 4):
        with watched(monkeypatch) as ranges:
            hsa.merge(**request(method, sources), output=tmp_path / str(threads) / "out", threads=threads)
        assert snapshot(tmp_path / str(threads)) == snapshot(tmp_path / "whole")
        if method in ("linear", "task_arithmetic"):
            assert_read_once(ranges, sources)
    target = hsa.inspect(tmp_path / "1" / "out").tensors[EMBEDDING]
    assert not target.copied


@pytest.mark.unverified("the reads of verify would be counted too")
def test_where_no_scratch_file_can_be_written_the_first_model_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = write_models(tmp_path, 3, "float32")
    hsa.merge(**request("linear", sources), output=tmp_path / "first" / "out")
    monkeypatch.setattr(streamed, "KEPT_BYTES", LESS_THAN_THE_EMBEDDING)
    asked = [0]

    def full(file: ScratchFile, view: memoryview, offset: int) -> None:
        asked[0] += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ScratchFile, "write", full)
    with watched(monkeypatch) as ranges:
        hsa.merge(**request("linear", sources), output=tmp_path / "second" / "out", threads=1)
    assert snapshot(tmp_path / "first") == snapshot(tmp_path / "second")
    assert asked[0] > 0
    with pytest.raises(AssertionError, match="fine0: bytes"):
        assert_no_range_twice(ranges)
    del ranges["fine0"]  # type: ignore[attr-defined]
    assert_no_range_twice(ranges)


@pytest.mark.parametrize("kept", [LESS_THAN_THE_EMBEDDING, 0])
def test_verify_needs_no_scratch_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    sources = write_models(tmp_path, 2, "float16")
    given = request("task_arithmetic", sources)
    hsa.merge(**given, output=tmp_path / "out")
    before = snapshot(tmp_path)
    monkeypatch.setattr(streamed, "KEPT_BYTES", kept)
    monkeypatch.setattr(ScratchFile, "__init__", lambda file, directory: pytest.fail("verify writes nothing"))
    assert hsa.verify(tmp_path / "out", base=given["base"], models=given["models"]).ok
    assert snapshot(tmp_path) == before


def test_no_more_is_kept_in_memory_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserved is one model's tensor at most, until a slice differs; nothing is held in the end."""
    sources = write_models(tmp_path, 3, "float32")
    monkeypatch.setattr(streamed, "KEPT_BYTES", LESS_THAN_THE_EMBEDDING)
    kept: list[int] = []
    taken: list[int] = []
    really, take = KeptSlices.keep_once, BufferPool.take

    def keeping(slices: KeptSlices, *arguments: Any) -> None:
        really(slices, *arguments)
        kept.append(slices.shared_bytes)

    def taking(pool: BufferPool, cost: int) -> None:
        take(pool, cost)
        taken.append(cost)
        pools.add(pool)

    pools: set[BufferPool] = set()
    monkeypatch.setattr(KeptSlices, "keep_once", keeping)
    monkeypatch.setattr(BufferPool, "take", taking)
    hsa.merge(**request("linear", sources), output=tmp_path / "out", threads=4)
    assert LESS_THAN_THE_EMBEDDING - 4096 < max(kept) <= LESS_THAN_THE_EMBEDDING
    assert max(taken) <= LESS_THAN_THE_EMBEDDING
    assert [pool._in_use for pool in pools] == [0]
