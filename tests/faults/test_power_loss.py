"""Power loss: the calls of a run are recorded, and the disk is rebuilt as it may stand at each moment.

A disk keeps what was fsynced: a file's bytes when the file was, a directory's entries when the directory was. Of all
else it may keep any part, in any order: here a random choice of the writes that were under way, whole or torn at a
block, and of the entries that were made, renamed and removed. That is more than any real filesystem loses.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fault_harness import FULL, Operation, Points, Stage, make_stage
from fault_operations import OPERATIONS

from hsa.system import fsio

CHOICES = 3 if FULL else 1
"""Disks that are rebuilt for each moment."""

EVERY = 1 if FULL else 11
"""Which moments: the first of so many."""

BLOCK = 512


@dataclass
class File:
    """What is on disk for sure, and the writes (offset and bytes, or a size and None) that may be."""

    data: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def settled(self, rng: random.Random | None) -> bytes:
        """The bytes after a loss: with any part of the writes, or with all where nothing is left to chance."""
        data = bytearray(self.data)
        for offset, written in self.pending:
            if rng is None or rng.random() < 0.5:
                apply(data, offset, written)
            elif written is not None and rng.random() < 0.5:
                torn = rng.randrange(0, len(written) + 1) // BLOCK * BLOCK
                apply(data, offset, written[:torn])
        return bytes(data)

    def sync(self) -> None:
        self.data, self.pending = bytearray(self.settled(None)), []


def apply(data: bytearray, offset: int, written: bytes | None) -> None:
    if written is None:
        size = offset
        del data[size:]
        data.extend(bytes(size - len(data)))
        return
    data.extend(bytes(max(0, offset + len(written) - len(data))))
    data[offset : offset + len(written)] = written


@dataclass
class Folder:
    """Entries on disk for sure (name to number of the file or folder), and changes that may be: each a few entries set
    or removed (None) together, for a rename is one step."""

    entries: dict[str, int] = field(default_factory=dict)
    pending: list[dict[str, int | None]] = field(default_factory=list)

    def settled(self, rng: random.Random | None) -> dict[str, int]:
        entries = dict(self.entries)
        for change in self.pending:
            if rng is None or rng.random() < 0.5:
                for name, number in change.items():
                    if number is None:
                        entries.pop(name, None)
                    else:
                        entries[name] = number
        return entries

    def sync(self) -> None:
        self.entries, self.pending = self.settled(None), []


Node = File | Folder


class Disk:
    """The files below a folder, by number, as the calls of a run leave them; `moments` are copies, one after each."""

    def __init__(self, top: Path) -> None:
        self.top = str(top)
        self.nodes: dict[int, Node] = {}
        self.numbers = itertools.count()
        self.moments: list[tuple[str, dict[int, Node]]] = []
        self.root = self._adopt(top)

    def _adopt(self, path: Path) -> int:
        """What stands already, on disk for sure."""
        number = next(self.numbers)
        if path.is_dir():
            self.nodes[number] = Folder({entry.name: self._adopt(entry) for entry in sorted(path.iterdir())})
        else:
            self.nodes[number] = File(bytearray(path.read_bytes()))
        return number

    def find(self, path: str) -> Node:
        return self.nodes[self._number(path)]

    def _number(self, path: str) -> int:
        number = self.root
        for part in Path(os.path.relpath(path, self.top)).parts:
            folder = self.nodes[number]
            assert isinstance(folder, Folder)
            number = folder.settled(None)[part]
        return number

    def folder_of(self, path: str) -> Folder:
        folder = self.find(os.path.dirname(path))
        assert isinstance(folder, Folder)
        return folder

    def holds(self, path: str) -> bool:
        return path.startswith(f"{self.top}{os.sep}") or path == self.top

    def make(self, path: str, node: Node) -> None:
        number = next(self.numbers)
        self.nodes[number] = node
        self.folder_of(path).pending.append({os.path.basename(path): number})

    def remove(self, path: str) -> None:
        self.folder_of(path).pending.append({os.path.basename(path): None})

    def move(self, source: str, destination: str, *, swap: bool) -> None:
        assert os.path.dirname(source) == os.path.dirname(destination), "a rename within one folder is one step"
        ours, theirs = self._number(source), self._number(destination) if swap else None
        self.folder_of(source).pending.append({os.path.basename(source): theirs, os.path.basename(destination): ours})

    def moment(self, what: str) -> None:
        self.moments.append((what, copy.deepcopy(self.nodes)))

    def write_out(self, nodes: dict[int, Node], where: Path, rng: random.Random) -> None:
        """The disk as it may stand after a loss, in a real folder."""

        def put(number: int, path: Path) -> None:
            node = nodes[number]
            if isinstance(node, File):
                path.write_bytes(node.settled(rng))
                return
            path.mkdir()
            for name, inner in node.settled(rng).items():
                put(inner, path / name)

        put(self.root, where)


@contextmanager
def recorded(disk: Disk) -> Iterator[None]:
    """Let every call that changes something below the disk's folder change the disk too."""
    real: dict[str, Any] = {name: getattr(os, name) for name in WATCHED}
    reserve, exchange = fsio._reserve, fsio.exchange

    def path_of(argument: Any, folder: int | None = None) -> str:
        if isinstance(argument, int):
            return os.readlink(f"/proc/self/fd/{argument}")
        path = os.fsdecode(os.fspath(argument))
        return (
            os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path) if folder is not None else os.path.abspath(path)
        )

    def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        where = path_of(path, more.get("dir_fd"))
        new = bool(flags & os.O_CREAT) and disk.holds(where)
        fd: int = real["open"](path, flags, *rest, **more)
        if new:
            disk.make(where, File())
            disk.moment(f"create {where}")
        return fd

    def pwritev(fd: int, views: Any, offset: int) -> int:
        where = path_of(fd)
        count: int = real["pwritev"](fd, views, offset)
        if disk.holds(where):
            file = disk.find(where)
            assert isinstance(file, File)
            file.pending.append((offset, bytes(views[0])[:count]))
            disk.moment(f"write {where}")
        return count

    def reserved(fd: int, size: int) -> None:
        reserve(fd, size)
        file = disk.find(path_of(fd))
        assert isinstance(file, File)
        file.pending.append((size, None))

    def fsync(fd: int) -> None:
        where = path_of(fd)
        real["fsync"](fd)
        if disk.holds(where):
            disk.find(where).sync()
            disk.moment(f"fsync {where}")

    def mkdir(path: Any, *rest: Any, **more: Any) -> None:
        real["mkdir"](path, *rest, **more)
        if disk.holds(where := path_of(path)):
            disk.make(where, Folder())
            disk.moment(f"mkdir {where}")

    def removed(name: str) -> Any:
        def call(path: Any, **more: Any) -> None:
            where = path_of(path, more.get("dir_fd"))
            real[name](path, **more)
            if disk.holds(where):
                disk.remove(where)
                disk.moment(f"{name} {where}")

        return call

    def rename(source: Any, destination: Any) -> None:
        real["rename"](source, destination)
        disk.move(path_of(source), path_of(destination), swap=False)
        disk.moment(f"rename {source} {destination}")

    def exchanged(first: Path, second: Path) -> bool:
        done = exchange(first, second)
        if done:
            disk.move(str(first), str(second), swap=True)
            disk.moment(f"exchange {first} {second}")
        return done

    with pytest.MonkeyPatch.context() as patch:
        for name, function in (("open", opened), ("pwritev", pwritev), ("fsync", fsync), ("mkdir", mkdir)):
            patch.setattr(os, name, function)
        patch.setattr(os, "unlink", removed("unlink"))
        patch.setattr(os, "rmdir", removed("rmdir"))
        patch.setattr(os, "rename", rename)
        patch.setattr(fsio, "_reserve", reserved)
        patch.setattr(fsio, "exchange", exchanged)
        yield


WATCHED = ("open", "pwritev", "fsync", "mkdir", "unlink", "rmdir", "rename")


@pytest.fixture(scope="module", params=OPERATIONS, ids=lambda operation: operation.name)
def stage(
    request: pytest.FixtureRequest, shared_triple: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Stage:
    operation: Operation = request.param
    return make_stage(operation, tmp_path_factory.mktemp("power"), shared_triple)


def record(stage: Stage, *, earlier: bool) -> Disk:
    stage.reset(earlier=earlier)
    disk = Disk(stage.place)
    with recorded(disk):
        stage.run("new")
    assert stage.judge(earlier=earlier) == "new"
    return disk


@pytest.mark.parametrize("how", ["new", "overwrite", "overwrite without swap"])
def test_power_loss_at_every_moment(stage: Stage, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = how != "new"
    if how == "overwrite without swap":
        monkeypatch.setattr(fsio, "exchange", lambda first, second: False)
    disk = record(stage, earlier=earlier)
    points = Points("power loss at a moment", stage.operation)
    moments = disk.moments[::EVERY] + ([disk.moments[-1]] if EVERY > 1 else [])
    for number, (what, nodes) in enumerate(moments):
        for choice in range(CHOICES):
            with points.point(f"{how}, moment {number}, after {what}, choice {choice}"):
                shutil.rmtree(stage.place)
                disk.write_out(nodes, stage.place, random.Random(f"{number} {choice}"))
                state = stage.judge(earlier=earlier)
                points.seen[state] += 1
                if choice == 0:
                    stage.tidy()
    points.end(at_least=len(moments) * CHOICES)
    assert len(points.seen) >= 2, points.seen


def test_after_the_run_nothing_is_left_to_chance(stage: Stage) -> None:
    """Once the command has ended, any loss leaves the new output."""
    points = Points("power loss after the end", stage.operation)
    for earlier in (False, True):
        disk = record(stage, earlier=earlier)
        for choice in range(20 if FULL else 2):
            with points.point(f"choice {choice}, earlier output {earlier}"):
                shutil.rmtree(stage.place)
                disk.write_out(disk.moments[-1][1], stage.place, random.Random(choice))
                assert stage.judge(earlier=earlier) == "new"
    points.end(at_least=4)


def test_the_model_loses_what_is_not_synced(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fsync outputs are torn: a model that loses nothing would find nothing."""
    monkeypatch.setattr(fsio, "sync", lambda fd: None)
    disk = record(stage, earlier=False)
    states = []
    for choice in range(30):
        shutil.rmtree(stage.place)
        disk.write_out(disk.moments[-1][1], stage.place, random.Random(choice))
        try:
            states.append(stage.judge(earlier=False))
        except AssertionError:
            states.append("torn")
    assert "torn" in states, states
