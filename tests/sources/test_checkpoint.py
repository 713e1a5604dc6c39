"""A checkpoint to read: its layouts, its identity, and everything about it that is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import edit_json, read_safetensors, read_tensors, safetensors_bytes

from hsa.architectures.generic import GENERIC
from hsa.errors import HeaderError, MismatchError, SourceChanged, SourceError
from hsa.sources import checkpoint
from hsa.sources.checkpoint import CONFIG, INDEX, WEIGHTS, Checkpoint, open_checkpoint
from hsa.sources.identity import Identity, identify
from hsa.system.fsio import Tally
from hsa.testing.whisper_checkpoints import SHAPES, tensor_shapes, write_checkpoint

NAMES = set(tensor_shapes(SHAPES["test"]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in three layouts: a single file, shards, and the names of WhisperModel."""
    root = tmp_path_factory.mktemp("made")
    shape = SHAPES["test"]
    return {
        "single": write_checkpoint(root / "single", shape, processor=False),
        "sharded": write_checkpoint(root / "sharded", shape, processor=False, max_shard_bytes=200_000),
        "bare": write_checkpoint(root / "bare", shape, processor=False, prefix=""),
    }


@pytest.fixture
def single(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["single"], tmp_path / "single"))


@pytest.fixture
def sharded(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["sharded"], tmp_path / "sharded"))


@pytest.fixture(autouse=True)
def no_open_files_left() -> Iterator[None]:
    """Whatever a test opens or fails to open, no file descriptor stays open."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)


def refused(directory: Path | str, kind: type[SourceError], message: str) -> str:
    with pytest.raises(kind, match=message) as caught:
        open_checkpoint("secondary", directory, Tally())
    assert type(caught.value) is kind
    assert "secondary" in str(caught.value)
    return str(caught.value)


def contents(source: Checkpoint) -> dict[str, bytes]:
    """Every tensor's bytes, by name as stored."""
    found = {}
    for ref in source.tensors.values():
        buffer = bytearray(ref.nbytes)
        source.read_into(ref, memoryview(buffer))
        found[ref.name] = bytes(buffer)
    return found


# What is read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["single", "sharded", "bare"])
def test_every_tensor_is_found_where_it_lies(made: dict[str, Path], layout: str) -> None:
    expected = {name: tensor.numpy().tobytes() for name, tensor in read_tensors(made[layout]).items()}
    with open_checkpoint("base", made[layout], Tally()) as source:
        assert set(source.tensors) == {name.removeprefix("model.") for name in NAMES}
        assert contents(source) == expected
        for name, ref in source.tensors.items():
            assert ref.shape == tensor_shapes(SHAPES["test"])[f"model.{name}"]
        assert (source.index is None) == (layout != "sharded")
        assert len(source.shards) == len(list(made[layout].glob("*.safetensors")))
        assert source.config["encoder_attention_heads"] == 4


def test_part_of_a_tensor(made: dict[str, Path]) -> None:
    with open_checkpoint("base", made["sharded"], Tally()) as source:
        ref = source.tensors["encoder.layers.1.self_attn.q_proj.bias"]
        whole, part = bytearray(ref.nbytes), bytearray(12)
        source.read_into(ref, memoryview(whole))
        source.read_into(ref, memoryview(part), 20)
        assert part == whole[20:32]


def test_opening_reads_no_tensor_data(made: dict[str, Path]) -> None:
    tally = Tally()
    with open_checkpoint("base", made["single"], tally) as source:
        assert tally.read == len(source.shards[0].header.raw) + (made["single"] / CONFIG).stat().st_size


def test_a_closed_checkpoint_is_not_read_nor_opened_again(made: dict[str, Path]) -> None:
    source = open_checkpoint("base", made["sharded"], Tally())
    renamed = dataclasses.replace(source, identity=Identity("org/other"))
    ref = next(iter(source.tensors.values()))
    renamed.read_into(ref, memoryview(bytearray(ref.nbytes)))
    source.close()
    source.close()
    for each in (source, renamed):
        with pytest.raises(ValueError, match=r"is closed"):
            each.read_into(ref, memoryview(bytearray(ref.nbytes)))


def test_a_single_file_goes_before_an_index(single: Path) -> None:
    (single / INDEX).write_text("not even JSON")
    with open_checkpoint("base", single, Tally()) as source:
        assert [shard.name for shard in source.shards] == [WEIGHTS]


def test_the_file_of_a_tensor_is_named_with_its_role(sharded: Path) -> None:
    with open_checkpoint("secondary", sharded, Tally()) as source:
        placed = json.loads((sharded / INDEX).read_text())["weight_map"]
        for ref in source.tensors.values():
            assert source.file_of(ref) == f"secondary {sharded / placed[ref.name]}"


def test_a_home_directory_is_expanded(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(single.parent))
    with open_checkpoint("base", "~/single", Tally()) as source:
        assert source.path == single


def test_a_link_to_the_directory_and_links_within_it_are_followed(sharded: Path, tmp_path: Path) -> None:
    shard = next(sharded.glob("*.safetensors"))
    shard.rename(sharded / "elsewhere")
    shard.symlink_to("elsewhere")
    (tmp_path / "link").symlink_to(sharded)
    with open_checkpoint("base", tmp_path / "link", Tally()) as source:
        assert source.path == sharded
        assert len(contents(source)) == len(NAMES)


# Who it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("directory", "claimed", "identity"),
    [
        ("/a/b/tuned", None, Identity("tuned")),
        ("/a/b/model", None, Identity("model in b")),
        ("/a/b/model", "org/name", Identity("org/name")),
        ("/a/b/model", "org/name@v1.0", Identity("org/name", "v1.0")),
        ("/hub/models--org--name/snapshots/0123abcd", None, Identity("org/name", "0123abcd")),
        ("/hub/models--org--name/snapshots/0123abcd", "other", Identity("other")),
        ("/hub/models--gpt2/snapshots/main", None, Identity("gpt2", "main")),
        ("/snapshots/tuned", None, Identity("tuned")),
    ],
)
def test_identity(directory: str, claimed: str | None, identity: Identity) -> None:
    assert identify(Path(directory), claimed) == identity


def test_the_hubs_cache_keeps_its_files_elsewhere(single: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copy(single / name, repository / "blobs" / f"digest-of-{name}")
        (snapshot / name).symlink_to(f"../../blobs/digest-of-{name}")
    with open_checkpoint("base", snapshot, Tally()) as source:
        assert source.identity == Identity("org/name", "0123abcd")
        assert len(contents(source)) == len(NAMES)
    shared = tmp_path / "blobs" / "ab" / "abcd"
    shared.parent.mkdir(parents=True)
    (repository / "blobs" / f"digest-of-{WEIGHTS}").rename(shared)
    (repository / "blobs" / f"digest-of-{WEIGHTS}").symlink_to("../../blobs/ab/abcd")
    with open_checkpoint("base", snapshot, Tally()) as source:
        assert len(contents(source)) == len(NAMES)
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(single / WEIGHTS)
    refused(snapshot, SourceError, "leads out of the directory")


# What is refused -------------------------------------------------------------------------------------------


def test_missing(tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    refused(path, SourceError, f"^secondary: {path} cannot be found .*looked for .*{CONFIG} and {WEIGHTS} or {INDEX}")


@pytest.mark.parametrize("path", ["", "~nosuchuser-hsa/model", "a\0b", "x" * 300])
def test_paths_that_cannot_be(path: str) -> None:
    refused(path, SourceError, "looked for a directory with")


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", SourceError, "cannot be found")


def test_not_a_directory(single: Path) -> None:
    refused(single / WEIGHTS, SourceError, f"{single / WEIGHTS} is not a directory; looked for")


def test_no_weights(single: Path) -> None:
    (single / WEIGHTS).unlink()
    refused(single, SourceError, f"{single} holds no weights; looked for {WEIGHTS} and {INDEX}")


@pytest.mark.parametrize("name", ["openai/whisper-base", "org/name@main"])
def test_a_checkpoint_is_a_directory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub ids are looked up by hsa.sources.hub.client, before."""
    monkeypatch.chdir(tmp_path)
    refused(name, SourceError, f"{name} cannot be found")


@pytest.mark.parametrize(
    ("name", "message"),
    [("pytorch_model.bin", "is no zip archive"), ("pytorch_model.bin.index.json", "is not valid JSON")],
)
def test_pickle_weights_that_are_none(single: Path, name: str, message: str) -> None:
    (single / WEIGHTS).rename(single / name)
    refused(single, HeaderError, f"^secondary: {single / name}.*{message}")


def test_no_config(single: Path) -> None:
    (single / CONFIG).unlink()
    refused(single, SourceError, f"{single} has no {CONFIG}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "config is not valid JSON"),
        (b"", "config is not valid JSON"),
        (b"[]", "config must be a JSON object, found list"),
        (b'{"model_type": "whisper", "model_type": "whisper"}', "config names 'model_type' twice"),
        (b'{"model_type": "\xff"}', "config is not valid JSON"),
    ],
)
def test_a_config_that_is_not_json(single: Path, text: bytes, message: str) -> None:
    (single / CONFIG).write_bytes(text)
    refused(single, HeaderError, f"^secondary: {single / CONFIG}: {message}")


def test_a_config_beyond_all_measure(single: Path) -> None:
    with (single / CONFIG).open("r+b") as file:
        file.truncate(checkpoint.MAX_TEXT + 1)
    refused(single, SourceError, f"{CONFIG} has {checkpoint.MAX_TEXT + 1} bytes, at most {checkpoint.MAX_TEXT}")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_stands_in_place_of_a_file(single: Path, name: str) -> None:
    (single / name).unlink()
    os.mkfifo(single / name)
    refused(single, SourceError, f"{single / name} is not a regular file")
    (single / name).unlink()
    (single / name).mkdir()
    refused(single, SourceError, f"{single / name} is not a regular file")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("target", ["../outside", "/etc/hostname", "missing", "{name}"])
def test_links_that_lead_out_or_nowhere(single: Path, name: str, target: str) -> None:
    (single.parent / "outside").write_text("{}")
    (single / name).unlink()
    (single / name).symlink_to(target.format(name=name))
    refused(single, SourceError, f"{single / name} (is a link that leads out of the directory|cannot be opened)")


def test_a_damaged_header_names_role_and_file(single: Path) -> None:
    (single / WEIGHTS).write_bytes(b"\x10\0\0\0\0\0\0\0{")
    refused(single, HeaderError, f"^secondary: {single / WEIGHTS} is truncated")


def test_one_tensor_under_both_names(single: Path) -> None:
    document, data = read_safetensors(single / WEIGHTS)
    name = "model.encoder.layers.0.self_attn.q_proj.weight"
    twin = {**document[name], "data_offsets": [len(data), len(data) + 64 * 64 * 4]}
    document[name.removeprefix("model.")] = twin
    (single / WEIGHTS).write_bytes(safetensors_bytes(document, data + bytes(64 * 64 * 4)))
    refused(single, MismatchError, "are one tensor of Whisper, encoder.layers.0.self_attn.q_proj.weight")


# The index -------------------------------------------------------------------------------------------------

Index = dict[str, Any]
FIRST = "model-00001-of-"


def rename_shard(index: Index, to: str) -> None:
    """Every tensor of the first shard moves to another file."""
    first = min(index["weight_map"].values())
    index["weight_map"] = {tensor: to if file == first else file for tensor, file in index["weight_map"].items()}


INDICES: dict[str, tuple[Callable[[Index], object], type[SourceError], str]] = {
    "missing": (lambda i: rename_shard(i, "gone.safetensors"), SourceError, "shard gone.safetensors, which is missing"),
    "parent": (
        lambda i: rename_shard(i, "../x.safetensors"),
        SourceError,
        r"shard '\.\./x.safetensors'; expected the plain",
    ),
    "absolute": (
        lambda i: rename_shard(i, "/etc/x.safetensors"),
        SourceError,
        "shard '/etc/x.safetensors'; expected the plain",
    ),
    "below": (
        lambda i: rename_shard(i, "sub/x.safetensors"),
        SourceError,
        "shard 'sub/x.safetensors'; expected the plain",
    ),
    "here": (lambda i: rename_shard(i, "./x.safetensors"), SourceError, "shard './x.safetensors'; expected the plain"),
    "dots": (lambda i: rename_shard(i, ".."), SourceError, "expected the plain name"),
    "empty": (lambda i: rename_shard(i, ""), SourceError, "expected the plain name"),
    "nul": (lambda i: rename_shard(i, "a\0.safetensors"), SourceError, "expected the plain name"),
    "pickle": (lambda i: rename_shard(i, "pytorch_model.bin"), SourceError, "plain name of a .safetensors file"),
    "too long": (lambda i: rename_shard(i, "x" * 300 + ".safetensors"), SourceError, "which is missing"),
    "no weight_map": (lambda i: i.pop("weight_map"), HeaderError, "expected a weight_map"),
    "empty weight_map": (lambda i: i.update(weight_map={}), HeaderError, "expected a weight_map"),
    "weight_map a list": (lambda i: i.update(weight_map=["a"]), HeaderError, "expected a weight_map"),
    "a number for a file": (lambda i: i["weight_map"].update(a=1), HeaderError, "expected a weight_map"),
    "listed but absent": (
        lambda i: i["weight_map"].update(ghost=min(i["weight_map"].values())),
        MismatchError,
        f"{INDEX} places tensor ghost in {FIRST}.*, which does not hold it",
    ),
    "listed under both names": (
        lambda i: i["weight_map"].update({"encoder.conv1.bias": i["weight_map"]["model.encoder.conv1.bias"]}),
        MismatchError,
        f"{INDEX} places tensor encoder.conv1.bias in .*, which does not hold it",
    ),
    "held but not listed": (
        lambda i: i["weight_map"].pop("model.encoder.conv1.bias"),
        MismatchError,
        f"holds tensor model.encoder.conv1.bias, which {INDEX} does not list; index and shards",
    ),
    "wrong shard": (
        lambda i: i["weight_map"].update({"model.encoder.conv1.bias": max(i["weight_map"].values())}),
        MismatchError,
        f"{FIRST}.* holds tensor model.encoder.conv1.bias, which {INDEX} places in model-",
    ),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_is_wrong(sharded: Path, name: str) -> None:
    change, kind, message = INDICES[name]
    index = json.loads((sharded / INDEX).read_text())
    change(index)
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, kind, message)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": {"a": "x", "a": "y"}}'])
def test_an_index_that_is_not_json(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, HeaderError, f"^secondary: {sharded / INDEX}: index ")


@pytest.mark.parametrize("bad", ["../out.safetensors", "gone.safetensors", "link.safetensors"])
def test_a_bad_index_is_refused_before_any_shard_is_opened(
    sharded: Path, bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sharded.parent / "out.safetensors").write_bytes(b"")
    (sharded / "link.safetensors").symlink_to(sharded.parent / "out.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["last"] = bad
    (sharded / INDEX).write_text(json.dumps(index))
    opened: list[str] = []
    really_open = os.open

    def watched(path: Any, *arguments: Any, **more: Any) -> int:
        opened.append(os.fspath(path))
        return really_open(path, *arguments, **more)

    monkeypatch.setattr(os, "open", watched)
    message = refused(sharded, SourceError, "names the shard|leads out of the directory")
    assert bad in message
    assert [Path(path).name for path in opened] == [INDEX]


# Changes ---------------------------------------------------------------------------------------------------


def test_an_unchanged_source_is_unchanged(sharded: Path) -> None:
    with open_checkpoint("base", sharded, Tally()) as source:
        contents(source)
        source.check_unchanged()


@pytest.mark.parametrize("how", ["append", "replace", "touch", "remove", "truncate"])
def test_a_change_is_noticed(sharded: Path, how: str) -> None:
    with open_checkpoint("primary", sharded, Tally()) as source:
        file = max(sharded.glob("*.safetensors"))
        if how == "append":
            with file.open("ab") as out:
                out.write(b"x")
        elif how == "replace":
            shutil.copy2(file, sharded / "copy")
            (sharded / "copy").replace(file)
        elif how == "touch":
            os.utime(file, ns=(0, 0))
        elif how == "remove":
            file.unlink()
        else:
            os.truncate(file, 100)
        with pytest.raises(SourceChanged, match=f"^primary: {file} (changed|vanished)"):
            source.check_unchanged()
        if how == "truncate":
            with pytest.raises(SourceChanged, match=f"^primary: {file} ended at byte"):
                contents(source)


def test_config_of_another_model_is_read_as_one_without_heads(single: Path) -> None:
    edit_json(single / CONFIG, model_type="wav2vec2")
    with open_checkpoint("secondary", single, Tally()) as checkpoint:
        assert checkpoint.architecture is GENERIC
