"""Inspections and comparisons as text: rich tables that fit a terminal, whole heads and whole words in every row.

Nothing in them is read as markup. With `wide` every column is shown, however wide the table is then.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal

from hsa.architectures.base import TensorPlace
from hsa.errors import one_line
from hsa.inspection.diff import Comparison, HeadsDiff
from hsa.inspection.distance import Distance
from hsa.inspection.inspect import Inspection, TensorInspection
from hsa.methods.all_settings import summary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 80
"""Columns where the output is no terminal."""

UNLIMITED = 100_000
"""Columns of a wide table: more than any has."""

BESIDE_HEADS = 53
"""Columns that the narrow table of tensors needs beside its heads."""

BESIDE_BOTH = 52
"""Columns that the narrow table of two outputs' tensors needs beside their heads."""


def render(view: Inspection | Comparison, *, wide: bool = False) -> str:
    """The text for stdout as it is now: its width, its letters, colours on a terminal alone.

    `wide`: every column, however wide that is.
    """
    buffer = _TextBuffer(sys.stdout)
    console = _console(buffer, wide=wide)
    if isinstance(view, Inspection):
        _inspection(console, view, wide=wide)
    else:
        _comparison(console, view, wide=wide)
    return buffer.getvalue().removesuffix("\n")


class _TextBuffer(io.StringIO):
    """Text that is kept, and looks to rich like this stream: a terminal or none, with its encoding."""

    def __init__(self, stream: IO[str] | None) -> None:
        super().__init__()
        self._stream = stream

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"


def _console(out: IO[str], *, wide: bool) -> Console:
    from rich.console import Console

    width = None if out.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(
        file=out, width=UNLIMITED if wide else width, markup=False, highlight=False, emoji=False, soft_wrap=False
    )


def _table(*columns: str, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """A table without rows. Columns on the `right` hold numbers; these and the `whole` ones are never wrapped."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        justify: Literal["left", "right"] = "right" if name in right else "left"
        unbroken = name in (*right, *whole)
        table.add_column(Text(name), justify=justify, overflow="fold", no_wrap=unbroken)
    return table


def _row(table: Table, *values: Any) -> None:
    from rich.text import Text

    table.add_row(*(Text(one_line("" if value is None else str(value))) for value in values))


def _print_line(console: Console, text: str) -> None:
    """A line of text, wrapped between words at the console's width."""
    lead = "\n" if text.startswith("\n") else ""
    console.print(lead + one_line(text.removeprefix("\n")), markup=False)


# --- an inspection ------------------------------------------------------------------------------------------------


def _inspection(console: Console, view: Inspection, *, wide: bool) -> None:
    _print_line(
        console, f"{view.title}: {view.selected_heads} of {view.total_heads} heads in {len(view.tensors)} tensors"
    )
    main_parameters = summary(view.parameters)
    _print_line(console, "how: " + ", ".join(f"{name} {_parameter(value)}" for name, value in main_parameters.items()))
    others = {
        name: value
        for name, value in view.parameters.items()
        if name not in main_parameters and value is not None and value not in (1.0, "auto", {})
    }
    if view.written_by is not None:
        program = f"{view.written_by.get('name')} {view.written_by.get('version')}"
        _print_line(console, "     " + ", ".join([program, *(f"{name} {_parameter(v)}" for name, v in others.items())]))
    for role, source in view.sources.items():
        revision = f"@{source['revision']}" if source.get("revision") else ""
        _print_line(console, f"{role:<10}{source['id']}{revision}" + _digest(source))
    _tensors(console, view, wide=wide)
    _agreement(console, view, wide=wide)
    _energy(console, view)
    if view.files is not None:
        hashed = sum(digest is not None for digest in view.files.values())
        _print_line(console, f"files: {len(view.files)} recorded, {hashed} with a digest: {', '.join(view.files)}")


def _parameter(value: Any) -> str:
    if isinstance(value, dict):
        numbers = [v for v in value.values() if isinstance(v, int | float)]
        if len(numbers) == len(value) and numbers:
            return f"per tensor, {min(numbers):g} to {max(numbers):g}"
        return ", ".join(f"{key}={each}" for key, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _digest(source: Any) -> str:
    return f"  (targets {source['targets_blake3'][:16]}...)" if "targets_blake3" in source else ""


def _tensors(console: Console, view: Inspection, *, wide: bool) -> None:
    with_geometry = wide and any(tensor.geometry is not None for tensor in view.tensors.values())
    more = ("least", "greatest", *(("cos #", "cos .", "tv1/B", "tv2/B") if with_geometry else ())) if wide else ()
    columns = ("layer", "projection", "heads", "merged", "margin", "lambda_i", *more)
    right = ("layer", "merged", "margin", "lambda_i", *more)
    if with_geometry:
        _print_line(
            console, "cos # and cos .: mean cosine of tv1 and tv2 over merged and other heads; tv/B: |tv| over |B|"
        )
    legend = "# merged, . primary's" + ("; least and greatest score" if wide else "; --wide shows more columns")
    for stack, block in dict.fromkeys((t.projection.stack, t.projection.block) for t in view.tensors.values()):
        _print_line(console, f"\n{stack}, {block}: {legend}")
        table = _table(*columns, right=right, whole=("projection", "heads"))
        for tensor in view.tensors.values():
            p = tensor.projection
            if (p.stack, p.block) != (stack, block):
                continue
            heads = head_map(tensor, console.width - BESIDE_HEADS)
            row: list[Any] = [p.layer, f"{p.kind} {p.part}", heads, f"{len(tensor.selected)}/{tensor.heads}"]
            row += [_number(tensor.margin, ".2g"), f"{tensor.coefficient:.4f}"]
            if wide:
                row += [f"{min(tensor.scores):.4g}", f"{max(tensor.scores):.4g}"]
            _row(table, *row, *(_means(tensor) if with_geometry else ()))
        console.print(table)


def head_map(tensor: TensorInspection, width: int) -> str:
    """One character a head, or a word for it where there is no room for the whole row."""
    selected = set(tensor.selected)
    if tensor.heads > width:
        return "see --wide"
    return "".join("#" if head in selected else "." for head in range(tensor.heads))


def _means(tensor: TensorInspection) -> list[str]:
    """Mean cosine over selected and other heads, and the whole tensor's relative sizes."""
    if tensor.geometry is None:
        return ["", "", "", ""]
    selected = set(tensor.selected)
    cosines = list(enumerate(tensor.geometry.cosines))
    parts = [[c for head, c in cosines if c is not None and (head in selected) == inside] for inside in (True, False)]
    base = sum(tensor.geometry.base)
    sizes = [(sum(t) / base) ** 0.5 if base > 0 else None for t in tensor.geometry.squares]
    means = [sum(part) / len(part) if part else None for part in parts]
    return [*(_number(mean, "+.3f") for mean in means), *(_number(each, ".3g") for each in sizes)]


def _agreement(console: Console, view: Inspection, *, wide: bool) -> None:
    agreements = view.agreement
    if not agreements:
        return
    _print_line(console, "agreement: heads that q, k and v (of biases q and v) all select, of those that any does")
    right = ("common", "of", "by chance", "Jaccard")
    table = _table("where", *right, *(("pairs",) if wide else ()), right=right, whole=("where", "pairs"))
    for agreement in agreements:
        union = len(set().union(*agreement.selected.values()))
        row: list[Any] = [
            f"{agreement.stack} {agreement.layer} {agreement.block} {agreement.part}",
            len(agreement.common),
            union,
        ]
        row += [f"{agreement.expected_common:.2f}", _number(agreement.jaccard, ".2f")]
        if wide:
            row.append("  ".join(f"{name} {_number(value, '.2f')}" for name, value in agreement.pairs.items()))
        _row(table, *row)
    console.print(table)


def _energy(console: Console, view: Inspection) -> None:
    if view.energy is None:
        return
    roles = [each.role for each in view.energy]
    _print_line(console, "share of each task vector's energy (its squared L2 norm), of the whole model")
    table = _table("where", *roles, right=roles, whole=("where",))
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
            _print_line(console, f"{each.role}: {len(each.skipped)} tensors left out of it, such as {each.skipped[0]}")


# --- a comparison -------------------------------------------------------------------------------------------------


def _comparison(console: Console, view: Comparison, *, wide: bool) -> None:
    _print_line(console, f"A {view.first}")
    _print_line(console, f"B {view.second}")
    if view.identical:
        _print_line(console, "every file is the same, byte for byte")
    for title, pairs in (("parameters", view.parameters), ("program and libraries", view.program)):
        if not pairs:
            _print_line(console, f"{title}: the same")
            continue
        _print_line(console, f"{title} that differ")
        table = _table("name", "A", "B")
        for name, (a, b) in pairs.items():
            _row(table, name, _parameter(a), _parameter(b))
        console.print(table)
    _print_line(console, "sources")
    table = _table("role", "of", "id", "targets", "headers", whole=("role", "targets", "headers"))
    for role, source in view.sources.items():
        compared = [_same(source[key]) for key in ("same_targets", "same_headers")]
        _row(table, role, "A", _id(source["a"], wide=wide), *compared)
        _row(table, "", "B", _id(source["b"], wide=wide), "", "")
    console.print(table)
    if view.heads is not None:
        _heads(console, view.heads, view, wide=wide)
    for label, alone in (("A", view.only_first), ("B", view.only_second)):
        if alone:
            _print_line(console, f"targets of {label} alone: {len(alone)}, such as {alone[0]}")
    if view.weights is not None:
        _weights(console, view)
    counts = {
        state: [n for n, file_state in view.files.items() if file_state == state]
        for state in dict.fromkeys(view.files.values())
    }
    for state, names in counts.items():
        _print_line(console, f"files {state}: {', '.join(names)}")


def _heads(console: Console, heads: Mapping[str, HeadsDiff], view: Comparison, *, wide: bool) -> None:
    _print_line(
        console,
        f"selected heads: the same in {view.agreeing_tensors} of {len(heads)} tensors, "
        f"Jaccard {_number(view.jaccard, '.3f')} over all",
    )
    unlike = [each for each in heads.values() if not each.same]
    if unlike:
        _print_line(console, "tensors with other heads: # merged by both, A or B by that one alone, . by neither")
        lists = ("only A", "only B") if wide else ()
        table = _table("tensor", "heads", "Jaccard", *lists, right=("Jaccard",), whole=("tensor", "heads", *lists))
        for each in unlike:
            a, b = set(each.first), set(each.second)
            numbers = [", ".join(map(str, sorted(part))) for part in (a - b, b - a)] if wide else []
            signs = _compared_head_map(each, console.width - BESIDE_BOTH)
            _row(table, each.name if wide else _short_name(each.place), signs, _number(each.jaccard, ".2f"), *numbers)
        console.print(table)


def _compared_head_map(diff: HeadsDiff, width: int) -> str:
    """One character a head of two outputs, or a word for it where there is no room for the whole row."""
    if diff.heads > width:
        return "see --wide"
    signs = {(True, True): "#", (True, False): "A", (False, True): "B", (False, False): "."}
    return "".join(signs[head in diff.first, head in diff.second] for head in range(diff.heads))


def _short_name(place: TensorPlace) -> str:
    """A target tensor's place in the model, shorter than its name."""
    return f"{place.stack} {place.layer} {place.block} {place.kind} {place.part}"


def _weights(console: Console, view: Comparison) -> None:
    weights = view.weights
    assert weights is not None
    _print_line(console, "weights: relative L2 distance, |B - A| / |A|")
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
            _print_line(console, f"tensors {label}: {len(names)}, such as {names[0]}")


def _id(source: Any, *, wide: bool) -> str:
    if source is None:
        return "-"
    revision = source["revision"]
    return f"{source['id']}@{revision if wide else revision[:12]}" if revision else str(source["id"])


def _same(value: bool) -> str:
    return "same" if value else "different"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
