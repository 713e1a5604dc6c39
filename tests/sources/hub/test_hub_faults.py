"""What goes wrong with hub ids: servers that fail, repositories that cannot be merged, and what is said of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from forked import run_hsa
from helpers import edit_json, merge_arguments
from hub_server import TOKEN, Servers, cut_short, slow, status_503, wrong_range
from hub_support import IDS, arguments, env, files, merge, published, refused, servers

from hsa.sources.checkpoint import ADAPTER_CONFIG, CONFIG, INDEX, PICKLES, WEIGHTS

Triple = Mapping[str, Path]

__all__ = ["env", "published", "servers"]


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
