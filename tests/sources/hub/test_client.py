"""Hub ids as sources, against a server on this machine with the Hub's URL scheme.

huggingface_hub reads its environment when it is imported, so every run is a process of its own (see `forked`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from forked import run_hsa, run_python
from helpers import merge_arguments, read_tensors, snapshot, write_tensors
from hub_server import SIGNATURE, TOKEN, Servers
from hub_support import (
    IDS,
    IMPATIENT,
    MERGER,
    arguments,
    commit_of,
    env,
    files,
    merge,
    published,
    refused,
    servers,
    weights_sent,
)

import hsa
from hsa.sources.checkpoint import WEIGHTS
from hsa.sources.hub.repository import HubId, find_id

Triple = Mapping[str, Path]

__all__ = ["env", "published", "servers"]


# What is a hub id ----------------------------------------------------------------------------------------------


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


# What a merge gives --------------------------------------------------------------------------------------------


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


# Inspecting ----------------------------------------------------------------------------------------------------


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
