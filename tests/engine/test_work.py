"""A guard against regressions that counts work, never seconds: bytes, system calls, buffers, passes over the data."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import blake3
import pytest

import hsa
from hsa.architectures.whisper import WHISPER
from hsa.backends import cpu
from hsa.engine import consumers, pipeline
from hsa.methods import geometry
from hsa.methods import hsa as hsa_method
from hsa.methods.hsa import Hsa, HsaSettings
from hsa.planning import equal_sources
from hsa.planning.file_layout import Computed
from hsa.sources.checkpoint import open_checkpoint
from hsa.system import fsio
from hsa.system.fsio import Tally
from hsa.system.huge_pages import HUGE_PAGE
from hsa.testing.whisper_checkpoints import SHAPES, WhisperShape, write_triple

Triple = dict[str, Path]
Range = tuple[int, int]
THREADS = 3


def deeper(layers: int) -> WhisperShape:
    """The smallest shape with another number of layers."""
    return WhisperShape(**{**vars(SHAPES["test"]), "encoder_layers": layers, "decoder_layers": layers})


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Triple:
    return write_triple(tmp_path_factory.mktemp("deep"), deeper(24))


class Work:
    """What a run did to files: the ranges read and written, by path, and the sizes of both kinds of call."""

    def __init__(self) -> None:
        self.read: dict[str, list[Range]] = defaultdict(list)
        self.written: dict[str, list[Range]] = defaultdict(list)

    def reads_of(self, source: Path) -> list[Range]:
        return [at for path, ranges in self.read.items() if Path(path).is_relative_to(source) for at in ranges]


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    """Every preadv and pwritev of the process, as the pipeline's only ways to read and write weights."""
    work, preadv, pwritev = Work(), os.preadv, os.pwritev

    def reading(fd: int, views: list[memoryview], offset: int) -> int:
        count = preadv(fd, views, offset)
        work.read[os.readlink(f"/proc/self/fd/{fd}")].append((offset, offset + count))
        return count

    def writing(fd: int, views: list[memoryview], offset: int) -> int:
        count = pwritev(fd, views, offset)
        work.written[os.readlink(f"/proc/self/fd/{fd}")].append((offset, offset + count))
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", reading)
        patch.setattr(os, "pwritev", writing)
        yield work


def repeated(ranges: Iterable[Range]) -> int:
    """Bytes that lie in more than one of the ranges."""
    again, end = 0, 0
    for start, stop in sorted(ranges):
        again += max(0, min(end, stop) - start)
        end = max(end, stop)
    return again


def length(ranges: Iterable[Range]) -> int:
    return sum(stop - start for start, stop in ranges)


@pytest.mark.parametrize("options", [{}, {"sync": False, "digest": False}], ids=["durable", "quick"])
def test_every_byte_is_read_once_and_written_once(
    deep: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    with watched(monkeypatch) as work:
        report = hsa.merge(**deep, output=tmp_path / "out", threads=THREADS, **options)
    staged = f"{tmp_path}/.out.hsa-staging/model.safetensors"
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert length(work.written[staged]) == size
    assert repeated(work.written[staged]) == 0
    for role, source in deep.items():
        weights = str(source / "model.safetensors")
        assert repeated(work.read[weights]) == 0, f"{role} was passed over twice"
        assert length(work.reads_of(source)) == report.bytes_read_by_source[role], f"{role} is miscounted"
    assert length(work.read[str(deep["primary"] / "model.safetensors")]) == size


@pytest.mark.parametrize("preset", ["encoder-qkv", "attention-all"])
def test_of_base_and_secondary_only_headers_and_targets_are_read(
    deep: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: Any
) -> None:
    with watched(monkeypatch) as work:
        hsa.merge(**deep, output=tmp_path / "out", targets=preset, sync=False)
    for role in ("base", "secondary"):
        with open_checkpoint(role, deep[role], Tally()) as checkpoint:
            header = len(checkpoint.shards[0].header.raw)
            allowed = [
                (ref.offset, ref.offset + ref.nbytes)
                for name, ref in checkpoint.tensors.items()
                if WHISPER.target(name, preset) is not None
            ]
        read = work.read[str(deep[role] / "model.safetensors")]
        beyond = [at for at in read if at[0] >= header and not any(a <= at[0] and at[1] <= b for a, b in allowed)]
        assert beyond == []
        assert length(read) == header + length(allowed)


def test_calls_are_few(deep: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a tensor and source, and one a piece: not one a head or a page."""
    with watched(monkeypatch) as work:
        report = hsa.merge(**deep, output=tmp_path / "out", threads=THREADS)
    with open_checkpoint("primary", deep["primary"], Tally()) as checkpoint:
        tensors = len(checkpoint.tensors)
    pieces = -(-checkpoint.tensors["decoder.embed_tokens.weight"].nbytes // (1 << 20)) + tensors
    reads = sum(len(ranges) for path, ranges in work.read.items() if path.endswith(".safetensors"))
    assert reads <= 2 * len(report.tensors) + tensors + pieces // 2 + 3 * 3
    writes = work.written[f"{tmp_path}/.out.hsa-staging/model.safetensors"]
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    direct = fsio.reopen_direct(_touched(tmp_path / "probe")) is not None
    step = consumers.DIRECT_PIECE if direct else fsio.CACHED_STEP
    assert len(writes) <= -(-size // step) + consumers.DIRECT_PIECE // fsio.CACHED_STEP


def test_buffers_do_not_grow_with_the_model(deep: Triple, shared_triple: Triple, tmp_path: Path) -> None:
    def allocated(triple: Triple, name: str) -> tuple[int, int]:
        """Tensors merged, and buffers that were allocated for them."""
        count, empty = [0], cpu.CpuBackend.empty

        def counted(self: cpu.CpuBackend, nbytes: int) -> Any:
            count[0] += 1
            return empty(self, nbytes)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu.CpuBackend, "empty", counted)
            patch.setattr(consumers, "DIRECT_PIECE", 1 << 16)  # fewer than all targets begin in a piece
            patch.setattr(consumers, "CACHED_PIECE", 1 << 16)
            patch.setattr(pipeline, "AHEAD_BYTES", 1 << 16)
            report = hsa.merge(**triple, output=tmp_path / name, threads=THREADS, sync=False)
        return len(report.tensors), count[0]

    few, many = allocated(shared_triple, "shallow"), allocated(deep, "deep")
    assert many[0] == 12 * few[0]
    sizes = 2  # of a weight and of a bias
    under_way = THREADS * (3 + 5) * sizes + 5  # three sources each, results of up to five in a piece, and ahead
    assert many[1] <= under_way, f"{many[1]} buffers for {many[0]} tensors"


@pytest.mark.parametrize("dtype", ["auto", "float16"], ids=["patch", "rewrite"])
@pytest.mark.parametrize("threads", [1, THREADS])
def test_targets_are_computed_so_far_ahead_and_no_farther(
    deep: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, dtype: str
) -> None:
    """Of what is drawn: a target before the pieces that far ahead of it, a slice right before its own."""
    piece, ahead, drawn = 1 << 14, 1 << 17, list[Any]()
    draw = pipeline._PipelineRun._all_tasks

    def listed(self: pipeline._PipelineRun) -> Iterator[Any]:
        for task in draw(self):
            drawn.append(task)
            yield task

    monkeypatch.setattr(pipeline._PipelineRun, "_all_tasks", listed)
    monkeypatch.setattr(pipeline, "AHEAD_BYTES", ahead)
    monkeypatch.setattr(consumers, "DIRECT_PIECE", piece)
    monkeypatch.setattr(consumers, "CACHED_PIECE", piece)
    hsa.merge(**deep, output=tmp_path / "out", threads=threads, sync=False, dtype=dtype)
    pending: set[tuple[int, int]] = set()
    most, early = 0, 0
    for task in drawn:
        for segment in task.segments:
            pending.add((task.file.number, segment.offset))
            begins = segment.offset // piece * piece
            assert task.start <= begins <= task.start + (ahead if segment.content.whole else 0)
            early += begins > task.start
        if not task.segments:
            here = [s for s in task.file.plan.segments if s.offset < task.stop and s.stop > task.start]
            computed = [s for s in here if isinstance(s.content, Computed)]
            assert all((task.file.number, s.offset) in pending for s in computed)
            pending -= {(task.file.number, s.offset) for s in here if s.stop <= task.stop}
        held = [s for s in task.file.plan.segments if (task.file.number, s.offset) in pending]
        most = max(most, sum(s.content.nbytes for s in held))
    assert early > 0 and not pending
    largest = max(s.content.nbytes for task in drawn for s in task.segments)
    assert ahead / 4 < most <= ahead + 2 * piece + largest


@pytest.mark.unverified("the digests that verify takes would be counted too")
def test_each_output_byte_is_digested_once(deep: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in one pass; targets once more a source, for the sources' own digests."""
    digested, real = [0], blake3.blake3

    class Counting:
        def __init__(self, data: Any = b"") -> None:
            digested[0] += len(data)
            self._inner = real(data)

        def update(self, data: Any) -> Counting:
            digested[0] += len(data)
            self._inner.update(data)
            return self

        def hexdigest(self) -> str:
            return str(self._inner.hexdigest())

    monkeypatch.setattr(blake3, "blake3", Counting)
    report = hsa.merge(**deep, output=tmp_path / "out", sync=False)
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    with open_checkpoint("primary", deep["primary"], Tally()) as checkpoint:
        refs = {ref.name: ref.nbytes for ref in checkpoint.tensors.values()}
        header = len(checkpoint.shards[0].header.raw)
    targets = sum(refs[name] for name in report.tensors)
    small = sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) - weights
    assert weights + 3 * targets <= digested[0] <= weights + 3 * (targets + header) + 2 * small + (1 << 16)


def test_heads_are_scored_once_and_blended_once(deep: Triple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = {"measure": 0, "apply": 0}  # by block, and each head is one

    def counted(name: str) -> Any:
        inner = getattr(Hsa, name)

        def call(self: Hsa, *arguments: Any) -> Any:
            calls[name] += 1
            return inner(self, *arguments)

        return call

    for name in calls:
        monkeypatch.setattr(Hsa, name, counted(name))
    report = hsa.merge(**deep, output=tmp_path / "out", sync=False)
    assert calls == {"measure": report.total_heads, "apply": report.selected_heads}

    calls.update(measure=0, apply=0)
    merger = hsa.Merger(**deep, backend="cpu")
    assert calls == {"measure": report.total_heads, "apply": 0}
    state = merger.merge(lam=0.1)
    for lam in (0.2, 0.3, 0.4):
        merger.apply_(state, lam=lam)
    assert calls == {"measure": report.total_heads, "apply": 4 * report.selected_heads}


def test_each_head_is_summed_once_while_its_target_is_in_memory(
    deep: Triple, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The sums that a report's figures come from: one pass, in float32, and no source is compared beyond its start."""
    tiles, in_float64, pieces = [0], [0], [0]
    sums, dot, piece = geometry.tile_sums, geometry.dot, equal_sources._equal_piece

    def counted_sums(*arrays: Any) -> Any:
        tiles[0] += 1
        return sums(*arrays)

    def counted_dot(x: Any, y: Any, *, wide: bool = False) -> float:
        in_float64[0] += wide or x.dtype != "float32"
        return dot(x, y, wide=wide)

    def counted_piece(*arguments: Any) -> bool:
        pieces[0] += 1
        return piece(*arguments)

    monkeypatch.setattr(hsa_method, "tile_sums", counted_sums)
    monkeypatch.setattr(geometry, "dot", counted_dot)
    monkeypatch.setattr(equal_sources, "_equal_piece", counted_piece)
    report = hsa.merge(**deep, output=tmp_path / "out", sync=False)
    assert tiles[0] == report.total_heads
    assert in_float64[0] == 0
    assert pieces[0] == 3 * len(report.tensors)  # each pair of the three sources


def test_a_merger_reads_its_sources_once(deep: Triple, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as work:
        merger = hsa.Merger(**deep, backend="cpu")
        built = {role: length(work.reads_of(path)) for role, path in deep.items()}
        state = merger.merge(lam=0.1)
        merger.apply_(state, lam=0.9)
        assert {role: length(work.reads_of(path)) for role, path in deep.items()} == built
    for path in deep.values():
        assert repeated(work.read[str(path / "model.safetensors")]) == 0


def test_a_plan_names_the_bytes_that_a_run_reads(deep: Triple, tmp_path: Path) -> None:
    from hsa.actions.merge import Request, dry_run

    plan = dry_run(Request(sources=deep, output=tmp_path / "out", settings=HsaSettings()))  # type: ignore[arg-type]
    report = hsa.merge(**deep, output=tmp_path / "out", sync=False)
    made_at_the_end = sum((tmp_path / "out" / name).stat().st_size for name in ("README.md", "hsa_merge.json"))
    assert plan.bytes_to_read == report.bytes_read
    assert plan.bytes_to_write == report.bytes_written - made_at_the_end


def test_what_is_written_past_the_page_cache_lies_in_huge_pages(
    deep: Triple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev, starts = os.pwritev, []

    def writing(fd: int, views: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            starts.append(ctypes.addressof(ctypes.c_char.from_buffer(views[0])) % HUGE_PAGE)
        return pwritev(fd, views, offset)

    monkeypatch.setattr(os, "pwritev", writing)
    monkeypatch.setattr(consumers, "DIRECT_PIECE", HUGE_PAGE)
    hsa.merge(**deep, output=tmp_path / "out", threads=THREADS)
    if not starts:
        pytest.skip(f"the filesystem of {tmp_path} has no direct writes")
    assert set(starts) == {0}


def _touched(path: Path) -> Path:
    path.touch()
    return path
