"""Disks that are full, limited, read-only, failing or clever, and sources that change under the run."""

from __future__ import annotations

import errno
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import merge_arguments, mounted, ordinary_user, snapshot

import hsa
from hsa.backends.cpu import CpuWorker
from hsa.errors import MachineError, SourceChanged
from hsa.system import fsio

Triple = dict[str, Path]
MIB = 1 << 20

pytestmark = pytest.mark.unverified("calls are counted and made to fail here, and a verification would make more")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "place"
    place.mkdir()
    return place


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


# Failing ---------------------------------------------------------------------------------------------------


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, at: int) -> Iterator[list[int]]:
    """Let the `at`-th call fail with an input/output error (none for 0); yields the number of calls so far."""
    function: Callable[..., Any] = getattr(holder, name)
    calls = [0]

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return function(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, wrapped)
        yield calls


CALLS = [
    (os, "preadv"),
    (os, "pwritev"),
    (os, "fsync"),
    (os, "open"),
    (os, "mkdir"),
    (os, "rename"),
    (fsio, "_reserve"),
    (fsio, "clone"),
    (fsio, "exchange"),
]


@pytest.mark.parametrize("how", ["new", "overwrite", "overwrite without swap"])
@pytest.mark.parametrize(("holder", "name"), CALLS, ids=[name for _, name in CALLS])
def test_an_input_output_error_at_every_call(
    shared_triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, how: str
) -> None:
    if how != "new":
        hsa.merge(**shared_triple, output=place / "out", k=0.3)
    if how == "overwrite without swap":
        monkeypatch.setattr(fsio, "exchange", lambda first, second: False)
    before, descriptors = snapshot(place), open_files()
    failed, at = 0, 0
    while True:
        at += 1
        with failing(monkeypatch, holder, name, at) as calls:
            try:
                hsa.merge(**shared_triple, output=place / "out", overwrite=True, threads=1)
            except MachineError as error:
                assert error.exit_code == 1
                assert "Input/output error" in str(error), (name, at)
                assert calls[0] >= at
                assert snapshot(place) == before, (name, at)
                assert open_files() == descriptors, (name, at)
                failed += 1
                continue
        if calls[0] < at:
            break
        # A call that a run can do without: the output is whole, and beside it is nothing.
        assert name == "open" or (name == "fsync" and how != "new"), (name, at)
        assert os.listdir(place) == ["out"]
        shutil.rmtree(place / "out")
        if how != "new":
            hsa.merge(**shared_triple, output=place / "out", k=0.3)
    expected = {"preadv": 20, "pwritev": 5, "fsync": 10, "open": 10, "rename": 1 if how != "overwrite" else 0}
    assert failed >= expected.get(name, 0), failed
    assert sorted(os.listdir(place)) == ["out"]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("name", ["preadv", "pwritev", "fsync"])
def test_an_input_output_error_among_many_threads(
    shared_triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with failing(monkeypatch, os, name, 0) as calls:
        hsa.merge(**shared_triple, output=place.parent / "fresh", threads=6)
    for at in range(1, calls[0], max(1, calls[0] // 12)):
        with failing(monkeypatch, os, name, at), pytest.raises(MachineError, match="Input/output error"):
            hsa.merge(**shared_triple, output=place / "out", threads=6)
        assert snapshot(place) == {}


def test_short_reads_and_writes_are_completed(
    shared_triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:5000]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: pwritev(fd, [views[0][:4096]], offset))
    hsa.merge(**shared_triple, output=place / "short")
    monkeypatch.undo()
    hsa.merge(**shared_triple, output=place / "fresh")
    assert snapshot(place / "short") == snapshot(place / "fresh")


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_filesystem_that_can_do_nothing_special(
    shared_triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    """No fallocate, no O_DIRECT (or one that wants another alignment), no swap, no clone."""

    class Plain:
        def __getattr__(self, name: str) -> Callable[..., int]:
            def refused(*arguments: Any) -> int:
                import ctypes

                ctypes.set_errno(refusal)
                return -1

            return refused

    pwritev = os.pwritev

    def aligned(fd: int, views: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwritev(fd, views, offset)

    hsa.merge(**shared_triple, output=place / "fresh")
    hsa.merge(**shared_triple, output=place / "plain", k=0.3)
    monkeypatch.setattr(fsio, "_libc", Plain)
    monkeypatch.setattr(os, "pwritev", aligned)
    if refusal == errno.EOPNOTSUPP:
        monkeypatch.setattr(fsio, "reopen_direct", lambda path: None)
    hsa.merge(**shared_triple, output=place / "plain", overwrite=True)
    assert snapshot(place / "plain") == snapshot(place / "fresh")
    assert sorted(os.listdir(place)) == ["fresh", "plain"]


def test_threads_that_cannot_be_started(shared_triple: Triple, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    begin, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(MachineError, match=r"cannot start 5 threads.*lower threads"):
        hsa.merge(**shared_triple, output=place / "out", threads=5)
    assert snapshot(place) == {}
    assert not any(thread.is_alive() for thread in started)


# Sources that change ---------------------------------------------------------------------------------------


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
