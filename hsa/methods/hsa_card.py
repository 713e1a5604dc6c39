"""The text about an HSA merge on a model card: the method in words, the merged heads, tags, and the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hsa.architectures.base import Architecture
from hsa.methods.hsa_extent import secondaries_of
from hsa.methods.markdown import table
from hsa.methods.selection import count_heads
from hsa.methods.tensors import CardText, TensorRecord

TAGS = ("headwise-selective-attention", "hsa-merge")

PAPER = """@article{shankar2026compositional,
  title   = {Compositional domain adaptation for automatic speech recognition with headwise selective
             attention merging},
  author  = {Shankar, Natarajan Balaji and Wang, Zilai and Eren, Eray and Alwan, Abeer},
  journal = {Computer Speech \\& Language},
  pages   = {102012},
  year    = {2026},
  doi     = {10.1016/j.csl.2026.102012}
}"""

METHOD = """Headwise Selective Attention (HSA) merge composes two fine-tunes of one pretrained model without
retraining. With `B` the base, `tv1` and `tv2` the task vectors of primary and secondary, each target tensor
ranks its attention heads by the L2 norm of `|tv1| + |tv2|`. The selected heads become
`B + attention_scale * (lambda_i * tv1 + (1 - lambda_i) * tv2)` with
`lambda_i = lambda ** (alpha * (i + 1) / L)` in layer `i` of `L`."""


METHOD_OF_SEVERAL = """Headwise Selective Attention (HSA) merge composes fine-tunes of one pretrained model without
retraining. With `B` the base, `tv1` the task vector of primary and `tv2` to `tv{models}` those of the secondaries, each
target tensor ranks its attention heads by the L2 norm of `|tv1| + ... + |tv{models}|`. The selected heads become
`B + attention_scale * (lambda_i * tv1 + (1 - lambda_i) * m)`, where `m` is the mean of the secondaries' task vectors,
{weighted}, with `lambda_i = lambda ** (alpha * (i + 1) / L)` in layer `i` of `L`. More than two models are an
extension of the published method."""


def card_text(parameters: Mapping[str, Any], records: Sequence[TensorRecord], architecture: Architecture) -> CardText:
    """HSA's part of a card."""
    heads = (
        f"{count_heads(records)} heads in {len(records)} target tensors. Scores and margins are in "
        f"`hsa_merge.json`.\n\n{heads_table(records, architecture)}"
    )
    models = secondaries_of(record.decision for record in records) + 1
    return CardText(method_text(parameters, models), (("Merged heads", heads),), "HSA merge", "heads, scores")


def method_text(parameters: Mapping[str, Any], models: int = 2) -> str:
    """The method with its formula, for the settings of the merge and the number of models."""
    if parameters["attention_scale"] == parameters["non_attention_scale"] == 1.0:
        rest = "Everything else stays primary's."
    else:
        rest = (
            "Other heads of these tensors become `B + attention_scale * tv1`, all other tensors\n"
            "`B + non_attention_scale * tv1`."
        )
    if parameters["numerics"] == "reference":
        rest += (
            "\nComputed with the reference script's own operations, which write every tensor as `B + scale * tv1` and\n"
            "so may differ from primary in the last bit."
        )
    if models == 2:
        return f"{METHOD} {rest}"
    weighted = "weighted by `weights`" if "weights" in parameters else "with equal weights"
    return f"{METHOD_OF_SEVERAL.format(models=models, weighted=weighted)} {rest}"


def heads_table(records: Sequence[TensorRecord], architecture: Architecture) -> str:
    """The merged heads of every target: a row for each attention, a column for each projection."""
    stacks: dict[tuple[str, str, int], dict[str, str]] = {}
    columns: list[str] = []
    for record in records:
        place = record.projection
        column = f"{place.kind} {place.part}"
        if column not in columns:
            columns.append(column)
        heads = " ".join(map(str, record.selected)) or "none"
        stacks.setdefault((place.stack, place.block, place.layer), {})[column] = heads
    columns.sort(key=lambda column: ("qkvo".index(column[0]), column.endswith("bias")))
    rows = []
    for (stack, block, layer), cells in sorted(
        stacks.items(), key=lambda item: (architecture.all_stacks.index(item[0][0]), *item[0][1:])
    ):
        rows.append((f"{stack} {block.replace('_', ' ')}", str(layer), *(cells.get(column, "") for column in columns)))
    return table(("attention", "layer", *columns), rows)
