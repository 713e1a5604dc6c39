"""Inspections and comparisons as text: rich tables, no colour where nobody looks. Nothing in them is read as markup."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from hsa.errors import one_line
from hsa.inspection import Inspection, TensorInspection
from hsa.inspection.diff import Comparison
from hsa.inspection.distance import Distance

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 120
"""Columns where the output is no terminal."""

WIDEST_MAP = 24
"""Heads that are drawn one by one; beyond, their numbers are listed."""


def show(view: Inspection | Comparison, file: IO[str] | None = None) -> None:
    """Print to a stream, by default stdout."""
    out = sys.stdout if file is None else file
    console = _console(out)
    if isinstance(view, Inspection):
        _inspection(console, view)
    else:
        _comparison(console, view)


def _console(out: IO[str]) -> Console:
    from rich.console import Console

    width = None if out.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(file=out, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    return table


def _row(table: Table, *values: Any) -> None:
    from rich.text import Text

    table.add_row(*(Text(one_line("" if value is None else str(value))) for value in values))


def _say(console: Console, text: str) -> None:
    lead = "\n" if text.startswith("\n") else ""
    console.print(lead + one_line(text.removeprefix("\n")), markup=False, soft_wrap=True)


# --- an inspection ------------------------------------------------------------------------------------------------


def _inspection(console: Console, view: Inspection) -> None:
    _say(console, f"{view.title}: {view.selected_heads} of {view.total_heads} heads in {len(view.tensors)} tensors")
    given = {name: view.parameters.get(name) for name in ("k", "lambda", "alpha", "targets", "numerics")}
    _say(console, "how: " + ", ".join(f"{name} {_parameter(value)}" for name, value in given.items()))
    others = {
        name: value
        for name, value in view.parameters.items()
        if name not in given and value is not None and value not in (1.0, "auto", {})
    }
    if view.written_by is not None:
        program = f"{view.written_by.get('name')} {view.written_by.get('version')}"
        _say(console, "     " + ", ".join([program, *(f"{name} {_parameter(v)}" for name, v in others.items())]))
    for role, source in view.sources.items():
        revision = f"@{source['revision']}" if source.get("revision") else ""
        _say(console, f"{role:<10}{source['id']}{revision}" + _digest(source))
    _tensors(console, view)
    _agreement(console, view)
    _energy(console, view)
    if view.files is not None:
        hashed = sum(digest is not None for digest in view.files.values())
        _say(console, f"files: {len(view.files)} recorded, {hashed} with a digest: {', '.join(view.files)}")


def _parameter(value: Any) -> str:
    if isinstance(value, dict):
        numbers = [v for v in value.values() if isinstance(v, int | float)]
        if len(numbers) == len(value) and numbers:
            return f"per tensor, {min(numbers):g} to {max(numbers):g}"
        return ", ".join(f"{key}={each}" for key, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _digest(source: Any) -> str:
    return f"  (targets {source['targets_blake3'][:16]}...)" if "targets_blake3" in source else ""


def _tensors(console: Console, view: Inspection) -> None:
    measured = any(tensor.geometry is not None for tensor in view.tensors.values())
    more = ("cos #", "cos .", "tv1/B", "tv2/B") if measured else ()
    right = ("layer", "kept", "margin", "lambda_i", "least", "greatest", *more)
    if measured:
        _say(console, "cos # and cos .: mean cosine of tv1 and tv2 over merged and other heads; tv/B: |tv| over |B|")
    for stack, block in dict.fromkeys((t.projection.stack, t.projection.block) for t in view.tensors.values()):
        columns = ("layer", "projection", "heads", "kept", "margin", "lambda_i", "least", "greatest", *more)
        _say(console, f"\n{stack}, {block}: # merged, . primary's; least and greatest score")
        table = _table(*columns, right=right)
        for tensor in view.tensors.values():
            p = tensor.projection
            if (p.stack, p.block) != (stack, block):
                continue
            row: list[Any] = [p.layer, f"{p.kind} {p.part}", head_map(tensor), len(tensor.selected)]
            row += [_number(tensor.margin, ".2g"), f"{tensor.coefficient:.4f}"]
            row += [f"{min(tensor.scores):.4g}", f"{max(tensor.scores):.4g}"]
            _row(table, *row, *(_means(tensor) if measured else ()))
        console.print(table)


def head_map(tensor: TensorInspection) -> str:
    """One character a head, or the numbers of the selected where there are many."""
    chosen = set(tensor.selected)
    if tensor.heads > WIDEST_MAP:
        return f"{len(chosen)} of {tensor.heads}: " + ", ".join(map(str, tensor.selected))
    return "".join("#" if head in chosen else "." for head in range(tensor.heads))


def _means(tensor: TensorInspection) -> list[str]:
    """Mean cosine over selected and other heads, and the whole tensor's relative sizes."""
    if tensor.geometry is None:
        return ["", "", "", ""]
    chosen = set(tensor.selected)
    cosines = list(enumerate(tensor.geometry.cosines))
    parts = [[c for head, c in cosines if c is not None and (head in chosen) == inside] for inside in (True, False)]
    base = sum(tensor.geometry.base)
    sizes = [(sum(t) / base) ** 0.5 if base > 0 else None for t in (tensor.geometry.primary, tensor.geometry.secondary)]
    means = [sum(part) / len(part) if part else None for part in parts]
    return [*(_number(mean, "+.3f") for mean in means), *(_number(each, ".3g") for each in sizes)]


def _agreement(console: Console, view: Inspection) -> None:
    found = view.agreement
    if not found:
        return
    _say(console, "agreement: heads that q, k and v (of biases q and v) all select, of those that any does")
    table = _table(
        *("stack", "layer", "block", "part", "common", "of", "by chance", "Jaccard", "pairs"),
        right=("layer", "common", "of", "by chance", "Jaccard"),
    )
    for each in found:
        union = len(set().union(*each.selected.values()))
        pairs = "  ".join(f"{name} {_number(value, '.2f')}" for name, value in each.pairs.items())
        row: list[Any] = [each.stack, each.layer, each.block, each.part, len(each.common), union]
        _row(table, *row, f"{each.expected_common:.2f}", _number(each.jaccard, ".2f"), pairs)
    console.print(table)


def _energy(console: Console, view: Inspection) -> None:
    if view.energy is None:
        return
    roles = [each.role for each in view.energy]
    _say(console, "share of each task vector's energy (its squared L2 norm), of the whole model")
    table = _table("where", *roles, right=roles)
    _row(table, "in the target tensors", *(_percent(each.share(each.inside)) for each in view.energy))
    _row(table, "  in their selected heads", *(_percent(each.share(each.selected)) for each in view.energy))
    _row(table, "elsewhere", *(_percent(each.share(max(0.0, each.total - each.inside))) for each in view.energy))
    _row(table, "by kind of tensor")
    for group in dict.fromkeys(group for each in view.energy for group in each.groups):
        shares = [each.share(each.groups.get(group, 0.0)) for each in view.energy]
        if any(shares):
            _row(table, f"  {group}", *map(_percent, shares))
    console.print(table)
    for each in view.energy:
        if each.skipped:
            _say(console, f"{each.role}: {len(each.skipped)} tensors left out of it, such as {each.skipped[0]}")


# --- a comparison -------------------------------------------------------------------------------------------------


def _comparison(console: Console, view: Comparison) -> None:
    _say(console, f"A {view.first}")
    _say(console, f"B {view.second}")
    if view.identical:
        _say(console, "every file is the same, byte for byte")
    for title, pairs in (("parameters", view.parameters), ("program and libraries", view.program)):
        if not pairs:
            _say(console, f"{title}: the same")
            continue
        _say(console, f"{title} that differ")
        table = _table("name", "A", "B")
        for name, (a, b) in pairs.items():
            _row(table, name, _parameter(a), _parameter(b))
        console.print(table)
    _say(console, "sources")
    table = _table("role", "A", "B", "target bytes", "files' headers")
    for role, source in view.sources.items():
        row = [_id(source["a"]), _id(source["b"])]
        _row(table, role, *row, *(_same(source[key]) for key in ("same_targets", "same_headers")))
    console.print(table)
    _heads(console, view)
    if view.weights is not None:
        _weights(console, view)
    counts = {
        state: [n for n, found in view.files.items() if found == state] for state in dict.fromkeys(view.files.values())
    }
    for state, names in counts.items():
        _say(console, f"files {state}: {', '.join(names)}")


def _heads(console: Console, view: Comparison) -> None:
    _say(
        console,
        f"selected heads: the same in {view.agreeing_tensors} of {len(view.heads)} tensors, "
        f"Jaccard {_number(view.jaccard, '.3f')} over all",
    )
    unlike = [each for each in view.heads.values() if not each.same]
    if unlike:
        _say(console, "tensors with other heads")
        table = _table("tensor", "only A", "only B", "Jaccard", right=("Jaccard",))
        for each in unlike:
            a, b = set(each.first), set(each.second)
            lists = [", ".join(map(str, sorted(part))) for part in (a - b, b - a)]
            _row(table, each.name, *lists, _number(each.jaccard, ".2f"))
        console.print(table)
    for label, names in (("A", view.only_first), ("B", view.only_second)):
        if names:
            _say(console, f"targets of {label} alone: {len(names)}, such as {names[0]}")


def _weights(console: Console, view: Comparison) -> None:
    weights = view.weights
    assert weights is not None
    _say(console, "weights: relative L2 distance, |B - A| / |A|")
    table = _table("where", "distance", "tensors", "equal", right=("distance", "tensors", "equal"))
    named: list[tuple[str, Distance]] = [
        ("all", weights.whole),
        ("targets", weights.targets),
        ("others", weights.others),
    ]
    named += [*weights.stacks.items(), *((f"  {name}", each) for name, each in weights.kinds.items())]
    for name, each in named:
        _row(table, name, _number(each.relative, ".3g"), each.tensors, each.equal)
    console.print(table)
    for label, names in (
        ("without a distance", weights.incomparable),
        ("of A alone", weights.only_first),
        ("of B alone", weights.only_second),
    ):
        if names:
            _say(console, f"tensors {label}: {len(names)}, such as {names[0]}")


def _id(source: Any) -> str:
    return f"{source['id']}@{source['revision']}" if source["revision"] else str(source["id"])


def _same(value: bool) -> str:
    return "same" if value else "different"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
