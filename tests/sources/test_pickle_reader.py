"""What pickles of tensors say, read without unpickling them: the same as torch reads, in bounded time and memory."""

from __future__ import annotations

import io
import random
import resource
import signal
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import description, raw_bytes, read_tensors, with_description, write_pickle

from hsa.errors import HeaderError, HsaError, SourceError
from hsa.sources import checkpoint, pickle_reader
from hsa.sources.pickle_names import OpaqueValue, PickledTensor
from hsa.sources.torch_pickle import read_state_dict
from hsa.system.fsio import SourceFile, Tally

TESTS = Path(__file__).resolve().parents[1]
CORPUS = TESTS / "corpus"
Triple = dict[str, Path]


def saved(value: Any) -> bytes:
    held = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, held)
    return held.getvalue()


def read(value: Any) -> Any:
    return pickle_reader.read(description(saved(value)), "here")[0]


# The same as torch reads -----------------------------------------------------------------------------------------


def attributed(value: torch.Tensor) -> torch.Tensor:
    value.colour = "blue"  # type: ignore[attr-defined]
    return value


def module_state() -> Mapping[str, torch.Tensor]:
    state: Mapping[str, torch.Tensor] = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3)).state_dict()
    assert hasattr(state, "_metadata")
    return state


TIED = torch.randn(4, 2)
PLAIN: dict[str, Callable[[], Mapping[Any, Any]]] = {
    "a dict": lambda: {"a": torch.randn(2, 3), "b": torch.zeros(0, 4), "c": torch.tensor(1.5)},
    "an ordered dict": lambda: OrderedDict(a=torch.randn(3)),
    "a module's state": module_state,
    "parameters": lambda: {"a": torch.nn.Parameter(torch.randn(2))},
    "parameters with attributes": lambda: {"a": attributed(torch.nn.Parameter(torch.randn(2)))},
    "tensors with attributes": lambda: {"a": attributed(torch.randn(2))},
    "views": lambda: {"a": TIED[1:3], "b": TIED, "c": TIED[3]},
    "a tensor under two names": lambda: {"a": TIED, "b": TIED},
    "many names": lambda: {f"layers.{number}.weight": torch.randn(number % 3, 2) for number in range(700)},
    "names beyond ASCII": lambda: {"sch\u00f6n \U0001f600": torch.randn(1)},
    **{
        f"{dtype}": (lambda dtype=dtype: {"a": torch.ones(3, dtype=dtype)})  # type: ignore[misc]
        for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16)
    },
    "bfloat16": lambda: {"a": torch.randn(3).bfloat16(), "b": torch.randn(2).double()},
}
if hasattr(torch.nn, "Buffer"):
    PLAIN["buffers"] = lambda: {"a": torch.nn.Buffer(torch.randn(2))}


@pytest.mark.parametrize("name", PLAIN)
def test_tensors_are_found_where_torch_finds_them(tmp_path: Path, name: str) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(saved(PLAIN[name]()))
    assert found_in(path) == {key: raw_bytes(value.detach()) for key, value in torch.load(path).items()}


def found_in(path: Path) -> dict[str, bytes]:
    source, raw = SourceFile(path, "primary", Tally()), path.read_bytes()
    try:
        entries = read_state_dict(source).entries
    finally:
        source.close()
    return {entry.name: raw[entry.start : entry.stop] for entry in entries}


def mutations(archive: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Archives whose descriptions are changed at random: bytes flipped, replaced by those of other places, cut out."""
    own, rng = description(archive), random.Random(seed)
    for _ in range(count):
        data = bytearray(own)
        for _ in range(rng.choice((1, 1, 2, 3))):
            at, action = rng.randrange(len(data)), rng.randrange(4)
            if action == 0:
                data[at] = rng.randrange(256)
            elif action == 1:
                data[at] ^= 1 << rng.randrange(8)
            elif action == 2:
                start = rng.randrange(len(data))
                data[at : at + 8] = data[start : start + 8]
            else:
                del data[at : at + rng.choice((1, 2, 9))]
        yield with_description(archive, bytes(data[: len(own)]))


def test_a_changed_pickle_that_is_read_says_what_torch_reads(tmp_path: Path) -> None:
    """Or torch refuses it: what is read here is never another tensor than there."""
    sound = {"a": torch.randn(4, 3), "b": torch.nn.Parameter(torch.randn(4)), "c": TIED[1:3], "d": torch.arange(3)}
    path, read_both = tmp_path / "w.bin", 0
    for archive in mutations(saved(sound), 1500, 0):
        path.write_bytes(archive)
        try:
            found = found_in(path)
        except HsaError:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = torch.load(path, weights_only=True)
        except Exception:
            continue
        assert found == {name: raw_bytes(value.detach()) for name, value in expected.items()}
        read_both += 1
    assert read_both > 10


# What is no plain tensor ------------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "a sparse tensor"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(2)]), "a nested tensor"),
    "Size": (lambda: torch.zeros(2, 3).shape, "Size"),
    "device": (lambda: torch.device("cpu"), "device"),
    "dtype": (lambda: torch.float16, "float16"),
    "set": (lambda: {1, 2}, "set"),
    "complex": (lambda: 1j, "complex"),
    "bytes": (lambda: b"x", "bytes"),
    "bytearray": (lambda: bytearray(3), "bytearray"),
    "list": (lambda: [1], "list"),
    "None": (lambda: None, "NoneType"),
    "storage": (lambda: torch.zeros(2).untyped_storage(), "Storage"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_plain_tensor_is_named(tmp_path: Path, name: str) -> None:
    make, kind = OTHERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = {"w": make()}
    path = tmp_path / "w.bin"
    path.write_bytes(saved(value))
    with pytest.raises(SourceError, match=f"expected a state dict of plain tensors, found {kind} under 'w'"):
        found_in(path)


def test_a_training_state_is_read_and_refused_for_what_it_is(tmp_path: Path) -> None:
    """With shared values, as optimizers write them."""
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    state = {"w": weight}
    path = tmp_path / "w.bin"
    path.write_bytes(saved({"model": state, "ema": state, "optimizer": optimizer.state_dict(), "epoch": 3}))
    with pytest.raises(SourceError, match="found dict under 'model'"):
        found_in(path)


def test_a_container_in_two_places_is_not_followed() -> None:
    inner = [1, 2]
    found = read({"a": inner, "b": inner, "c": (inner,)})
    assert found == {"a": [1, 2], "b": OpaqueValue("a shared list"), "c": (OpaqueValue("a shared list"),)}


def test_a_tensor_in_two_places_is_one() -> None:
    found = read({"a": TIED, "b": TIED})
    assert isinstance(found["a"], PickledTensor)
    assert found["a"] is found["b"]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    """As with torch's own reader: of protocol 3 what protocol 2 has too."""
    path, value = tmp_path / "w.bin", {"w": torch.randn(3)}
    torch.save(value, path, pickle_protocol=protocol)
    if protocol == 3:
        assert found_in(path) == {"w": raw_bytes(value["w"])}
        return
    with pytest.raises(SourceError, match=r"byte 2 of its pickle: the instruction FRAME of pickle protocol 4"):
        found_in(path)


# Bombs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((CORPUS / "pickle").glob("*-*")), ids=lambda path: path.name)
def test_no_pickle_of_the_corpus_makes_more_values_than_it_has_instructions(path: Path) -> None:
    try:
        value, count = pickle_reader.read(path.read_bytes(), "here")
    except SourceError as error:
        assert len(str(error)) < 500
        return
    assert walked(value) <= count <= len(path.read_bytes())


def walked(value: Any) -> int:
    """How many values there are for what walks all of them, each as often as it comes."""
    ahead, found = [value], 0
    while ahead:
        value, found = ahead.pop(), found + 1
        assert found < 10**6
        ahead += (
            [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
        )
    return found


def test_many_shards_of_pickles_count_as_one(triple: Triple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links cost their sender nothing, and each shard may take as long as one file alone."""
    write_pickle(triple["secondary"], read_tensors(triple["secondary"]), shards=3)
    sizes = []
    for shard in sorted(triple["secondary"].glob("pytorch_model-*.bin")):
        source = SourceFile(shard, "secondary", Tally())
        sizes.append(read_state_dict(source).steps)
        source.close()
    monkeypatch.setattr(checkpoint, "MAX_STEPS", sum(sizes))
    checkpoint.open_checkpoint("secondary", triple["secondary"], Tally()).close()
    monkeypatch.setattr(checkpoint, "MAX_STEPS", sum(sizes) - 1)
    with pytest.raises(HeaderError, match=f"has pickles with {sum(sizes)} instructions and records, at most"):
        checkpoint.open_checkpoint("secondary", triple["secondary"], Tally())


def test_a_pickle_with_too_many_instructions() -> None:
    room = pickle_reader.MAX_OPCODES
    assert pickle_reader.read(b"N" * (room - 1) + b".", "here") == (None, room)
    with pytest.raises(SourceError, match=f"byte {room - 1} of its pickle: it has more than {room} instructions"):
        pickle_reader.read(b"N" * room + b".", "here")


class Interrupted(BaseException):
    pass


def test_a_signal_is_heard_while_a_pickle_is_read() -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename == pickle_reader.__file__:
                raise Interrupted
            frame = frame.f_back

    data = b")" + b"\x85" * (pickle_reader.MAX_OPCODES - 2) + b"."
    started = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(Interrupted):
            signal.setitimer(signal.ITIMER_REAL, 0.01, 0.05)  # again and again: Python drops one that a finalizer meets
            while resource.getrusage(resource.RUSAGE_SELF).ru_utime < started + 5:
                pickle_reader.read(data, "here")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime < started + 1
