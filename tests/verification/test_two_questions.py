"""With the sources, `hsa verify` asks two questions apart: whether the bytes follow from the recorded decisions, and
whether the decisions follow from the sources. Every forgery here fits itself, so that without the sources all is sound.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forged_outputs import COPIED, TARGET, WEIGHTS, Triple, forge, forge_with_card, named, told
from forger import Forger
from helpers import merge_arguments, poke, read_tensors, run_hsa

import hsa
from hsa.system.manifest import PROVENANCE
from hsa.verification.decisions import Answers

OTHER = "model.encoder.layers.0.self_attn.q_proj.weight"
"""A target whose decision no test changes."""

PATCH = "patch.safetensors"
Change = Callable[[Path, Triple], None]


@pytest.fixture(scope="module")
def made_patch(shared_triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    place = tmp_path_factory.mktemp("patch") / PATCH
    hsa.merge_patch(**shared_triple, output=place, sync=False)
    return place.read_bytes()


@pytest.fixture
def patch(made_patch: bytes, tmp_path: Path) -> Path:
    """A copy that a test may rewrite."""
    (tmp_path / PATCH).write_bytes(made_patch)
    return tmp_path / PATCH


def rows_by_head(triple: Triple, heads: int, coefficient: float) -> tuple[Any, Any]:
    """The rows of the target as the formula merges them, and those of primary: [heads, group_size, d_in] each."""
    base, primary, secondary = (
        read_tensors(triple[role])[TARGET].numpy().reshape(heads, -1, read_tensors(triple[role])[TARGET].shape[1])
        for role in ("base", "primary", "secondary")
    )
    c1, c2 = np.float32(coefficient), np.float32(1.0 - coefficient)
    return base + ((primary - base) * c1 + (secondary - base) * c2), primary


def select_another_head(decision: dict[str, Any]) -> tuple[int, int]:
    """Change two scores with each other, so that another head is among the largest; the head left out, the head taken
    in. The margin stays what it is."""
    selected, scores = decision["selected"], decision["scores"]
    left_out = selected[0]
    taken_in = next(head for head in range(len(scores)) if head not in selected)
    scores[left_out], scores[taken_in] = scores[taken_in], scores[left_out]
    decision["selected"] = sorted({*selected, taken_in} - {left_out})
    return left_out, taken_in


# --- an output ----------------------------------------------------------------------------------------------------


def let_be(output: Path, triple: Triple) -> None:
    """Change nothing."""


def change_target(output: Path, triple: Triple) -> None:
    poke(output / WEIGHTS, OTHER, 7, np.float32(0.5).tobytes())
    forge(output)


def change_copied(output: Path, triple: Triple) -> None:
    poke(output / WEIGHTS, COPIED, 7, np.float32(0.5).tobytes())
    forge(output)


def forge_decision(output: Path, triple: Triple) -> None:
    """Record another head, and leave the weights as the sources give them."""
    forge_with_card(output, lambda document: select_another_head(document["targets"][TARGET]["decision"]))


def forge_decision_and_follow_it(output: Path, triple: Triple) -> None:
    """Record another head, and merge that one."""
    entry = json.loads((output / PROVENANCE).read_text())["targets"][TARGET]
    merged, primary = rows_by_head(triple, entry["groups"], entry["decision"]["lambda_i"])
    left_out, taken_in = select_another_head(entry["decision"])
    poke(output / WEIGHTS, TARGET, left_out, primary[left_out].tobytes())
    poke(output / WEIGHTS, TARGET, taken_in, merged[taken_in].tobytes())
    forge_decision(output, triple)


def forge_coefficient(output: Path, triple: Triple) -> None:
    """Another lambda for all, every decision with it, and weights that stay: no decision is wrong, every byte is."""

    def change(document: dict[str, Any]) -> None:
        document["parameters"]["lambda"] = 0.25
        for name, entry in document["targets"].items():
            layer = int(name.split(".layers.")[1].split(".")[0])
            entry["decision"]["lambda_i"] = 0.25 ** (0.2 * ((layer + 1) / 2))

    forge_with_card(output, change)


def forge_decision_and_change_target(output: Path, triple: Triple) -> None:
    forge_decision_and_follow_it(output, triple)
    change_target(output, triple)


OUTPUTS: dict[str, tuple[Change, Answers, set[str]]] = {
    "sound": (let_be, Answers(True, True), set()),
    "a target changed": (change_target, Answers(False, True), {WEIGHTS, PROVENANCE}),
    "a copied tensor changed": (change_copied, Answers(False, True), {WEIGHTS, PROVENANCE}),
    "a decision forged and followed": (forge_decision_and_follow_it, Answers(True, False), {PROVENANCE}),
    "a decision forged alone": (forge_decision, Answers(False, False), {WEIGHTS, PROVENANCE}),
    "both": (forge_decision_and_change_target, Answers(False, False), {WEIGHTS, PROVENANCE}),
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_an_output_s_bytes_and_decisions(single: Path, shared_triple: Triple, what: str) -> None:
    change, answers, files = OUTPUTS[what]
    change(single, shared_triple)
    alone = hsa.verify(single)
    assert alone.ok and not alone.sources_compared, told(alone)
    report = hsa.verify(single, **shared_triple)
    assert report.sources_compared
    assert (report.bytes_follow, report.decisions_follow) == (answers.bytes_follow, answers.decisions_follow)
    assert report.ok == (answers == Answers(True, True))
    assert named(report) == files, told(report)


def test_a_forged_decision_is_named_with_what_the_sources_give(single: Path, shared_triple: Triple) -> None:
    entry = json.loads((single / PROVENANCE).read_text())["targets"][TARGET]["decision"]
    right = list(entry["selected"])
    forge_decision_and_follow_it(single, shared_triple)
    select_another_head(entry)
    report = hsa.verify(single, **shared_triple)
    (problem,) = report.problems
    assert problem.file == PROVENANCE
    assert f"the decision for {TARGET} does not follow from the sources" in problem.what
    assert f"selected {entry['selected']} is recorded, the sources give {right}" in problem.what


def test_changed_bytes_are_named_by_tensor_and_head_alone(single: Path, shared_triple: Triple) -> None:
    change_target(single, shared_triple)
    report = hsa.verify(single, **shared_triple)
    assert f"target tensor {OTHER}, head 0: " in told(report) and "the decision for" not in told(report)


def test_other_settings_that_fit_themselves_give_other_bytes(single: Path, shared_triple: Triple) -> None:
    """The decisions follow from the sources and the recorded settings; the weights were made with others."""
    forge_coefficient(single, shared_triple)
    assert hsa.verify(single).ok, told(hsa.verify(single))
    report = hsa.verify(single, **shared_triple)
    assert (report.bytes_follow, report.decisions_follow) == (False, True), told(report)


def test_of_sources_that_cannot_be_compared_nothing_is_answered(single: Path, shared_triple: Triple) -> None:
    forge(single, lambda d: d["sources"]["base"]["files"]["model.safetensors"].update(bytes=1))
    report = hsa.verify(single, **shared_triple)
    assert (report.ok, report.sources_compared) == (False, False)
    assert report.bytes_follow is None and report.decisions_follow is None


# --- a patch ------------------------------------------------------------------------------------------------------


def change_row(path: Path, triple: Triple) -> None:
    forged = Forger.of(path)
    code, shape, data = forged.tensors[OTHER]
    forged.tensors[OTHER] = (code, shape, np.float32(0.5).tobytes() + data[4:])
    forged.write()


def select_in_patch(forged: Forger, triple: Triple, *, follow: bool) -> None:
    entry = forged.document["targets"][TARGET]
    code, shape, data = forged.tensors[TARGET]
    rows = dict(zip(entry["decision"]["selected"], np.frombuffer(data, np.float32).reshape(shape), strict=True))
    merged, _ = rows_by_head(triple, entry["groups"], entry["decision"]["lambda_i"])
    left_out, taken_in = select_another_head(entry["decision"])
    rows[taken_in] = merged[taken_in] if follow else rows[left_out]
    data = b"".join(rows[head].tobytes() for head in entry["decision"]["selected"])
    forged.tensors[TARGET] = (code, shape, data)
    forged.write()


def forge_patch(path: Path, triple: Triple) -> None:
    """Record another head, and keep the rows of the one that was merged."""
    select_in_patch(Forger.of(path), triple, follow=False)


def forge_patch_and_follow_it(path: Path, triple: Triple) -> None:
    """Record another head, and hold the rows that its merge gives."""
    select_in_patch(Forger.of(path), triple, follow=True)


def forge_patch_and_change_row(path: Path, triple: Triple) -> None:
    forge_patch_and_follow_it(path, triple)
    change_row(path, triple)


PATCHES: dict[str, tuple[Change, Answers]] = {
    "sound": (let_be, Answers(True, True)),
    "rewritten": (lambda path, triple: Forger.of(path).write(), Answers(True, True)),
    "a row changed": (change_row, Answers(False, True)),
    "a decision forged and followed": (forge_patch_and_follow_it, Answers(True, False)),
    "a decision forged alone": (forge_patch, Answers(False, False)),
    "both": (forge_patch_and_change_row, Answers(False, False)),
}


@pytest.mark.parametrize("what", PATCHES)
def test_a_patch_s_rows_and_decisions(patch: Path, shared_triple: Triple, what: str) -> None:
    change, answers = PATCHES[what]
    change(patch, shared_triple)
    alone = hsa.verify(patch)
    assert alone.ok and (alone.bytes_follow, alone.decisions_follow) == (None, None), told(alone)
    report = hsa.verify(patch, **shared_triple)
    assert (report.bytes_follow, report.decisions_follow) == (answers.bytes_follow, answers.decisions_follow)
    assert named(report) == (set() if answers == Answers(True, True) else {PATCH}), told(report)
    assert (f"{TARGET}: selected " in told(report)) != answers.decisions_follow
    assert ("bytes are not what the sources give" in told(report)) != answers.bytes_follow


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["sound", "a target changed", "a decision forged and followed", "both"])
def test_the_command_line_says_both(single: Path, shared_triple: Triple, what: str) -> None:
    change, answers, _ = OUTPUTS[what]
    change(single, shared_triple)
    sources = ("--sources", *merge_arguments(shared_triple, single)[1:4])
    code = 0 if answers == Answers(True, True) else 2
    done = run_hsa("verify", single, *sources, "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["ok"], document["sources_compared"]) == (code, code == 0, True)
    assert (document["bytes_follow"], document["decisions_follow"]) == (answers.bytes_follow, answers.decisions_follow)
    shown = run_hsa("verify", single, *sources)
    says = ["follow" if answer else "do not follow" for answer in (answers.bytes_follow, answers.decisions_follow)]
    assert f"the bytes {says[0]} from the recorded decisions, which {says[1]} from the sources" in shown.stdout
    assert shown.returncode == code
    assert ("does not follow from the sources" in shown.stderr) != answers.decisions_follow
    assert ("not what the sources give, first at byte" in shown.stderr) != answers.bytes_follow


def test_the_command_line_says_that_nothing_was_asked(single: Path, patch: Path) -> None:
    for path in (single, patch):
        assert "recorded decisions" not in run_hsa("verify", path).stdout
        done = run_hsa("verify", path, "--json")
        document = json.loads(done.stdout)
        assert done.returncode == 0 and document["sources_compared"] is False
        assert document["bytes_follow"] is None and document["decisions_follow"] is None
    assert "not compared with the sources" in run_hsa("verify", single).stdout


def test_the_command_line_of_a_patch(patch: Path, shared_triple: Triple) -> None:
    forge_patch_and_follow_it(patch, shared_triple)
    done = run_hsa("verify", patch, "--sources", *merge_arguments(shared_triple, patch)[1:4], "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["kind"], document["ok"]) == (2, "patch", False)
    assert (document["bytes_follow"], document["decisions_follow"]) == (True, False)


def test_answers_of_several_are_yes_where_each_is() -> None:
    yes, no = Answers(True, True), Answers(True, False)
    assert Answers.all([yes, yes]) == yes and Answers.all([yes, no]) == no
    assert Answers.all([no, Answers(False, True)]) == Answers(False, False)
