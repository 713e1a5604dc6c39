"""What reports and mergers say of themselves: one short line with what matters, as a notebook shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from helpers import read_tensors, write_tensors

import hsa
from hsa.actions.merge import dry_run
from hsa.actions.request import Request
from hsa.methods.hsa import HsaSettings

Triple = dict[str, Path]


def said(value: Any, pattern: str) -> None:
    text = repr(value)
    assert re.fullmatch(pattern, text), text
    assert text.isprintable()


def test_a_report_of_a_merge_says_how_much_was_merged(shared_triple: Triple, tmp_path: Path) -> None:
    report = hsa.merge(output=tmp_path / "out", sync=False, **shared_triple)
    said(report, rf"<hsa\.MergeReport of {tmp_path}/out: secondary weighs \S+ to \S+ % in \d+ of 40 heads; .*>")
    warned = hsa.merge(output=tmp_path / "same", sync=False, **{**shared_triple, "secondary": shared_triple["primary"]})
    said(warned, r"<.*; 1 warning>")


def test_a_plan_says_how_much_will_be_merged(shared_triple: Triple, tmp_path: Path) -> None:
    plan = dry_run(Request(sources=dict(shared_triple), output=tmp_path / "out", settings=HsaSettings()))
    said(plan, rf"<hsa\.PlanReport of {tmp_path}/out: secondary will weigh .*>|<hsa\.PlanReport of .*: secondary .*>")


def test_a_verification_says_whether_the_output_is_sound(shared_triple: Triple, tmp_path: Path) -> None:
    hsa.merge(output=tmp_path / "out", sync=False, **shared_triple)
    said(hsa.verify(tmp_path / "out"), rf"<hsa\.VerifyReport of output {tmp_path}/out: sound, \d+ files read>")
    tensors = read_tensors(tmp_path / "out")
    tensors["model.encoder.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    write_tensors(tmp_path / "out", tensors)
    said(hsa.verify(tmp_path / "out"), r"<hsa\.VerifyReport of .*: not sound, \d+ found wrong, model\.safetensors: .*>")


def test_a_sweep_says_what_was_made(shared_triple: Triple, tmp_path: Path) -> None:
    report = hsa.sweep(output=tmp_path / "sweep", lam=[0.1, 0.5], sync=False, **shared_triple)
    said(report, rf"<hsa\.SweepReport of {tmp_path}/sweep: 2 points made, 0 skipped>")


def test_a_release_says_what_became_of_its_entries(shared_triple: Triple, tmp_path: Path) -> None:
    entry = ", ".join(["name: one", "group: g", *(f"{role}: {path}" for role, path in shared_triple.items())])
    (tmp_path / "recipe.yaml").write_text(f"merges:\n- {{{entry}}}\n")
    report = hsa.release(tmp_path / "recipe.yaml", tmp_path / "tree", sync=False)
    said(report, rf"<hsa\.ReleaseReport of {tmp_path}/tree: 1 built, 0 verified, 0 failed>")


def test_an_inspection_says_what_it_is_of(shared_triple: Triple) -> None:
    said(hsa.inspect(**shared_triple), r"<hsa\.Inspection of .*: \d+ of 40 heads selected in 10 tensors>")
