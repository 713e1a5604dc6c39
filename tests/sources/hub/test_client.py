"""Hub ids as sources, against a server on this machine with the Hub's URL scheme.

huggingface_hub reads its environment when it is imported, so every run is a process of its own (see `forked`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_hsa, run_python
from helpers import (
    edit_json,
    merge_arguments,
    read_tensors,
    snapshot,
    write_adapter,
    write_pickle,
    write_tensors,
)
from hub_server import (
    SIGNATURE,
    TOKEN,
    Handler,
    Servers,
    cut_short,
    slow,
    status_503,
    wrong_range,
)
from hub_support import IDS, IMPATIENT, arguments, env, merge, published, refused, servers

import hsa
from hsa.sources import safetensors
from hsa.sources.checkpoint import ADAPTER_CONFIG, CONFIG, INDEX, PICKLES, WEIGHTS
from hsa.sources.hub.repository import HubId, find_id
from hsa.system.dtypes import CODES
from hsa.testing.whisper_checkpoints import SHAPES, DType, tensor_shapes, write_config

Triple = Mapping[str, Path]

__all__ = ["env", "published", "servers"]


def commit_of(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


def weights_sent(servers: Servers) -> int:
    return sum(seen.bytes for seen in servers.of("cdn"))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# What is a hub id --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("openai/whisper-base", HubId("openai/whisper-base")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name@refs/pr/1", HubId("org/name", "refs/pr/1")),
        ("name", None),
        ("a/b/c", None),
        ("/org/name", None),
        ("./org/name", None),
        ("../name", None),
        ("~/name", None),
        ("org/name@", None),
        ("org/name@../x", None),
        ("org/na--me", None),
        ("", None),
    ],
)
def test_a_hub_id_is_told_from_a_path(
    text: str, found: HubId | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_id(text) == found
    assert find_id(Path(text)) is None
    if found is not None:
        (tmp_path / text).mkdir(parents=True)
        assert find_id(text) is None


def test_a_local_directory_wins(
    triple: Triple, servers: Servers, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    local = {role: f"sources/{role}" for role in triple}
    report = merge(local, tmp_path / "out", env)
    assert report["bytes_fetched"] == 0
    assert servers.seen == []


# What a merge gives ------------------------------------------------------------------------------------------


def test_a_merge_of_hub_ids_equals_one_of_directories(
    servers: Servers, env: dict[str, str], triple: dict[str, Path], tmp_path: Path
) -> None:
    """Also with shards, a revision by name, and an element type of its own; the token is needed for every file."""
    write_tensors(triple["secondary"], read_tensors(triple["secondary"]), shards=3)
    for role, name in IDS.items():
        servers.add(name, triple[role])
    before = snapshot(tmp_path / "sources")
    report = merge({**IDS, "base": f"{IDS['base']}@v1.0"}, tmp_path / "out", env)
    claimed = [f"--{role}-id={name}@{commit_of(name)}" for role, name in IDS.items()]
    done = run_hsa(*merge_arguments(triple, tmp_path / "local", "--no-sync", *claimed), env=env)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == files(tmp_path / "local")
    assert snapshot(tmp_path / "sources") == before

    provenance = (tmp_path / "out" / "hsa_merge.json").read_text(encoding="ascii")
    sources = json.loads(provenance)["sources"]
    for role, name in IDS.items():
        assert (sources[role]["id"], sources[role]["revision"]) == (name, commit_of(name))
    for path in (tmp_path / "out").iterdir():
        for hidden in (TOKEN, SIGNATURE, str(tmp_path)):
            assert hidden.encode() not in path.read_bytes(), path
    for path in (tmp_path / "hf" / "hsa").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()

    assert [seen.path for seen in servers.seen if seen.server == "hub" and not seen.authorized] == []
    assert not any(seen.authorized for seen in servers.of("cdn"))
    ranged = [seen for seen in servers.of("cdn") if seen.range is not None]
    assert len(ranged) >= 1 + 1 + 3
    whole = [seen for seen in servers.of("cdn") if seen.range is None]
    assert [seen.bytes for seen in whole] == [(triple["primary"] / WEIGHTS).stat().st_size]
    sent = sum(seen.bytes for seen in servers.seen)
    assert report["bytes_fetched"] == weights_sent(servers) + sum(seen.bytes for seen in servers.of("hub")), (
        "every byte of a file that was sent is counted"
    )
    assert sent == report["bytes_fetched"]
    assert sum("bytes were fetched of org/" in note for note in report["notes"]) == 3


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "asr."])
def test_wrapped_names_on_the_hub_are_read_by_ranges_too(
    servers: Servers, env: dict[str, str], triple: dict[str, Path], tmp_path: Path, wrapper: str
) -> None:
    merge({role: str(path) for role, path in triple.items()}, tmp_path / "local", env)
    for role, name in IDS.items():
        tensors = {f"{wrapper}{stored}": tensor for stored, tensor in read_tensors(triple[role]).items()}
        write_tensors(triple[role], tensors)
        servers.add(name, triple[role])
    report = merge(IDS, tmp_path / "out", env)
    assert sum("are read without what a wrapper added" in note for note in report["notes"]) == 3
    found, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "local")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len([seen for seen in servers.of("cdn") if seen.range is None]) == 1


def test_a_broken_primary_on_the_hub_is_refused_by_its_header(
    servers: Servers, env: dict[str, str], triple: dict[str, Path], tmp_path: Path
) -> None:
    tensors = read_tensors(triple["primary"])
    del tensors["model.decoder.layers.1.fc1.bias"]
    write_tensors(triple["primary"], tensors)
    for role, name in IDS.items():
        servers.add(name, triple[role])
    refused(IDS, tmp_path / "out", env, 2, "primary", "model.decoder.layers.1.fc1.bias is missing", "decoder_layers 2")
    assert [seen for seen in servers.of("cdn") if seen.range is None] == []


def test_base_id_names_another_source(
    servers: Servers, env: dict[str, str], published: dict[str, str], tmp_path: Path
) -> None:
    merge(published, tmp_path / "out", env, "--base-id=other/name@r1")
    document = json.loads((tmp_path / "out" / "hsa_merge.json").read_bytes())
    assert (document["sources"]["base"]["id"], document["sources"]["base"]["revision"]) == ("other/name", "r1")


@pytest.mark.parametrize("more", [["--numerics=reference"], ["--non-attention-scale=0.9"]], ids=["reference", "scale"])
def test_base_is_fetched_whole_where_it_is_needed(
    servers: Servers, env: dict[str, str], published: dict[str, str], triple: Triple, tmp_path: Path, more: list[str]
) -> None:
    merge(published, tmp_path / "out", env, *more)
    done = run_hsa(*merge_arguments(triple, tmp_path / "local", "--no-sync", *more), env=env)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out")[WEIGHTS] == files(tmp_path / "local")[WEIGHTS]
    whole = [seen.path for seen in servers.of("cdn") if seen.range is None]
    assert len(whole) == 2


MERGER = """
import sys, torch, hsa
hub = hsa.Merger(*sys.argv[1:4]).merge(k=0.5, lam=0.3)
local = hsa.Merger(*sys.argv[4:7]).merge(k=0.5, lam=0.3)
assert hub.keys() == local.keys() and hub
assert all(torch.equal(hub[name], local[name]) for name in hub)
"""


def test_merger_takes_hub_ids(
    servers: Servers, env: dict[str, str], published: dict[str, str], shared_triple: Triple
) -> None:
    done = run_python(MERGER, *published.values(), *map(str, shared_triple.values()), env=env)
    assert done.returncode == 0, done.stderr
    assert [seen.range for seen in servers.of("cdn")].count(None) == 1


# The caches ----------------------------------------------------------------------------------------------------


def test_a_second_run_fetches_nothing_and_offline_needs_no_server(
    servers: Servers, env: dict[str, str], published: dict[str, str], tmp_path: Path
) -> None:
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    refused(published, tmp_path / "none", offline, 1, "base: org/whisper@main", "HF_HUB_OFFLINE")
    assert servers.seen == []
    first = merge(published, tmp_path / "first", env)
    assert first["bytes_fetched"] > 0
    servers.seen.clear()
    second = merge(published, tmp_path / "second", env)
    assert second["bytes_fetched"] == 0
    assert servers.of("cdn") == []
    servers.seen.clear()
    third = merge(published, tmp_path / "third", offline)
    assert third["bytes_fetched"] == 0
    assert servers.seen == []
    assert files(tmp_path / "first") == files(tmp_path / "second") == files(tmp_path / "third")
    refused(
        published | {"base": "org/whisper@v1.0"},
        tmp_path / "none",
        offline,
        1,
        "base: org/whisper@v1.0",
        "not in the cache",
    )
    done = run_hsa(*arguments(published, tmp_path / "none", "--targets=attention-qkv"), env=offline)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"of {WEIGHTS} of org/whisper at commit" in done.stderr
    assert "the cache lacks" in done.stderr


def test_without_the_hub(servers: Servers, env: dict[str, str], published: dict[str, str], tmp_path: Path) -> None:
    """Out of reach, what is cached serves, and says so; what is not is an error of the network."""
    merge(published, tmp_path / "first", env)
    servers.stop()
    other = {**published, "base": "org/other"}
    line = refused(other, tmp_path / "none", env, 1, "base: org/other", "cannot be reached")
    assert servers.url in line
    done = run_python(IMPATIENT, *arguments(published, tmp_path / "second", "--json"), env=env)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert sum("is taken from the cache" in note for note in report["notes"]) == 3
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_what_the_ordinary_cache_holds_is_used(
    servers: Servers, env: dict[str, str], published: dict[str, str], shared_triple: Triple, tmp_path: Path
) -> None:
    done = run_python(
        "import sys; from huggingface_hub import hf_hub_download; hf_hub_download('org/second', sys.argv[1])",
        WEIGHTS,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    servers.seen.clear()
    merge({**published, "base": "org/second"}, tmp_path / "out", env)
    etag = servers.repos["org/first"].etag(shared_triple["primary"] / WEIGHTS)
    assert {seen.path.partition("?")[0] for seen in servers.of("cdn")} == {f"/blobs/{etag}"}


def test_a_changed_file_is_fetched_anew(
    servers: Servers, env: dict[str, str], triple: dict[str, Path], tmp_path: Path
) -> None:
    """A new commit on the branch, and the same commit with another file (which no Hub does, but a mirror may)."""
    for role, name in IDS.items():
        servers.add(name, triple[role])
    merge(IDS, tmp_path / "first", env)
    changed = {name: tensor * 1.5 for name, tensor in read_tensors(triple["secondary"]).items()}
    other = Path(shutil.copytree(triple["secondary"], tmp_path / "sources" / "other"))
    write_tensors(other, changed)
    repo = servers.repos[IDS["secondary"]]
    repo.commits["f" * 40] = other
    repo.revisions["main"] = "f" * 40
    servers.seen.clear()
    merge(IDS, tmp_path / "second", env)
    assert weights_sent(servers) > 0
    local = {**triple, "secondary": other}
    assert run_hsa(*merge_arguments(local, tmp_path / "local", "--no-sync"), env=env).returncode == 0
    assert files(tmp_path / "second")[WEIGHTS] == files(tmp_path / "local")[WEIGHTS]
    assert files(tmp_path / "second")[WEIGHTS] != files(tmp_path / "first")[WEIGHTS]
    repo.commits["f" * 40] = triple["secondary"]
    repo.etags[WEIGHTS] = "another"
    merge(IDS, tmp_path / "third", env)
    assert files(tmp_path / "third")[WEIGHTS] == files(tmp_path / "first")[WEIGHTS]


def damage_list(part: Path) -> None:
    listed = part.with_name(f"{WEIGHTS}.ranges.json")
    document = json.loads(listed.read_bytes())
    document["ranges"] = [[0, part.stat().st_size]]
    listed.write_text(json.dumps(document), encoding="ascii")


def empty_list(part: Path) -> None:
    part.with_name(f"{WEIGHTS}.ranges.json").write_bytes(b"")


def cut_data(part: Path) -> None:
    os.truncate(part, part.stat().st_size - 1)


def remove_data(part: Path) -> None:
    part.unlink()


@pytest.mark.parametrize("damage", [damage_list, empty_list, cut_data, remove_data])
def test_a_damaged_cache_is_fetched_anew(
    servers: Servers,
    env: dict[str, str],
    published: dict[str, str],
    tmp_path: Path,
    damage: Callable[[Path], None],
) -> None:
    own = {**env, "HSA_CACHE": str(tmp_path / "own")}
    merge(published, tmp_path / "first", own)
    parts = list((tmp_path / "own").rglob(f"{WEIGHTS}.part"))
    assert len(parts) == 3
    for part in parts:
        part.write_bytes(b"\0" * part.stat().st_size)
        damage(part)
    servers.seen.clear()
    report = merge(published, tmp_path / "second", own)
    assert report["bytes_fetched"] == weights_sent(servers) > 0
    assert files(tmp_path / "second") == files(tmp_path / "first")


# Other formats --------------------------------------------------------------------------------------------------


def merged_here(sources: Mapping[str, Path], output: Path, env: Mapping[str, str], *more: str) -> bytes:
    """The weights of a merge of directories."""
    done = run_hsa(*merge_arguments(sources, output, "--no-sync", *more), env=env)
    assert done.returncode == 0, done.stderr
    return files(output)[WEIGHTS]


def test_pickle_weights_are_fetched_whole(
    servers: Servers, env: dict[str, str], triple: dict[str, Path], tmp_path: Path
) -> None:
    write_pickle(triple["primary"], read_tensors(triple["primary"]), shards=2)
    write_pickle(triple["secondary"], read_tensors(triple["secondary"]))
    for role, name in IDS.items():
        servers.add(name, triple[role])
    report = merge(IDS, tmp_path / "out", env)
    assert files(tmp_path / "out")[WEIGHTS] == merged_here(triple, tmp_path / "local", env)
    for role in ("primary", "secondary"):
        size = sum(path.stat().st_size for path in triple[role].glob("*.bin"))
        assert f"{role}: pickle weights: {size} bytes of {IDS[role]} fetched whole" in report["notes"]
    assert [seen.range for seen in servers.of("cdn")].count(None) == 3
    servers.seen.clear()
    assert merge(IDS, tmp_path / "again", {**env, "HF_HUB_OFFLINE": "1"})["bytes_fetched"] == 0
    assert servers.seen == []


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_on_the_hub_is_refused(
    servers: Servers, env: dict[str, str], triple: dict[str, Path], tmp_path: Path
) -> None:
    tensors: dict[str, Any] = dict(read_tensors(triple["secondary"]))
    write_pickle(triple["secondary"], tensors | {"model.trap": Trap(tmp_path / "ran")})
    for role, name in IDS.items():
        servers.add(name, triple[role])
    refused(IDS, tmp_path / "out", env, 2, "secondary: ", f"/{PICKLES.weights} holds more", "posix.mkdir", "could run")
    assert not (tmp_path / "ran").exists()
    torch.load(triple["secondary"] / PICKLES.weights, weights_only=False)
    assert (tmp_path / "ran").exists(), "unpickled freely it does run"


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_an_adapter_on_the_hub_stands_on_base(
    servers: Servers, env: dict[str, str], triple: dict[str, Path], tmp_path: Path, role: str
) -> None:
    """Base is fetched whole for a primary, for the output is base's tensors then; for a secondary in ranges alone."""
    weights = {n: t for n, t in read_tensors(triple["base"]).items() if n.endswith(("q_proj.weight", "fc1.weight"))}
    write_adapter(tmp_path / "adapter", weights)
    triple[role] = tmp_path / "adapter"
    for name, path in zip(IDS.values(), triple.values(), strict=True):
        servers.add(name, path)
    plan = merge(IDS, tmp_path / "out", env, "--dry-run")
    assert not (tmp_path / "out").exists()
    assert plan["bytes_to_fetch"] > 0
    report = merge(IDS, tmp_path / "out", env)
    assert files(tmp_path / "out")[WEIGHTS] == merged_here(triple, tmp_path / "local", env)
    etag = servers.repos[IDS["base"]].etag(triple["base"] / WEIGHTS)
    of_base = {seen.range for seen in servers.of("cdn") if etag in seen.path}
    assert (None in of_base) == (role == "primary")
    source = json.loads((tmp_path / "out" / "hsa_merge.json").read_bytes())["sources"][role]
    assert (source["id"], source["revision"], source["format"]) == (IDS[role], commit_of(IDS[role]), "adapter")
    assert report["bytes_fetched"] > 0
    done = run_python(MERGER, *IDS.values(), *map(str, triple.values()), env={**env, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr


def test_an_adapter_as_base_is_refused(
    servers: Servers, env: dict[str, str], triple: dict[str, Path], tmp_path: Path
) -> None:
    write_adapter(tmp_path / "adapter", {"model.encoder.layers.0.fc1.weight": torch.empty(128, 64)})
    for name, path in zip(IDS.values(), {**triple, "base": tmp_path / "adapter"}.values(), strict=True):
        servers.add(name, path)
    refused(IDS, tmp_path / "out", env, 2, "base: ", "holds a LoRA adapter, not a pretrained model")


# What goes wrong -------------------------------------------------------------------------------------------------


def test_failures_that_pass(
    servers: Servers, env: dict[str, str], published: dict[str, str], triple: Triple, tmp_path: Path
) -> None:
    """One 503, one slow reply, one connection cut in the middle, one wrong range: tried again, from where it ended."""
    servers.faults = [status_503, slow, cut_short, wrong_range]
    merge(published, tmp_path / "out", env)
    assert servers.faults == []
    assert run_hsa(*merge_arguments(triple, tmp_path / "local", "--no-sync"), env=env).returncode == 0
    assert files(tmp_path / "out")[WEIGHTS] == files(tmp_path / "local")[WEIGHTS]
    ranges = [seen.range for seen in servers.of("cdn") if seen.range is not None]
    assert ranges[0] == ranges[1] == ranges[2]
    sent = [(seen.bytes, seen.range) for seen in servers.of("cdn")]
    place = next(n for n, (count, asked) in enumerate(sent) if asked and 0 < count < asked[1] - asked[0])
    cut, after = servers.of("cdn")[place], [seen for seen in servers.of("cdn")[place + 1 :] if seen.bytes]
    assert cut.range is not None and after[0].range is not None
    assert after[0].range[0] > cut.range[0]
    assert after[0].range[1] == cut.range[1]


def test_a_server_that_always_answers_with_another_range(
    servers: Servers, env: dict[str, str], published: dict[str, str], tmp_path: Path
) -> None:
    servers.always = wrong_range
    refused(published, tmp_path / "out", env, 1, f"base: org/whisper {WEIGHTS}", "another range", "5 tries")


def test_a_server_without_ranges(
    servers: Servers, env: dict[str, str], published: dict[str, str], triple: Triple, tmp_path: Path
) -> None:
    servers.ranges = False
    report = merge(published, tmp_path / "out", env)
    for role in ("base", "secondary"):
        size = (triple[role] / WEIGHTS).stat().st_size
        assert f"{role}: server without range support: {size} bytes of {IDS[role]} fetched whole" in report["notes"]
    assert run_hsa(*merge_arguments(triple, tmp_path / "local", "--no-sync"), env=env).returncode == 0
    assert files(tmp_path / "out")[WEIGHTS] == files(tmp_path / "local")[WEIGHTS]
    done = run_hsa(*arguments(published, tmp_path / "again"), env=env)
    assert done.returncode == 0
    assert "range support" not in done.stderr


def test_no_access(servers: Servers, env: dict[str, str], published: dict[str, str], tmp_path: Path) -> None:
    anonymous = {name: value for name, value in env.items() if name != "HF_TOKEN"} | {"HF_TOKEN": ""}
    refused(published, tmp_path / "out", anonymous, 2, "base: org/whisper", "private", "hf auth login")
    refused(published, tmp_path / "out", {**env, "HF_TOKEN": f"{TOKEN}X"}, 2, "base: org/whisper", "hf auth login")
    assert servers.of("cdn") == []
    servers.repos[IDS["primary"]].gated = True
    refused(published, tmp_path / "out", env, 2, "primary: org/first is gated", "accept its terms", "hf auth login")
    assert not any(seen.path.startswith("/org/second") for seen in servers.seen)


def test_repositories_that_cannot_be_merged(
    servers: Servers, env: dict[str, str], triple: Triple, tmp_path: Path
) -> None:
    for role, name in IDS.items():
        servers.add(name, triple[role])
    out = tmp_path / "out"
    nothing = {**IDS, "secondary": "org/nothing"}
    refused(nothing, out, env, 2, "secondary: org/nothing", "no local directory", "no such model")
    refused({**IDS, "secondary": "org/second@v2"}, out, env, 2, "secondary: org/second has no revision 'v2'")
    (triple["secondary"] / WEIGHTS).unlink()
    refused(IDS, out, env, 2, "secondary: org/second holds no weights", WEIGHTS, INDEX, PICKLES.weights, PICKLES.index)
    (triple["secondary"] / INDEX).write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    refused(IDS, out, env, 2, f"secondary: org/second {INDEX} names the shard '../x.safetensors'")
    (triple["secondary"] / CONFIG).unlink()
    refused(IDS, out, env, 2, f"secondary: org/second has no {CONFIG}")
    whole = (triple["primary"] / WEIGHTS).stat().st_size
    assert all(seen.bytes < whole for seen in servers.of("cdn")), "nothing whole is fetched before all is checked"


def test_a_repository_of_training_checkpoints_is_refused_with_the_newest(
    servers: Servers, env: dict[str, str], triple: Triple, tmp_path: Path
) -> None:
    for role, name in IDS.items():
        servers.add(name, triple[role])
    for step in (900, 1000):
        (triple["secondary"] / f"checkpoint-{step}").mkdir()
        shutil.copy(triple["secondary"] / WEIGHTS, triple["secondary"] / f"checkpoint-{step}")
    (triple["secondary"] / WEIGHTS).unlink()
    servers.add(IDS["secondary"], triple["secondary"])
    said = ("secondary: org/second holds no weights", "checkpoint-1000", "hf download org/second")
    refused(IDS, tmp_path / "out", env, 2, *said)


def test_what_lies_beside_the_weights_of_a_repository_is_noted(
    servers: Servers, env: dict[str, str], triple: Triple, tmp_path: Path
) -> None:
    """By the list of its files: the ones that are not read are not fetched either."""
    (triple["secondary"] / ADAPTER_CONFIG).write_text("{}")
    (triple["secondary"] / INDEX).write_text("{}")
    for role, name in IDS.items():
        servers.add(name, triple[role])
    notes = merge(IDS, tmp_path / "out", env)["notes"]
    assert sum(note.startswith("secondary holds") for note in notes) == 2


def test_a_mismatch_is_found_before_anything_large_is_fetched(
    servers: Servers, env: dict[str, str], triple: Triple, tmp_path: Path
) -> None:
    edit_json(triple["secondary"] / CONFIG, encoder_attention_heads=1)
    for role, name in IDS.items():
        servers.add(name, triple[role])
    refused(IDS, tmp_path / "out", env, 2, "number of heads differs")
    assert {seen.range and seen.range[0] for seen in servers.of("cdn")} == {0}


def test_the_dry_run_fetches_headers_alone(
    servers: Servers, env: dict[str, str], published: dict[str, str], shared_triple: Triple, tmp_path: Path
) -> None:
    plan = merge(published, tmp_path / "out", env, "--dry-run", "--targets=attention-qkv")
    assert not (tmp_path / "out").exists()
    guess = 1 << 18
    assert {seen.range for seen in servers.of("cdn")} <= {
        (0, min(guess, (path / WEIGHTS).stat().st_size)) for path in shared_triple.values()
    }
    assert len(servers.of("cdn")) == 3
    assert plan["bytes_fetched"] == sum(seen.bytes for seen in servers.seen)
    text = run_hsa(*arguments(published, tmp_path / "out", "--dry-run"), env=env)
    assert text.returncode == 0, text.stderr


# Large-v3's shape --------------------------------------------------------------------------------------------------


def write_hollow(directory: Path, shape: str, dtype: DType) -> Path:
    """A checkpoint with the real layout of a size and nothing but holes for data."""
    directory.mkdir(parents=True)
    write_config(directory, SHAPES[shape], dtype)
    itemsize = 2 if dtype == "float16" else 4
    entries, end = [], 0
    for name, dims in sorted(tensor_shapes(SHAPES[shape]).items()):
        count = itemsize
        for dim in dims:
            count *= dim
        entries.append(safetensors.TensorEntry(name, CODES[dtype], dims, end, end + count))
        end += count
    raw = safetensors.serialize(entries, {"format": "pt"})
    (directory / WEIGHTS).write_bytes(raw)
    os.truncate(directory / WEIGHTS, len(raw) + end)
    return directory


OPEN = """
import json, sys
from hsa.errors import SourceError
from hsa.system.fsio import Tally
from hsa.sources.hub.client import Hub
from hsa.sources.hub.needs import Needs
from hsa.architectures.whisper import WHISPER
hub = Hub()
with hub.open(sys.argv[1], sys.argv[2], Tally(), Needs("targets", "encoder-qkv", assets=True)) as checkpoint:
    readable = {True: [0, 0], False: [0, 0]}
    for name, ref in checkpoint.tensors.items():
        target = WHISPER.target(name, "encoder-qkv") is not None
        view = memoryview(bytearray(8))
        try:
            checkpoint.read_into(ref, view)
            checkpoint.read_into(ref, view, ref.nbytes - 8)
            readable[target][1] += 1
        except SourceError as error:
            assert "were not fetched" in str(error)
        readable[target][0] += 1
    checkpoint.check_unchanged()
print(json.dumps({"fetched": hub.fetched, "targets": readable[True], "others": readable[False]}))
"""


@pytest.mark.parametrize(("role", "dtype"), [("base", "float16"), ("secondary", "float32")])
def test_the_share_of_large_v3_that_is_fetched(
    servers: Servers, env: dict[str, str], tmp_path: Path, role: str, dtype: DType
) -> None:
    directory = write_hollow(tmp_path / "large", "large-v3", dtype)
    servers.add("org/large", directory)
    done = run_python(OPEN, role, "org/large", env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    size = (directory / WEIGHTS).stat().st_size
    sent = sum(seen.bytes for seen in servers.seen)
    assert found["fetched"] == {role: sent}
    assert sent < 0.12 * size
    assert len(servers.of("cdn")) <= 70
    assert len(servers.of("hub")) + len(servers.of("hub", "HEAD")) <= 12
    assert found["targets"] == [160, 160]
    assert found["others"][1] < found["others"][0] / 10, "what lies between targets alone is here too"
    (part,) = (tmp_path / "hf" / "hsa").rglob(f"{WEIGHTS}.part")
    assert part.stat().st_size == size
    print(f"large-v3 {dtype}: {sent} of {size} bytes, {sent / size:.2%}, in {len(servers.of('cdn'))} requests")


def test_a_killed_fetch_goes_on_where_it_was(servers: Servers, env: dict[str, str], tmp_path: Path) -> None:
    directory = write_hollow(tmp_path / "large", "large-v3", "float16")
    servers.add("org/large", directory)
    reached, released = threading.Event(), threading.Event()

    def stall(handler: Handler) -> bool:
        if len(servers.of("cdn")) < 40:
            return False
        reached.set()
        released.wait(30)
        handler.close_connection = True
        return True

    servers.always = stall
    patient = {**os.environ, **env, "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    with subprocess.Popen([sys.executable, "-c", OPEN, "base", "org/large"], env=patient) as process:
        assert reached.wait(60)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    released.set()
    servers.always = None
    before = weights_sent(servers)
    servers.seen.clear()
    done = run_python(OPEN, "base", "org/large", env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["targets"] == [160, 160]
    size = (directory / WEIGHTS).stat().st_size
    assert before > 0.04 * size
    assert before + weights_sent(servers) < 0.12 * size + (32 << 20), "what was on disk is not fetched again"
    assert weights_sent(servers) < 0.08 * size


def test_two_runs_fetch_once(servers: Servers, env: dict[str, str], tmp_path: Path) -> None:
    directory = write_hollow(tmp_path / "small", "small", "float16")
    servers.add("org/small", directory)
    command = [sys.executable, "-c", OPEN, "base", "org/small"]
    both = [subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    places = [seen.range for seen in servers.of("cdn")]
    assert len(places) == len(set(places)) > 1
    assert sum(one["fetched"].get("base", 0) for one in found) >= weights_sent(servers)


# Inspecting --------------------------------------------------------------------------------------------------


def test_an_inspection_fetches_the_targets_alone(
    servers: Servers, published: Mapping[str, str], env: dict[str, str], shared_triple: Triple
) -> None:
    sources = [f"--{role}={name}" for role, name in published.items()]
    done = run_hsa("inspect", *sources, "--json", env=env)
    assert done.returncode == 0, done.stderr
    for secret in (TOKEN, SIGNATURE):
        assert secret not in done.stdout + done.stderr
    found = json.loads(done.stdout)
    here = json.loads(json.dumps(hsa.inspect(**shared_triple, energy=False).as_dict()))
    assert (found["tensors"], found["agreement"]) == (here["tensors"], here["agreement"])
    assert found["energy"] is None
    assert any("base and primary and secondary, on the Hub, only targets were fetched" in n for n in found["notes"])
    assert {role: source["revision"] for role, source in found["sources"].items()} == {
        role: commit_of(name) for role, name in published.items()
    }
    merged = sum((path / WEIGHTS).stat().st_size for path in shared_triple.values())
    assert 0 < weights_sent(servers) < merged / 2
    mixed = run_hsa("inspect", f"--base={shared_triple['base']}", *sources[1:], "--json", "--no-energy", env=env)
    assert mixed.returncode == 0, mixed.stderr
    assert json.loads(mixed.stdout)["tensors"] == here["tensors"]
    assert "share of energy" not in mixed.stdout
    bad = run_hsa("inspect", *sources[:2], "--secondary=org/missing", env=env)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "org/missing" in bad.stderr


def test_an_inspection_of_whole_models_fetches_them_after_it_refused_by_headers(
    servers: Servers, published: Mapping[str, str], env: dict[str, str], shared_triple: Triple
) -> None:
    base, *models = published.values()
    sources = (f"--base={base}", *(f"--model={name}" for name in models))
    done = run_hsa("inspect", "--method=ties", "--density=0.5,", *sources, env=env)
    assert done.returncode == 2 and weights_sent(servers) == 0
    done = run_hsa("inspect", "--method=ties", "--density=0.5", "--only=nothing", *sources, env=env)
    assert done.returncode == 2 and "holds no tensor that" in done.stderr
    assert weights_sent(servers) <= 3 << 18  # the requests for headers
    done = run_hsa("inspect", "--method=ties", "--density=0.5", *sources, "--json", env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    base, *models = map(str, shared_triple.values())
    here = hsa.inspect(method="ties", density=0.5, base=base, models=models).as_dict()
    assert found["tensors"] == json.loads(json.dumps(here["tensors"]))
    assert found["sources"]["model2"]["revision"] == commit_of(published["secondary"])
