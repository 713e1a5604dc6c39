"""HSA's reports on a merge: its part of notes, warnings, reports and model cards.

`hsa_warnings`, `hsa_extent` and `hsa_card` contain the words and the figures. This class calls them for the reporting
methods of `Method`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from hsa.architectures.base import Architecture
from hsa.findings import Findings
from hsa.methods import hsa_card, hsa_warnings
from hsa.methods.base import Method
from hsa.methods.hsa_extent import Extent, PlannedExtent, change_range, merge_more_hint
from hsa.methods.hsa_formula import settings_of
from hsa.methods.tensors import CardText, Outcome, TensorRecord, TensorTask

D = TypeVar("D")


class HsaReports(Method[Any, D]):
    """HSA's implementation of the reporting methods of `Method`. The settings are HsaSettings."""

    known_as = "Headwise Selective Attention merge"
    citation = hsa_card.PAPER
    tags = hsa_card.TAGS
    needs_heads = True
    selects_heads = True

    def settings_findings(self, candidates: Sequence[Any]) -> Findings:
        return hsa_warnings.percentage_findings(settings.k for settings in candidates)

    def planned_findings(self, tasks: Sequence[TensorTask], settings: Any) -> Findings:
        return hsa_warnings.no_weight_findings(self.planned_summary(tasks, settings), settings.attention_scale)

    def source_findings(self, outcomes: Sequence[Outcome]) -> Findings:
        return hsa_warnings.value_findings(outcomes)

    def result_findings(self, outcomes: Sequence[Outcome]) -> Findings:
        return hsa_warnings.change_findings(outcomes)

    def decision_findings(self, outcomes: Sequence[Outcome]) -> Findings:
        return hsa_warnings.selection_findings(outcomes)

    def planned_summary(self, tasks: Sequence[TensorTask], settings: Any) -> PlannedExtent:
        return PlannedExtent.of(tasks, settings)

    def planned_entry(self, task: TensorTask, settings: Any) -> dict[str, Any]:
        return {"heads": task.partition.groups, "keep": settings_of(task, settings)[0]}

    def summary(self, outcomes: Sequence[Outcome]) -> Extent:
        return Extent.of(outcomes)

    def recorded_summary(self, records: Sequence[TensorRecord]) -> Extent:
        return Extent.of_records(records)

    def summary_range(self, summaries: Mapping[str, Any]) -> str | None:
        return change_range(summaries)

    def hint(self, settings: Any, summary: Any) -> str | None:
        return merge_more_hint(settings, summary.weights, summary.secondaries)

    def card_text(
        self, parameters: Mapping[str, Any], records: Sequence[TensorRecord], architecture: Architecture
    ) -> CardText:
        return hsa_card.card_text(parameters, records, architecture)

    def comparison_notes(self, records: Sequence[TensorRecord]) -> Iterator[str]:
        return hsa_warnings.close_margin_notes(records)
