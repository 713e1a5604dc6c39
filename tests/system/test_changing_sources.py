"""Sources that change while a run reads them, and that a run changes nothing of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import snapshot

import hsa
from hsa.backends.cpu import CpuWorker
from hsa.errors import SourceChanged

Triple = dict[str, Path]

pytestmark = pytest.mark.unverified("calls are counted and made to fail here, and a verification would make more")


def weights(directory: Path) -> Path:
    return directory / "model.safetensors"


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(content)


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 4)
        file.write(b"\xff" * (path.stat().st_size * 3 // 4))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    shutil.copy2(path, path.with_name("other"))
    os.replace(path.with_name("other"), path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def remove(path: Path) -> None:
    path.unlink()


def touch(path: Path) -> None:
    os.utime(path)


def touch_back(path: Path) -> None:
    """Rewrite it and put the time of the last change back: the inode's own time still tells."""
    status = path.stat()
    rewrite(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def move_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def swap_folder(path: Path) -> None:
    move_folder(path)
    shutil.copytree(path.parent.with_name("elsewhere"), path.parent)


CHANGES = [rewrite, damage, truncate, replace, append, remove, touch, touch_back, move_folder, swap_folder]


@pytest.mark.parametrize("role", ["base", "primary", "secondary"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_source_that_changes_while_it_is_read(
    triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], role: str
) -> None:
    hsa.merge(**triple, output=place / "earlier", k=0.3)
    before = snapshot(place)
    merge, calls = CpuWorker.merge, []

    def meanwhile(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            change(weights(triple[role]))
        return merge(*arguments)

    monkeypatch.setattr(CpuWorker, "merge", meanwhile)
    with pytest.raises(SourceChanged, match=rf"{role}: .*model\.safetensors") as caught:
        hsa.merge(**triple, output=place / "earlier", overwrite=True, threads=1)
    assert caught.value.exit_code == 2
    assert len(calls) >= 3
    assert snapshot(place) == before


def test_a_source_that_changes_at_the_very_end(triple: Triple, place: Path) -> None:
    total: list[tuple[int, int]] = []

    def step(done: int, whole: int) -> None:
        total.append((done, whole))
        touch(weights(triple["primary"]))

    with pytest.raises(SourceChanged):
        hsa.merge(**triple, output=place / "out", progress=step)
    assert total
    assert snapshot(place) == {}


def test_a_config_that_changes_between_two_looks(triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hsa.actions import merge as merge_module

    check = merge_module.check_destination

    def meanwhile(*arguments: Any, **keywords: Any) -> Any:
        path = triple["primary"] / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "encoder_attention_heads": 2}))
        return check(*arguments, **keywords)

    monkeypatch.setattr(merge_module, "check_destination", meanwhile)
    with pytest.raises(SourceChanged, match=r"config\.json"):
        hsa.merge(**triple, output=place / "out")
    assert snapshot(place) == {}


def test_sources_are_only_read(triple: Triple, place: Path) -> None:
    before = {path: (path.lstat().st_mtime_ns, path.lstat().st_ctime_ns) for path in sources(triple)}
    hsa.merge(**triple, output=place / "out")
    assert {path: (path.lstat().st_mtime_ns, path.lstat().st_ctime_ns) for path in sources(triple)} == before


def sources(triple: Triple) -> list[Path]:
    return [path for folder in triple.values() for path in (folder, *folder.rglob("*"))]
