"""Disks that are full, limited, read-only or clever."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import merge_arguments, mounted, ordinary_user, snapshot

import hsa
from hsa.errors import MachineError
from hsa.system import fsio

Triple = dict[str, Path]
MIB = 1 << 20

pytestmark = pytest.mark.unverified("calls are counted and made to fail here, and a verification would make more")


def weights(directory: Path) -> Path:
    return directory / "model.safetensors"


def fails_cleanly(triple: Triple, place: Path, **options: Any) -> MachineError | None:
    """Merge to a new destination and onto an earlier output, both below `place`: MachineError and no trace, or None."""
    before = snapshot(place)
    caught: MachineError | None = None
    for output in (place / "new", place / "far" / "new", place / "earlier"):
        if output.name == "earlier" and not output.exists():
            continue
        try:
            hsa.merge(**triple, output=output, overwrite=True, **options)
        except MachineError as error:
            assert error.exit_code == 1
            caught = error
            assert snapshot(place) == before
        else:
            assert caught is None, "some destinations fail and others do not"
            return None
    return caught


# Full ------------------------------------------------------------------------------------------------------


@contextmanager
def loop(tmp_path: Path, kind: str, size: int, *options: str) -> Iterator[Path]:
    """A fresh filesystem in a file, mounted."""
    make = shutil.which(f"mkfs.{kind}", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if make is None:
        pytest.skip(f"mkfs.{kind} is not installed")
    image = tmp_path / f"{kind}.image"
    with image.open("wb") as file:
        file.truncate(size)
    done = subprocess.run([make, *options, str(image)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mkfs.{kind} makes no filesystem here: {done.stderr.strip()}")
    with mounted(tmp_path / kind, "-o", "loop", str(image)) as point:
        yield point


@contextmanager
def small_disk(tmp_path: Path, kind: str) -> Iterator[Path]:
    if kind == "tmpfs":
        with mounted(tmp_path / kind, "-t", "tmpfs", "-o", "size=8m", "none") as point:
            yield point
    else:
        with loop(tmp_path, "ext4", 16 * MIB, "-q", "-m", "0") as point:  # nothing kept back for root
            yield point


def fill(point: Path, leave: int) -> None:
    """Leave about so many bytes free."""
    (point / "filler").unlink(missing_ok=True)
    os.sync()
    with (point / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, fsio.free_bytes(point) - leave - 4096)


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "no-sync"])
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_full_disk(shared_triple: Triple, tmp_path: Path, kind: str, sync: bool) -> None:
    needed = weights(shared_triple["primary"]).stat().st_size
    with small_disk(tmp_path, kind) as point:
        hsa.merge(**shared_triple, output=point / "earlier", k=0.3)
        for leave in (needed // 2, 16384):
            fill(point, leave)
            free = fsio.free_bytes(point)
            error = fails_cleanly(shared_triple, point, sync=sync)
            assert error is not None
            told = re.search(
                r"No space left on device; (\d+) bytes were needed, (\d+) bytes are free there", str(error)
            )
            assert told is not None, error
            assert int(told[1]) == needed
            assert abs(int(told[2]) - free) <= 32768, "the message tells what was free"
        outcomes = []
        for leave in range(needed, needed + 20 * 4096, 2048):  # until the small files fit, too
            fill(point, leave)
            outcomes.append(fails_cleanly(shared_triple, point, sync=sync))
            if outcomes[-1] is None:
                break
        assert outcomes[-1] is None
        assert any("model.safetensors" not in str(error) for error in outcomes if error is not None), outcomes


def test_a_full_disk_on_the_command_line(shared_triple: Triple, tmp_path: Path) -> None:
    with small_disk(tmp_path, "tmpfs") as point:
        fill(point, 65536)
        before = snapshot(point)
        done = subprocess.run(
            [sys.executable, "-m", "hsa", *merge_arguments(shared_triple, point / "out")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(
            r"hsa: error: cannot write .*; \d+ bytes were needed, \d+ bytes are free there; .*\n", done.stderr
        )
        assert snapshot(point) == before


def test_a_disk_without_free_inodes(shared_triple: Triple, tmp_path: Path) -> None:
    for count in range(1, 40):
        with mounted(tmp_path / "tmpfs", "-t", "tmpfs", "-o", f"size=8m,nr_inodes={count}", "none") as point:
            if fails_cleanly(shared_triple, point) is None:
                assert count > 5
                return
    pytest.fail("40 inodes were not enough")


# Limited and read-only -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 4096, 300_001])
def test_a_file_size_limit(shared_triple: Triple, place: Path, limit: int) -> None:
    hsa.merge(**shared_triple, output=place / "earlier", k=0.3)
    before = snapshot(place)
    assert limit < weights(shared_triple["primary"]).stat().st_size
    for output in ("new", "far/new", "earlier"):
        done = subprocess.run(
            [sys.executable, "-m", "hsa", *merge_arguments(shared_triple, place / output, "--overwrite")],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert done.returncode == 1, done
        assert len(done.stderr.splitlines()) == 1
        assert "File too large" in done.stderr and "ulimit -f" in done.stderr and "bytes were needed" in done.stderr
        assert snapshot(place) == before


def test_a_read_only_filesystem(shared_triple: Triple, tmp_path: Path) -> None:
    with mounted(tmp_path / "tmpfs", "-t", "tmpfs", "-o", "size=8m", "none") as point:
        hsa.merge(**shared_triple, output=point / "earlier", k=0.3)
        (point / "empty").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
        error = fails_cleanly(shared_triple, point)
        assert "Read-only file system" in str(error) and "that you may write to" in str(error)
        with pytest.raises(MachineError, match="Read-only"):
            hsa.merge(**shared_triple, output=point / "empty")


def test_sources_on_a_read_only_filesystem(shared_triple: Triple, tmp_path: Path, place: Path) -> None:
    with mounted(tmp_path / "tmpfs", "-t", "tmpfs", "-o", "size=16m", "none") as point:
        sources = {role: Path(shutil.copytree(path, point / role)) for role, path in shared_triple.items()}
        subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
        hsa.merge(**sources, output=place / "out")
    hsa.merge(**shared_triple, output=place / "fresh")
    assert snapshot(place / "out") == snapshot(place / "fresh")


def test_a_directory_without_permission_to_write(shared_triple: Triple) -> None:
    top = Path(tempfile.mkdtemp())
    try:
        top.chmod(0o755)
        sources = {role: Path(shutil.copytree(path, top / role)) for role, path in shared_triple.items()}
        (top / "place").mkdir()
        (top / "place").chmod(0o555)
        for root, folders, files in os.walk(top):
            for name in (*folders, *files):
                os.chmod(os.path.join(root, name), 0o555)
        with ordinary_user():
            error = fails_cleanly(sources, top / "place")
        assert "Permission denied" in str(error) and "that you may write to" in str(error)
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(top)], check=True)
        shutil.rmtree(top)


# Filesystems that share blocks, and others -----------------------------------------------------------------

FS_IOC_FIEMAP = 0xC020660B
FIEMAP_FLAG_SYNC = 1
FIEMAP_EXTENT_LAST = 0x1
FIEMAP_EXTENT_SHARED = 0x2000


def shared_bytes(path: Path) -> int:
    """Bytes of a file that lie in blocks which other files use too. Source: Linux's fiemap documentation."""
    count = 512
    request = bytearray(struct.pack("=QQLLLL", 0, 2**64 - 1, FIEMAP_FLAG_SYNC, 0, count, 0) + bytes(56 * count))
    with path.open("rb") as file:
        fcntl.ioctl(file, FS_IOC_FIEMAP, request)
    mapped = struct.unpack_from("=L", request, 20)[0]
    extents = [struct.unpack_from("=QQQQQLLLL", request, 32 + 56 * number) for number in range(mapped)]
    assert extents and extents[-1][5] & FIEMAP_EXTENT_LAST
    return sum(extent[2] for extent in extents if extent[5] & FIEMAP_EXTENT_SHARED)


@pytest.mark.parametrize("digest", [True, False], ids=["digests", "no digests"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("xfs", ["-q", "-m", "reflink=1"]), ("btrfs", ["-q", "-f"])],
    ids=["xfs", "btrfs"],
)
def test_a_filesystem_that_shares_blocks(
    shared_triple: Triple, tmp_path: Path, place: Path, kind: str, options: list[str], digest: bool
) -> None:
    plain = hsa.merge(**shared_triple, output=place / "plain", digest=digest)
    with loop(tmp_path, kind, 512 * MIB, *options) as point:
        local = {role: Path(shutil.copytree(path, point / role)) for role, path in shared_triple.items()}
        os.sync()
        report = hsa.merge(**local, output=point / "out", digest=digest)
        assert snapshot(point / "out") == snapshot(place / "plain")

        merged = 0
        for name, tensor in report.tensors.items():
            count = len(tensor.selected)
            assert 0 < count < tensor.heads
            merged += count * tensor_bytes(weights(local["primary"]), name) // tensor.heads
        small = sum(path.stat().st_size for path in (point / "out").iterdir() if path.suffix != ".safetensors")
        assert report.bytes_written == merged + small
        size = weights(point / "out").stat().st_size
        assert plain.bytes_written == size + small
        assert merged < size // 4

        assert shared_bytes(weights(point / "out")) > size // 4
        shutil.copyfile(weights(point / "out"), point / "copied bytes")
        before = snapshot(point / "primary")
        hsa.merge(**local, output=point / "out", k=0.3, overwrite=True)
        assert snapshot(point / "primary") == before == snapshot(shared_triple["primary"])
        hsa.merge(**local, output=point / "out", overwrite=True, digest=digest)
        assert snapshot(point / "out") == snapshot(place / "plain")
        assert sorted(path.name for path in point.iterdir() if path.is_dir()) == ["base", "out", "primary", "secondary"]


def tensor_bytes(path: Path, name: str) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    start, stop = header[name]["data_offsets"]
    return int(stop - start)


def test_a_full_disk_that_shares_blocks(shared_triple: Triple, tmp_path: Path) -> None:
    """The clone takes no room, its patches do."""
    with loop(tmp_path, "xfs", 320 * MIB, "-q", "-m", "reflink=1") as point:
        local = {role: Path(shutil.copytree(path, point / role)) for role, path in shared_triple.items()}
        hsa.merge(**local, output=point / "earlier", k=0.3)
        os.sync()
        with (point / "filler").open("wb") as file:
            size = 64 * MIB
            while size >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
                except OSError:
                    size //= 2
        before = {role: snapshot(path) for role, path in local.items()} | {"earlier": snapshot(point / "earlier")}
        for name in ("new", "earlier"):
            with pytest.raises(MachineError, match="No space left"):
                hsa.merge(**local, output=point / name, overwrite=True)
        (point / "filler").unlink()
        assert {name: snapshot(point / name) for name in before} == before
        assert sorted(os.listdir(point)) == sorted(before)


def test_a_destination_on_another_filesystem(shared_triple: Triple, place: Path) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == place.stat().st_dev:
        pytest.skip("/dev/shm is no other filesystem that may be written to")
    hsa.merge(**shared_triple, output=place / "out")
    elsewhere = Path(tempfile.mkdtemp(dir=memory))
    try:
        hsa.merge(**shared_triple, output=elsewhere / "out", k=0.3)
        hsa.merge(**shared_triple, output=elsewhere / "out", overwrite=True)
        assert snapshot(elsewhere / "out") == snapshot(place / "out")
        (place / "link").symlink_to(elsewhere / "linked")
        hsa.merge(**shared_triple, output=place / "link")
        assert snapshot(elsewhere / "linked") == snapshot(place / "out")
        assert sorted(os.listdir(elsewhere)) == ["linked", "out"]
        assert sorted(os.listdir(place)) == ["link", "out"]
    finally:
        shutil.rmtree(elsewhere)
