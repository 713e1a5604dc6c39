"""What is said of a merge by a method without heads: reports, their text, and what is left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hsa.architectures.registry import default
from hsa.cli.merge import _describe_plan
from hsa.cli.printing import merge_report
from hsa.methods.merged_tensors import TensorCount
from hsa.methods.registry import method_named
from hsa.outputs.report import MergeReport, PlanReport, outcome_findings

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hsa.methods.base import Contract, Method
from hsa.methods.settings import Settings


@dataclass(frozen=True)
class LargestSettings(Settings):
    method: ClassVar[str] = "largest"


class Largest(Method):
    name, title, Settings = "largest", "Largest element", LargestSettings
    formula, source = "max(M1, M2, ...)", "a test"
    contract = Contract(base="none", least=2, most=5)

    def apply(self, block, decision, out):
        np.max([block.weights(role) for role in block.models], axis=0, out=out)
"""
HEADS = {"selected_heads", "heads_to_merge", "total_heads", "min_margin", "min_margin_tensor"}
WEIGHTS = {"secondary_weight", "change", "task_vectors"}
"""Keys of HSA's reports."""


@pytest.fixture(autouse=True)
def largest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "largest_plugin.py"
    path.write_text(PLUGIN, encoding="utf-8")
    monkeypatch.setenv("HSA_PLUGINS", str(path))


def plan_of(*names: str) -> PlanReport:
    method = method_named("largest")
    targets: Any = tuple(SimpleNamespace(stored=SimpleNamespace(name=name)) for name in names)
    sizes = dict.fromkeys(("bytes_to_read", "bytes_to_write", "bytes_fetched", "bytes_to_fetch", "free_bytes"), 0)
    return PlanReport(
        output=Path("out"),
        route="rewrite",
        backend="cpu",
        device="cpu",
        settings=method.Settings(),
        targets=targets,
        files={},
        notes=(),
        warnings=(),
        **sizes,
    )


def report_of(count: int, unlinked: tuple[str, ...] = ()) -> MergeReport:
    sizes = dict.fromkeys(("bytes_read", "bytes_written", "bytes_fetched", "peak_memory_bytes"), 0)
    return MergeReport(
        output=Path("out"),
        seconds=0.0,
        bytes_read_by_source={},
        backend="cpu",
        device="cpu",
        route="rewrite",
        settings=method_named("largest").Settings(),
        tensors={},
        extent=TensorCount(count),
        notes=(),
        warnings=(),
        unlinked=unlinked,
        **sizes,
    )


def test_a_plan_counts_tensors_and_leaves_heads_out() -> None:
    plan = plan_of("a", "b", "c")
    assert (plan.text, plan.hint, plan.heads_to_merge, plan.total_heads) == ("3 tensors to merge", None, None, None)
    said = plan.as_dict()
    assert not (HEADS | WEIGHTS) & said.keys()
    assert said["targets"] == {"a": {}, "b": {}, "c": {}}
    assert said["parameters"] == {"dtype": "auto"}
    text = _describe_plan(plan)
    assert "  targets 3 tensors to merge: a ... c\n" in text
    assert "extent" not in text and "head" not in text


def test_a_report_counts_tensors_and_leaves_heads_out() -> None:
    report = report_of(3)
    assert (report.selected_heads, report.total_heads, report.narrowest, report.hint) == (None, None, None, None)
    assert not (HEADS | WEIGHTS) & report.as_dict().keys()
    text = merge_report(report)
    assert text.splitlines()[1] == "  3 tensors merged (rewrite route, backend cpu)"
    assert "head" not in text and "margin" not in text and text.count("3 tensors") == 1


def test_ids_of_models_that_go_by_their_place_are_one_option() -> None:
    text = merge_report(report_of(3, ("base", "model1", "model2")))
    assert "links no model for base, model1, model2: before you publish, give --base-id, --model-id" in text


def test_equal_sources_are_told_and_nothing_else() -> None:
    method = method_named("largest")
    pair = frozenset({("model1", "model3")})
    task = SimpleNamespace(sources={})
    outcomes: Any = [
        SimpleNamespace(equal=pair | {("model1", "model2")}, task=task, sums=None),
        SimpleNamespace(equal=pair, task=task, sums=None),
    ]
    (warning,) = method.source_findings(outcomes).warnings
    assert warning == "model1 and model3 are equal on all 2 target tensors: is the same model given twice?"
    assert outcome_findings(method, outcomes).warnings == method.settings_findings([]).warnings == ()


def test_the_card_has_the_title_the_formula_and_the_source() -> None:
    text = method_named("largest").card_text({}, [], default())
    assert text.method == "Largest element: `max(M1, M2, ...)`. Source: a test."
    assert (text.sections, text.merge, text.decisions) == ((), "", "decisions")
