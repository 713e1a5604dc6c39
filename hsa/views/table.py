"""Inspections and comparisons as text: rich tables that fit a terminal, without breaking head maps or words.

Nothing in them is interpreted as markup. With `wide`, every column is shown, however wide the table becomes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hsa.architectures.base import TensorPlace
from hsa.inspection.diff import Comparison, HeadsDiff
from hsa.inspection.distance import Distance
from hsa.inspection.inspect import Inspection, ModelInspection, TensorInspection
from hsa.methods.all_settings import summary
from hsa.views.model_table import print_models
from hsa.views.text import (
    TextBuffer,
    add_row,
    console_on,
    new_table,
    number,
    parameter_text,
    percent,
    print_files,
    print_line,
    print_sources,
)

if TYPE_CHECKING:
    from rich.console import Console

BESIDE_HEADS = 53
"""The width of the narrow table of tensors without its head maps, in characters."""

BESIDE_BOTH = 52
"""The width of the narrow table of two outputs' tensors without its head maps, in characters."""


def render(view: Inspection | ModelInspection | Comparison, *, wide: bool = False) -> str:
    """The text for the current stdout, with its width and encoding, and with colours only on a terminal.

    With `wide`, every column is shown, however wide the table becomes.
    """
    buffer = TextBuffer(sys.stdout)
    console = console_on(buffer, wide=wide)
    if isinstance(view, Inspection):
        _inspection(console, view, wide=wide)
    elif isinstance(view, ModelInspection):
        print_models(console, view, wide=wide)
    else:
        _comparison(console, view, wide=wide)
    return buffer.getvalue().removesuffix("\n")


# --- an inspection ------------------------------------------------------------------------------------------------


def _inspection(console: Console, view: Inspection, *, wide: bool) -> None:
    print_line(
        console, f"{view.title}: {view.selected_heads} of {view.total_heads} heads in {len(view.tensors)} tensors"
    )
    main_parameters = summary(view.parameters)
    print_line(
        console, "how: " + ", ".join(f"{name} {parameter_text(value)}" for name, value in main_parameters.items())
    )
    others = {
        name: value
        for name, value in view.parameters.items()
        if name not in main_parameters and value is not None and value not in (1.0, "auto", {})
    }
    if view.written_by is not None:
        program = f"{view.written_by.get('name')} {view.written_by.get('version')}"
        print_line(
            console, "     " + ", ".join([program, *(f"{name} {parameter_text(v)}" for name, v in others.items())])
        )
    print_sources(console, view.sources)
    _tensors(console, view, wide=wide)
    _agreement(console, view, wide=wide)
    _energy(console, view)
    print_files(console, view.files)


def _tensors(console: Console, view: Inspection, *, wide: bool) -> None:
    with_geometry = wide and any(tensor.geometry is not None for tensor in view.tensors.values())
    more = ("least", "greatest", *(("cos #", "cos .", "tv1/B", "tv2/B") if with_geometry else ())) if wide else ()
    columns = ("layer", "projection", "heads", "merged", "margin", "lambda_i", *more)
    right = ("layer", "merged", "margin", "lambda_i", *more)
    if with_geometry:
        print_line(
            console, "cos # and cos .: mean cosine of tv1 and tv2 over merged and other heads; tv/B: |tv| over |B|"
        )
    legend = "# merged, . primary's" + ("; least and greatest score" if wide else "; --wide shows more columns")
    for stack, block in dict.fromkeys((t.projection.stack, t.projection.block) for t in view.tensors.values()):
        print_line(console, f"\n{stack}, {block}: {legend}")
        table = new_table(*columns, right=right, whole=("projection", "heads"))
        for tensor in view.tensors.values():
            p = tensor.projection
            if (p.stack, p.block) != (stack, block):
                continue
            heads = head_map(tensor, console.width - BESIDE_HEADS)
            row: list[Any] = [p.layer, f"{p.kind} {p.part}", heads, f"{len(tensor.selected)}/{tensor.heads}"]
            row += [number(tensor.margin, ".2g"), f"{tensor.coefficient:.4f}"]
            if wide:
                row += [f"{min(tensor.scores):.4g}", f"{max(tensor.scores):.4g}"]
            add_row(table, *row, *(_means(tensor) if with_geometry else ()))
        console.print(table)


def head_map(tensor: TensorInspection, width: int) -> str:
    """One character per head, or a hint if the whole row does not fit."""
    selected = set(tensor.selected)
    if tensor.heads > width:
        return "see --wide"
    return "".join("#" if head in selected else "." for head in range(tensor.heads))


def _means(tensor: TensorInspection) -> list[str]:
    """The mean cosines over selected and over other heads, and the whole tensor's relative sizes."""
    if tensor.geometry is None:
        return ["", "", "", ""]
    selected = set(tensor.selected)
    cosines = list(enumerate(tensor.geometry.cosines))
    parts = [[c for head, c in cosines if c is not None and (head in selected) == inside] for inside in (True, False)]
    base = sum(tensor.geometry.base)
    sizes = [(sum(t) / base) ** 0.5 if base > 0 else None for t in tensor.geometry.squares]
    means = [sum(part) / len(part) if part else None for part in parts]
    return [*(number(mean, "+.3f") for mean in means), *(number(each, ".3g") for each in sizes)]


def _agreement(console: Console, view: Inspection, *, wide: bool) -> None:
    agreements = view.agreement
    if not agreements:
        return
    print_line(console, "agreement: heads that q, k and v (of biases q and v) all select, of those that any does")
    right = ("common", "of", "by chance", "Jaccard")
    table = new_table("where", *right, *(("pairs",) if wide else ()), right=right, whole=("where", "pairs"))
    for agreement in agreements:
        union = len(set().union(*agreement.selected.values()))
        row: list[Any] = [
            f"{agreement.stack} {agreement.layer} {agreement.block} {agreement.part}",
            len(agreement.common),
            union,
        ]
        row += [f"{agreement.expected_common:.2f}", number(agreement.jaccard, ".2f")]
        if wide:
            row.append("  ".join(f"{name} {number(value, '.2f')}" for name, value in agreement.pairs.items()))
        add_row(table, *row)
    console.print(table)


def _energy(console: Console, view: Inspection) -> None:
    if view.energy is None:
        return
    roles = [each.role for each in view.energy]
    print_line(console, "share of each task vector's energy (its squared L2 norm), of the whole model")
    table = new_table("where", *roles, right=roles, whole=("where",))
    add_row(table, "in the target tensors", *(percent(each.share(each.inside)) for each in view.energy))
    add_row(table, "  in their selected heads", *(percent(each.share(each.selected)) for each in view.energy))
    add_row(table, "elsewhere", *(percent(each.share(max(0.0, each.total - each.inside))) for each in view.energy))
    add_row(table, "by kind of tensor")
    for group in dict.fromkeys(group for each in view.energy for group in each.groups):
        shares = [each.share(each.groups.get(group, 0.0)) for each in view.energy]
        if any(shares):
            add_row(table, f"  {group}", *map(percent, shares))
    console.print(table)
    for each in view.energy:
        if each.skipped:
            print_line(console, f"{each.role}: {len(each.skipped)} tensors left out of it, such as {each.skipped[0]}")


# --- a comparison -------------------------------------------------------------------------------------------------


def _comparison(console: Console, view: Comparison, *, wide: bool) -> None:
    print_line(console, f"A {view.first}")
    print_line(console, f"B {view.second}")
    if view.identical:
        print_line(console, "every file is the same, byte for byte")
    for title, pairs in (("parameters", view.parameters), ("program and libraries", view.program)):
        if not pairs:
            print_line(console, f"{title}: the same")
            continue
        print_line(console, f"{title} that differ")
        table = new_table("name", "A", "B")
        for name, (a, b) in pairs.items():
            add_row(table, name, parameter_text(a), parameter_text(b))
        console.print(table)
    print_line(console, "sources")
    table = new_table("role", "of", "id", "targets", "headers", whole=("role", "targets", "headers"))
    for role, source in view.sources.items():
        compared = [_same(source[key]) for key in ("same_targets", "same_headers")]
        add_row(table, role, "A", _id(source["a"], wide=wide), *compared)
        add_row(table, "", "B", _id(source["b"], wide=wide), "", "")
    console.print(table)
    if view.heads is not None:
        _heads(console, view.heads, view, wide=wide)
    for label, alone in (("A", view.only_first), ("B", view.only_second)):
        if alone:
            print_line(console, f"targets of {label} alone: {len(alone)}, such as {alone[0]}")
    if view.weights is not None:
        _weights(console, view)
    counts = {
        state: [n for n, file_state in view.files.items() if file_state == state]
        for state in dict.fromkeys(view.files.values())
    }
    for state, names in counts.items():
        print_line(console, f"files {state}: {', '.join(names)}")


def _heads(console: Console, heads: Mapping[str, HeadsDiff], view: Comparison, *, wide: bool) -> None:
    print_line(
        console,
        f"selected heads: the same in {view.agreeing_tensors} of {len(heads)} tensors, "
        f"Jaccard {number(view.jaccard, '.3f')} over all",
    )
    unlike = [each for each in heads.values() if not each.same]
    if unlike:
        print_line(console, "tensors with other heads: # merged by both, A or B by that one alone, . by neither")
        lists = ("only A", "only B") if wide else ()
        table = new_table("tensor", "heads", "Jaccard", *lists, right=("Jaccard",), whole=("tensor", "heads", *lists))
        for each in unlike:
            a, b = set(each.first), set(each.second)
            numbers = [", ".join(map(str, sorted(part))) for part in (a - b, b - a)] if wide else []
            signs = _compared_head_map(each, console.width - BESIDE_BOTH)
            add_row(table, each.name if wide else _short_name(each.place), signs, number(each.jaccard, ".2f"), *numbers)
        console.print(table)


def _compared_head_map(diff: HeadsDiff, width: int) -> str:
    """One character per head of two outputs, or a hint if the whole row does not fit."""
    if diff.heads > width:
        return "see --wide"
    signs = {(True, True): "#", (True, False): "A", (False, True): "B", (False, False): "."}
    return "".join(signs[head in diff.first, head in diff.second] for head in range(diff.heads))


def _short_name(place: TensorPlace) -> str:
    """A short description of a target tensor's place in the model."""
    return f"{place.stack} {place.layer} {place.block} {place.kind} {place.part}"


def _weights(console: Console, view: Comparison) -> None:
    weights = view.weights
    assert weights is not None
    print_line(console, "weights: relative L2 distance, |B - A| / |A|")
    table = new_table("where", "distance", "tensors", "equal", right=("distance", "tensors", "equal"))
    named: list[tuple[str, Distance]] = [
        ("all", weights.whole),
        ("targets", weights.targets),
        ("others", weights.others),
    ]
    named += [*weights.stacks.items(), *((f"  {name}", each) for name, each in weights.kinds.items())]
    for name, each in named:
        add_row(table, name, number(each.relative, ".3g"), each.tensors, each.equal)
    console.print(table)
    for label, names in (
        ("without a distance", weights.incomparable),
        ("of A alone", weights.only_first),
        ("of B alone", weights.only_second),
    ):
        if names:
            print_line(console, f"tensors {label}: {len(names)}, such as {names[0]}")


def _id(source: Any, *, wide: bool) -> str:
    if source is None:
        return "-"
    revision = source["revision"]
    return f"{source['id']}@{revision if wide else revision[:12]}" if revision else str(source["id"])


def _same(value: bool) -> str:
    return "same" if value else "different"
