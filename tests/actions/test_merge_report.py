"""What a merge reports, in its report and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import merge_arguments, read_tensors, run_hsa, same_tensors, snapshot, write_tensors
from merge_oracle import check, expected_merge, header, is_target, merge

Triple = dict[str, Path]
INDEX = "model.safetensors.index.json"


# --- the report ---------------------------------------------------------------------------------------------


def header_size(path: Path) -> int:
    return len(header(path))


@pytest.mark.parametrize("shards", [1, 3])
def test_bytes_are_counted_exactly(triple: Triple, shards: int, tmp_path: Path) -> None:
    for path in triple.values():
        write_tensors(path, read_tensors(path), shards=shards)
    report = merge(triple, tmp_path / "out", targets="attention-qkv")
    files = list((tmp_path / "out").iterdir())
    assert report.bytes_written == sum(path.stat().st_size for path in files)

    allowed = dict.fromkeys(triple, 0)
    for role, path in triple.items():
        tensors = read_tensors(path)
        names = tensors if role == "primary" else [name for name in tensors if is_target(name, "attention-qkv")]
        allowed[role] += sum(tensors[name].nbytes for name in names)
        allowed[role] += sum(header_size(file) for file in path.glob("*.safetensors"))
        allowed[role] += sum(file.stat().st_size for file in (path / "config.json", path / INDEX) if file.exists())
    own = ("config.json", "generation_config.json")
    copied = [
        p for p in files if (triple["primary"] / p.name).exists() and (p.suffix != ".safetensors") and p.name != INDEX
    ]
    assert {path.name for path in copied} >= {*own, "vocab.json"}
    allowed["primary"] += sum(path.stat().st_size for path in copied)
    assert report.bytes_read_by_source == allowed
    assert report.bytes_read == sum(allowed.values())
    assert report.bytes_read < sum(f.stat().st_size for p in triple.values() for f in p.glob("*.safetensors"))


def test_report_fields(shared_triple: Triple, tmp_path: Path) -> None:
    report = merge(shared_triple, tmp_path / "out", k=0.25, lam=0.3, alpha=0.7, targets="attention-all")
    assert report.output == tmp_path / "out"
    assert (report.backend, report.device, report.route) == ("cpu", "cpu", "patch")
    assert 0 < report.seconds < 60
    assert 1 << 20 < report.peak_memory_bytes < 16 << 30
    assert report.selected_heads == sum(len(tensor.selected) for tensor in report.tensors.values())
    assert report.total_heads == 4 * len(report.tensors)
    tensor = report.tensors["model.decoder.layers.1.encoder_attn.out_proj.weight"]
    place = tensor.place
    assert place is not None
    assert (place.stack, place.layer, place.block, place.module, place.part) == (
        "decoder",
        1,
        "encoder_attn",
        "out_proj",
        "weight",
    )
    assert (tensor.heads, tensor.keep, len(tensor.scores)) == (4, 1, 4)
    assert tensor.coefficient == 0.3 ** (0.7 * (2 / 2))
    narrowest = min((t for t in report.tensors.values()), key=lambda t: t.margin or 0)
    as_dict = report.as_dict()
    assert (as_dict["min_margin"], as_dict["min_margin_tensor"]) == (narrowest.margin, narrowest.name)
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert report.warnings == ()


def strong_heads(triple: Triple, strengths: list[float]) -> str:
    """Give one target tensor heads of exactly these strengths; its name."""
    name = "model.encoder.layers.0.self_attn.q_proj.weight"
    delta = torch.tensor(strengths).repeat_interleave(16)[:, None].expand(64, 64)
    for role, sign in (("base", 0.0), ("primary", 1.0), ("secondary", -1.0)):
        tensors = read_tensors(triple[role])
        tensors[name] = sign * delta
        write_tensors(triple[role], tensors)
    return name


def test_a_margin_below_the_tie_risk_warns(triple: Triple, tmp_path: Path) -> None:
    name = strong_heads(triple, [3.0, 1.0, 1.0 + 2e-6, 0.5])
    report = check(triple, tmp_path / "out", k=0.5)
    assert report.tensors[name].selected == (0, 2)
    assert 0 < report.as_dict()["min_margin"] < 1e-5
    assert report.as_dict()["min_margin_tensor"] == name
    (warning,) = (warning for warning in report.warnings if "margin" in warning)
    assert name in warning and warning.startswith("1 ")
    strong_heads(triple, [3.0, 1.0, 1.0 + 1e-4, 0.5])
    assert not any("margin" in warning for warning in merge(triple, tmp_path / "clear", k=0.5).warnings)


def test_ties_at_the_cut_are_noted(triple: Triple, tmp_path: Path) -> None:
    name = strong_heads(triple, [3.0, 1.0, 1.0, 0.5])
    report = check(triple, tmp_path / "out", k=0.5)
    assert report.tensors[name].selected == (0, 1, 2)
    assert any("tie" in note and name in note for note in report.notes)
    strong_heads(triple, [3.0, 2.0, 1.0, 0.5])
    assert not any("tie" in note for note in merge(triple, tmp_path / "clear", k=0.5).notes)


def test_progress_counts_up_to_the_bytes_to_write(shared_triple: Triple, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    merge(shared_triple, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert seen
    assert {total for _, total in seen} == {size}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == size


# --- the command line ---------------------------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else(shared_triple: Triple, tmp_path: Path) -> None:
    done = run_hsa(*merge_arguments(shared_triple, tmp_path / "out", "--json", "--no-sync"))
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert printed.keys() >= {
        *("output", "seconds", "bytes_read", "bytes_written", "peak_memory_bytes", "backend", "device"),
        *("target_tensors", "selected_heads", "total_heads", "min_margin", "min_margin_tensor"),
    }
    report = merge(shared_triple, tmp_path / "again")
    ours = {**report.as_dict(), "output": str(tmp_path / "out")}
    for key in ("seconds", "peak_memory_bytes"):
        assert printed.pop(key) > 0
        del ours[key]
    assert "--alpha 1 " in printed.pop("hint") and "alpha=1 " in ours.pop("hint")
    assert printed == ours
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "again")


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ([], {}),
        (["--dtype=float16", "--max-shard-size=50KB"], {"dtype": "float16", "max_shard_size": "50KB"}),
        (
            ["--targets=attention-all", "--non-attention-scale=0.5"],
            {"targets": "attention-all", "non_attention_scale": 0.5},
        ),
    ],
    ids=["patch", "cast", "scaled"],
)
def test_dry_run_writes_nothing_and_tells_the_truth(
    triple: Triple, more: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    done = run_hsa(*merge_arguments(triple, tmp_path / "out", "--dry-run", "--json", *more))
    assert (done.returncode, done.stderr) == (0, "")
    assert snapshot(tmp_path) == before
    plan = json.loads(done.stdout)
    report = merge(triple, tmp_path / "out", **options)
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert plan["files"] == files
    made_at_the_end = sum((tmp_path / "out" / name).stat().st_size for name in ("README.md", "hsa_merge.json"))
    assert plan["bytes_to_write"] == report.bytes_written - made_at_the_end
    assert plan["bytes_to_read"] == report.bytes_read
    assert (plan["route"], plan["backend"], plan["device"]) == (report.route, report.backend, report.device)
    assert plan["targets"] == {name: {"heads": t.heads, "keep": t.keep} for name, t in report.tensors.items()}
    assert (plan["target_tensors"], plan["total_heads"]) == (len(report.tensors), report.total_heads)
    assert plan["parameters"] == report.as_dict()["parameters"]
    assert plan["free_bytes"] > 0


def test_dry_run_in_words(triple: Triple, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    done = run_hsa(*merge_arguments(triple, tmp_path / "new" / "out", "--dry-run"))
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("nothing was written", "targets", "read", "write", "free", "route", "model.safetensors", "v_proj"):
        assert word in done.stdout
    assert snapshot(tmp_path) == before


def test_quiet_prints_warnings_alone(triple: Triple, tmp_path: Path) -> None:
    done = run_hsa(*merge_arguments(triple, tmp_path / "out", "--quiet", "--no-hash", "--no-sync"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "hsa_merge.json").exists()
    same = {**triple, "secondary": triple["base"]}
    done = run_hsa(*merge_arguments(same, tmp_path / "warned", "--quiet", "--no-sync"))
    assert (done.returncode, done.stdout) == (0, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("hsa: warning: ") and "secondary" in line


def test_words_name_heads_route_and_notes(triple: Triple, tmp_path: Path) -> None:
    done = run_hsa(*merge_arguments(triple, tmp_path / "out", "--no-hash", "--no-sync"))
    assert done.returncode == 0
    assert str(tmp_path / "out") in done.stdout and "heads merged" in done.stdout and "margin" in done.stdout
    assert [line for line in done.stderr.splitlines() if line.startswith("hsa: note: ") and "digest" in line]
    assert "\x1b" not in done.stdout + done.stderr


def test_command_line_options_reach_the_merge(shared_triple: Triple, tmp_path: Path) -> None:
    arguments = [
        *("--k=50", "--lambda=0.25", "--alpha=1.5", "--targets=attention-qkv", "--attention-scale=1.5"),
        *("--non-attention-scale=0.75", "--num-heads=8", "--num-layers=3", "--dtype=bfloat16", "--threads=2"),
        *("--max-shard-size=60KB", "--base-id=a/b", "--primary-id=c/d@e", "--secondary-id=f/g", "--card=language=en"),
        *("--assets-from=secondary", "--backend=cpu", "--device=cpu", "--no-sync", "--quiet"),
    ]
    done = run_hsa(*merge_arguments(shared_triple, tmp_path / "out", *arguments))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    merge(
        shared_triple,
        tmp_path / "api",
        k=50,
        lam=0.25,
        alpha=1.5,
        targets="attention-qkv",
        attention_scale=1.5,
        non_attention_scale=0.75,
        num_heads=8,
        num_layers=3,
        dtype="bfloat16",
        max_shard_size="60KB",
        base_id="a/b",
        primary_id="c/d@e",
        secondary_id="f/g",
        card={"language": "en"},
        assets_from="secondary",
    )
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "api")
    tensors, _ = expected_merge(
        shared_triple,
        k=50,
        lam=0.25,
        alpha=1.5,
        targets="attention-qkv",
        attention_scale=1.5,
        non_attention_scale=0.75,
        num_heads=8,
        num_layers=3,
        dtype="bfloat16",
    )
    same_tensors(tmp_path / "out", tensors)
