"""Tensors that are equal in all sources, or where they begin: each source is read once, and no byte changes."""

from __future__ import annotations

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
from hsa.testing.whisper_checkpoints import SHAPES, WhisperShape, write_checkpoint

SHAPE = WhisperShape(**{**vars(SHAPES["test"]), "vocab_size": 1031})
EMBEDDING = "model.decoder.embed_tokens.weight"
PASSES = Path(__file__).parents[1] / "support" / "two_pass_method.py"
METHODS = ("linear", "task_arithmetic", "slerp", "model_stock", "ties", "two_passes")
EVERYTHING = 64 << 20
"""Bytes that are kept in memory; all tensors of all models have less."""

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


def bytes_read_twice(ranges: Ranges) -> dict[str, int]:
    """By source, how many bytes were read more than once; sources without any are left out."""
    repeated: dict[str, int] = defaultdict(int)
    for name, each in ranges.items():
        end = 0
        for start, stop in sorted(each):
            if start < end:
                repeated[name] += min(stop, end) - start
            end = max(end, stop)
    return dict(repeated)


def request(method: str, sources: Mapping[str, Any]) -> dict[str, Any]:
    models = sources["models"][: 1 if method == "slerp" else None]
    base = {} if method == "linear" else {"base": sources["base"]}
    settings = {"t": 0.25} if method == "slerp" else {}
    return {"method": method, **base, "models": models, **settings, "sync": False}


@pytest.mark.unverified("the reads of verify would be counted too")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("kept", [EVERYTHING, LESS_THAN_THE_EMBEDDING])
def test_each_source_of_a_frozen_decoder_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, count: int, kept: int
) -> None:
    """Where a tensor exceeds what is kept, the rest of it is read again, of one source. What methods with passes
    measure of a tensor that differs and exceeds it is read once for each pass: those tensors are left out here."""
    sources = write_models(tmp_path, count, dtype)
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for method in METHODS:
        hsa.merge(**request(method, sources), output=tmp_path / "expected" / method)
        expected[method] = read_tensors(tmp_path / "expected" / method)
    monkeypatch.setattr(streamed, "KEPT_BYTES", kept)
    for number, method in enumerate(METHODS):
        limits = {} if kept == EVERYTHING or number < 2 else {"only": "decoder.*"}
        for threads in (1 + number % 3, 4):
            output = tmp_path / f"{method}-{threads}"
            with watched(monkeypatch) as ranges:
                hsa.merge(**request(method, sources), **limits, output=output, threads=threads)
            repeated = bytes_read_twice(ranges)
            if kept == EVERYTHING:
                assert repeated == {}
            elif method != "two_passes":  # which copies nothing, so what is not kept is read in both passes
                width = 2 if dtype == "float16" else 4
                embedding = SHAPE.vocab_size * SHAPE.d_model * width
                assert set(repeated) == {"fine0"}, (method, threads, repeated)
                assert embedding - kept <= repeated["fine0"] < 2 * embedding
            found = read_tensors(output)
            for name, tensor in found.items():
                if not limits or ".decoder." in name:
                    assert raw_bytes(tensor) == raw_bytes(expected[method][name]), (method, name)
            assert raw_bytes(found[EMBEDDING]) == raw_bytes(read_tensors(sources["base"])[EMBEDDING])


@pytest.mark.unverified("the reads of verify would be counted too")
@pytest.mark.parametrize("kept", [EVERYTHING, LESS_THAN_THE_EMBEDDING, 0])
@pytest.mark.parametrize("method", METHODS)
def test_a_difference_at_the_end_is_merged_of_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kept: int
) -> None:
    """The whole embedding is computed by the method then, and equal slices that were kept are not read again."""
    sources = write_models(tmp_path, 3, "float32", change_last=True)
    with monkeypatch.context() as patch:
        patch.setattr(file_layout, "MAX_WHOLE", 24 << 20)
        hsa.merge(**request(method, sources), output=tmp_path / "whole" / "out")
    monkeypatch.setattr(streamed, "KEPT_BYTES", kept)
    for threads in (1, 4):
        with watched(monkeypatch) as ranges:
            hsa.merge(**request(method, sources), output=tmp_path / str(threads) / "out", threads=threads)
        assert snapshot(tmp_path / str(threads)) == snapshot(tmp_path / "whole")
        if kept == EVERYTHING:
            assert bytes_read_twice(ranges) == {}
    target = hsa.inspect(tmp_path / "1" / "out").tensors[EMBEDDING]
    assert not target.copied


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
