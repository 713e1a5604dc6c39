"""The bytes of the weights files: sizes, shards, indices, headers, alignment."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import hsa
from hsa.architectures.base import Partition
from hsa.errors import RequestError
from hsa.methods.hsa import TARGET, HsaSettings
from hsa.methods.tensors import TensorTask
from hsa.planning import file_layout
from hsa.planning.file_layout import SLICE_ELEMENTS, Bytes, Computed, Copy, OutputFile, TensorContent, pack, pieces_of
from hsa.planning.plan import make_plan
from hsa.sources.checkpoint import CONFIG, INDEX, WEIGHTS, Checkpoint, open_checkpoint
from hsa.sources.safetensors import TensorEntry, parse, serialize
from hsa.sources.source_set import Sources
from hsa.sources.tensor_places import TensorRef
from hsa.system.dtypes import BITS
from hsa.system.fsio import Tally
from hsa.system.types import parse_size
from hsa.testing.whisper_checkpoints import SHAPES, tensor_shapes, write_triple

# Sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        (" 5 GB ", 5 * 10**9),
        ("500MiB", 500 * 2**20),
        ("1TB", 10**12),
        ("1KiB", 1024),
        ("1.5GiB", 3 * 2**29),
        ("0.57KB", 570),
        ("1000000", 1_000_000),
        ("7B", 7),
        ("1", 1),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == pytest.approx(size, rel=1e-15, abs=0)
    assert isinstance(parse_size(text), int)


def test_the_largest_size_is_what_a_file_can_have() -> None:
    assert parse_size(str(2**63 - 1)) == 2**63 - 1


@given(value=st.integers(1, 8 * 10**9), unit=st.sampled_from(["KB", "MB", "GB", "KiB", "MiB", "GiB", "B", ""]))
@settings(deadline=None)
def test_parse_size_is_exact_for_whole_numbers(value: int, unit: str) -> None:
    power = {"K": 1, "M": 2, "G": 3}.get(unit[:1], 0)
    assert parse_size(f"{value}{unit}") == value * (1024 if "i" in unit else 1000) ** power


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "0",
        "0GB",
        "0.4",
        "-1GB",
        "+1GB",
        "1e9",
        "5 XB",
        "5GBs",
        "five GB",
        "5,5GB",
        ".5GB",
        "5.GB",
        "\u0665GB",
        "inf",
        str(2**63),
        "9223373TB",
        "1" + " " * 40,
        "0." + "0" * 40 + "1TB",
        pytest.param("9" * 4400, id="thousands of digits"),
        pytest.param("9" * 3_000_000, id="millions of digits"),
    ],
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(
        RequestError, match=r"^max_shard_size must be a size such as 5GB or 500MiB, below 2\^63 bytes, got .{1,82}$"
    ):
        parse_size(text)


# Shards ----------------------------------------------------------------------------------------------------


Tensors = list[tuple[str, str, tuple[int, ...]]]
MakeOwner = Callable[[Mapping[str, Tensors], Mapping[str, str]], Checkpoint]


@pytest.fixture
def owner_of(tmp_path: Path) -> Iterator[MakeOwner]:
    """Writes and opens a primary whose shards hold these tensors: (name, element type, shape), all zero."""
    config = {f"{stack}_{what}": 1 for stack in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    with ExitStack() as stack:

        def make(shards: Mapping[str, Tensors], metadata: Mapping[str, str]) -> Checkpoint:
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            (folder / CONFIG).write_text(json.dumps({"model_type": "whisper", **config}))
            for file, tensors in shards.items():
                entries, position = [], 0
                for name, code, shape in tensors:
                    stop = position + math.prod(shape) * BITS[code] // 8
                    entries.append(TensorEntry(name, code, shape, position, stop))
                    position = stop
                (folder / file).write_bytes(serialize(entries, metadata) + bytes(position))
            if list(shards) != [WEIGHTS]:
                placed = {name: file for file, tensors in shards.items() for name, _, _ in tensors}
                (folder / INDEX).write_text(json.dumps({"metadata": {"note": "primary's own"}, "weight_map": placed}))
            return stack.enter_context(open_checkpoint("primary", folder, Tally()))

        yield make


def copied(owner: Checkpoint) -> dict[str, TensorContent]:
    return {
        name: TensorContent(ref.name, ref.code, ref.shape, (Copy("primary", ref),))
        for name, ref in owner.tensors.items()
    }


def task_of(ref: TensorRef, code: str, *, base: bool = False, **options: Any) -> TensorTask:
    """A tensor that is no target: primary's, cast, or moved away from a base of the same place."""
    return TensorTask(
        name=ref.name,
        place=None,
        layers=0,
        shape=ref.shape,
        partition=Partition(),
        sources={"base": ref, "primary": ref} if base else {"primary": ref},
        anchor="primary",
        out_code=code,
        output_name=ref.name,
        **{"merged": base, "listed": False, **options},
    )


def header_of(file: OutputFile) -> tuple[tuple[TensorEntry, ...], Mapping[str, str]]:
    """The entries of a planned file, after checking that its segments are as the header says, without holes."""
    literal = file.segments[0].content
    assert isinstance(literal, Bytes)
    entries, metadata = parse(literal.data[8:], file.size - len(literal.data), file.name)
    position = 0
    for segment in file.segments:
        assert segment.offset == position
        position = segment.stop
    assert position == file.size
    return entries, metadata


def assert_aligned(file: OutputFile) -> None:
    literal = file.segments[0].content
    for entry in header_of(file)[0]:
        place = literal.nbytes + entry.start
        assert place % (BITS[entry.code] // 8) == 0, f"{entry.name} of {entry.code} at byte {place}"


TEN = [(f"t{n}", "F32", (25,)) for n in range(10)]


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (10_000, [1000]),
        (1000, [1000]),
        (999, [900, 100]),
        (300, [300, 300, 300, 100]),
        (399, [300, 300, 300, 100]),
        (100, [100] * 10),
        (1, [100] * 10),
    ],
)
def test_shards_fill_up_to_the_limit(owner_of: MakeOwner, limit: int, sizes: list[int]) -> None:
    owner = owner_of({WEIGHTS: TEN}, {})
    files, index = pack(owner, copied(owner), limit)
    assert [sum(e.stop - e.start for e in header_of(file)[0]) for file in files] == sizes
    assert [e.name for file in files for e in header_of(file)[0]] == [name for name, _, _ in TEN]
    assert all(header_of(file)[1] == {"format": "pt"} for file in files)
    assert all(file.clone_of is None for file in files)
    if len(sizes) == 1:
        assert (files[0].name, index) == (WEIGHTS, None)
        return
    count = len(sizes)
    assert [file.name for file in files] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert index is not None
    document = json.loads(index)
    assert document["metadata"] == {"total_size": 1000}
    assert document["weight_map"] == {e.name: file.name for file in files for e in header_of(file)[0]}


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(owner_of: MakeOwner) -> None:
    owner = owner_of({WEIGHTS: [("a", "F32", (2,)), ("large", "F32", (100,)), ("b", "F32", (2,))]}, {})
    files, _ = pack(owner, copied(owner), 50)
    assert [[e.name for e in header_of(file)[0]] for file in files] == [["a"], ["large"], ["b"]]


MIXED = [
    ("odd", "F16", (3,)),
    ("flag", "BOOL", (1,)),
    ("wide", "F32", (5,)),
    ("ids", "I64", (2,)),
    ("empty", "F32", (0,)),
]


def test_mixed_element_types_are_aligned_in_new_shards(owner_of: MakeOwner) -> None:
    owner = owner_of({WEIGHTS: MIXED}, {"format": "pt"})
    for limit in (20, 10_000):
        files, _ = pack(owner, copied(owner), limit)
        assert {e.name for file in files for e in header_of(file)[0]} == {name for name, _, _ in MIXED}
        for file in files:
            assert_aligned(file)


def test_a_new_header_over_primarys_own_files_is_aligned(owner_of: MakeOwner) -> None:
    """A cast makes odd sizes out of even ones: integers behind them must stay where torch can view them."""
    owner = owner_of({WEIGHTS: [("odd", "F32", (3,)), ("ids", "I64", (2,))]}, {"format": "pt"})
    contents = copied(owner)
    odd = owner.tensors["odd"]
    contents["odd"] = TensorContent("odd", "F16", (3,), pieces_of(task_of(odd, "F16")))
    (file,), _ = pack(owner, contents, None)
    assert_aligned(file)


def test_primarys_header_is_kept_byte_for_byte(owner_of: MakeOwner) -> None:
    metadata = {"format": "pt", "trained_with": "löve"}
    owner = owner_of({"a.safetensors": TEN[:4], "b.safetensors": TEN[4:]}, metadata)
    files, index = pack(owner, copied(owner), None)
    assert [file.name for file in files] == ["a.safetensors", "b.safetensors"]
    assert [file.clone_of for file in files] == [0, 1]
    assert index == owner.index
    for file, shard in zip(files, owner.shards, strict=True):
        header_of(file)
        assert file.segments[0].content == Bytes(shard.header.raw)


@pytest.mark.parametrize("metadata", [{}, {"format": "tf"}, {"trained_with": "care"}])
def test_a_header_without_format_pt_is_made_anew_and_keeps_the_rest(
    owner_of: MakeOwner, metadata: dict[str, str]
) -> None:
    owner = owner_of({WEIGHTS: TEN}, metadata)
    (file,), index = pack(owner, copied(owner), None)
    assert header_of(file) == (owner.shards[0].header.entries, {**metadata, "format": "pt"})
    assert (file.clone_of, index) == (None, None)


def test_a_cast_makes_headers_and_index_anew(owner_of: MakeOwner) -> None:
    owner = owner_of({"a.safetensors": TEN[:4], "b.safetensors": TEN[4:]}, {"format": "pt"})
    contents = {
        name: TensorContent(ref.name, "F16", ref.shape, pieces_of(task_of(ref, "F16")))
        for name, ref in owner.tensors.items()
    }
    files, index = pack(owner, contents, None)
    assert [file.clone_of for file in files] == [None, None]
    assert [{e.code for e in header_of(file)[0]} for file in files] == [{"F16"}, {"F16"}]
    assert index is not None
    document = json.loads(index)
    assert document["metadata"] == {"total_size": 500}
    assert document["weight_map"] == {
        name: "a.safetensors" if int(name[1]) < 4 else "b.safetensors" for name in contents
    }


@pytest.mark.parametrize("elements", [0, 1, SLICE_ELEMENTS, SLICE_ELEMENTS + 1, 3 * SLICE_ELEMENTS - 1])
def test_slices_cover_a_tensor_once(elements: int) -> None:
    ref = TensorRef("t", "F32", (elements,), 0, 0, 4 * elements)
    pieces = pieces_of(task_of(ref, "BF16", base=True))
    assert not any(piece.whole for piece in pieces)
    assert [piece.first for piece in pieces] == list(range(0, elements, SLICE_ELEMENTS))
    assert sum(piece.count for piece in pieces) == elements
    assert all(0 < piece.count <= SLICE_ELEMENTS and piece.nbytes == 2 * piece.count for piece in pieces)
    assert all(dict(piece.reads()) == {"primary": 4 * piece.count, "base": 4 * piece.count} for piece in pieces)


@pytest.mark.parametrize(
    ("options", "elements", "whole"),
    [
        ({"layout": "heads", "passes": TARGET.passes}, 2 * SLICE_ELEMENTS, True),
        ({"layout": "whole", "listed": True}, 3 * SLICE_ELEMENTS, True),
        ({"listed": True}, file_layout.MAX_WHOLE // 10, True),
        ({"listed": True}, file_layout.MAX_WHOLE // 10 + 1, False),
        ({"listed": True, "passes": 2}, file_layout.MAX_WHOLE // 10, True),
        ({"listed": True, "passes": 2}, file_layout.MAX_WHOLE // 10 + 1, False),
        ({"listed": False}, 1, False),
    ],
)
def test_heads_and_matrices_are_one_piece_and_what_is_listed_where_it_is_small(
    options: dict[str, Any], elements: int, whole: bool
) -> None:
    """Two sources of float32 and a result of float16: ten bytes an element."""
    ref = TensorRef("t", "F32", (elements,), 0, 0, 4 * elements)
    task = task_of(ref, "F16", base=True, **options)
    pieces = pieces_of(task)
    assert [piece.whole for piece in pieces] == [whole] * len(pieces)
    assert (pieces == (Computed(task, 0, elements),)) == (whole or elements <= SLICE_ELEMENTS)
    assert sum(piece.nbytes for piece in pieces) == 2 * elements


TENSORS = st.lists(
    st.tuples(st.sampled_from(["F32", "F16", "BF16", "I64", "U8"]), st.lists(st.integers(0, 5), max_size=3)),
    max_size=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=TENSORS, limit=st.integers(1, 400))
def test_any_tensors_fit_any_limit(owner_of: MakeOwner, tensors: list[tuple[str, list[int]]], limit: int) -> None:
    owner = owner_of({WEIGHTS: [(f"t{n}", code, tuple(shape)) for n, (code, shape) in enumerate(tensors)]}, {})
    files, index = pack(owner, copied(owner), limit)
    held: dict[str, str] = {}
    for file in files:
        entries, _ = header_of(file)
        assert_aligned(file)
        assert len(entries) <= 1 or sum(e.stop - e.start for e in entries) <= limit or _one_large(entries, limit)
        held |= {e.name: file.name for e in entries}
    assert set(held) == set(owner.tensors)
    assert (index is None) == (len(files) == 1)
    if index is not None:
        assert json.loads(index)["weight_map"] == held


def _one_large(entries: tuple[TensorEntry, ...], limit: int) -> bool:
    """One tensor above the limit, and beside it tensors without any bytes."""
    sizes = sorted(entry.stop - entry.start for entry in entries)
    return sizes[-1] > limit and sizes[-2] == 0


# Whole plans and whole outputs -----------------------------------------------------------------------------


def plan_of(triple: Mapping[str, Path], **changes: Any) -> list[OutputFile]:
    limit = changes.pop("max_shard_size", None)
    opened = [open_checkpoint(role, triple[role], Tally()) for role in ("base", "primary", "secondary")]  # type: ignore[arg-type]
    try:
        return list(make_plan(HsaSettings(**changes), Sources.of_checkpoints(opened), limit).files)
    finally:
        for source in opened:
            source.close()


def test_a_plan_over_primarys_layout_repeats_its_headers(tmp_path: Path) -> None:
    triple = write_triple(tmp_path, SHAPES["test"], max_shard_bytes=200_000)
    files = plan_of(triple)
    assert len(files) > 1
    for file in files:
        raw = (triple["primary"] / file.name).read_bytes()
        literal = file.segments[0].content
        assert isinstance(literal, Bytes)
        assert raw.startswith(literal.data)
        assert file.size == len(raw)


@pytest.mark.parametrize("limit", [150_000, "150kB", "0.1MiB"])
def test_an_output_in_new_shards_holds_the_same_tensors(
    shared_triple: Mapping[str, Path], tmp_path: Path, limit: str | int
) -> None:
    plain = hsa.merge(**shared_triple, output=tmp_path / "plain", sync=False).output
    output = hsa.merge(**shared_triple, output=tmp_path / "sharded", max_shard_size=limit, sync=False).output
    shards = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(shards) > 2
    assert not (output / WEIGHTS).exists()
    index = json.loads((output / INDEX).read_text())
    expected, found = read_tensors(plain), read_tensors(output)
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    assert sorted(set(index["weight_map"].values())) == shards
    for name in shards:
        with safe_open(output / name, "pt") as file:  # type: ignore[no-untyped-call]
            assert file.metadata() == {"format": "pt"}
            assert {key for key, shard in index["weight_map"].items() if shard == name} == set(file.keys())
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118
            assert len(sizes) == 1 or sum(sizes) <= parse_size(str(limit))


def test_an_index_without_metadata_is_written_anew(tmp_path: Path) -> None:
    """transformers reads an index's metadata unasked, and fails on an index that has none."""
    triple = write_triple(tmp_path / "sources", SHAPES["test"], max_shard_bytes=300_000)
    path = triple["primary"] / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["metadata"]
    path.write_text(json.dumps(index))
    report = hsa.merge(output=tmp_path / "out", **triple)
    written = json.loads((report.output / path.name).read_text())
    assert written["weight_map"] == index["weight_map"]
    assert written["metadata"]["total_size"] == sum(
        math.prod(shape) * 4 for shape in tensor_shapes(SHAPES["test"]).values()
    )
