"""An inspection of whole models as text: how far each model moved, its kept share, cosines, and sign conflicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hsa.inspection.model_report import Group, ModelInspection, Spot
from hsa.inspection.vector_sums import KeptSums, VectorSums
from hsa.methods.all_settings import summary
from hsa.views.text import add_row, new_table, number, parameter_text, percent, print_files, print_line, print_sources

if TYPE_CHECKING:
    from rich.console import Console

MOST_COSINES = 4
"""The most models whose pairwise cosines fit into a narrow table."""

APART = "apart: distance between two models, relative to the norm of the second"
"""The legend of the column that replaces cosines if there is no base. The cosines of models of one base would all be
1.000 to three digits."""

MOST_CONFLICTS = 3
"""The number of places with the most conflicts that are named."""


def print_models(console: Console, view: ModelInspection, *, wide: bool) -> None:
    """Print an inspection. With `wide`, also by layer, and by single kinds of tensors."""
    whole = view.whole
    which = "all" if whole.copied == whole.tensors else f"{whole.copied} of them"
    copied = f", {which} equal in all sources and copied" if whole.copied else ""
    size = f"{whole.tensors} tensors of {whole.elements / 1e6:.1f} million elements{copied}"
    models = f"{view.method} of {len(view.models)} model{'s' * (len(view.models) > 1)}"
    print_line(console, f"{models}: {size}" if view.origin == "sources" else f"{view.title}, {models}: {size}")
    given = {name: value for name, value in summary(view.parameters).items() if value is not None}
    if given:
        print_line(console, "how: " + ", ".join(f"{name} {parameter_text(value)}" for name, value in given.items()))
    print_sources(console, view.sources)
    _models(console, view, wide=wide)
    if whole.vectors is not None or whole.kept is not None:
        _all_groups(console, view, wide=wide)
    print_files(console, view.files)


def _all_groups(console: Console, view: ModelInspection, *, wide: bool) -> None:
    _groups(console, view, "where", view.groups(lambda spot: spot.kind if wide else spot.group), wide=wide)
    if wide:
        _groups(console, view, "layer", view.groups(lambda spot: f"{spot.stack} {_layer(spot)}"), wide=wide)
    _conflicts(console, view)


def _layer(spot: Spot) -> str:
    return "outside layers" if spot.layer is None else str(spot.layer)


def _models(console: Console, view: ModelInspection, *, wide: bool) -> None:
    """Print a row for each model: its norm, its kept share, its coefficients, and its cosines with the others."""
    sums, kept, coefficients = view.whole.vectors, view.whole.kept, view.coefficients
    several = sums is not None and len(view.models) > 1
    norms = ("norm", "of base") if view.based else ("norm",)
    columns = [
        *(norms if sums is not None else ()),
        *(["angle"] if view.angles else ()),
        *(["kept"] if kept is not None else ()),
        *(["energy"] if kept is not None and kept.squares is not None else ()),
        *(["agree"] if kept is not None and kept.agreeing is not None else ()),
        *(["coefficient"] if coefficients else ()),
        *(_likeness_columns(view, wide=wide) if several else ()),
    ]
    if not columns:
        return
    table = new_table("model", *columns, right=columns, whole=("model",))
    base = coefficients.get("base")
    if base is not None:
        cells: dict[str, Any] = {"coefficient": _spread(base)}
        add_row(table, "base", *(cells.get(column) for column in columns))
    for place, role in enumerate(view.models):
        cells = {"coefficient": _spread(coefficients[role]) if role in coefficients else "-"}
        if sums is not None:
            if view.angles:
                least, greatest = (math.degrees(angle) for angle in (min(view.angles), max(view.angles)))
                cells["angle"] = f"{least:.3g} to {greatest:.3g} deg"
            cells |= {"norm": number(sums.squares[place] ** 0.5, ".4g"), "of base": percent(sums.relative(place), 3)}
            likeness = [_likeness(view, sums, place, other) for other in range(len(view.models)) if other != place]
            word = _likeness_word(view)
            cells |= {f"{word} {at + 1}": _likeness_text(view, each) for at, each in enumerate(likeness[:place])}
            cells[f"mean {word}"] = _likeness_text(view, _mean(likeness))
        if kept is not None:
            cells |= {"kept": percent(kept.share(place)), "energy": percent(kept.energy(place))}
            cells["agree"] = percent(kept.agreement(place))
        add_row(table, role, *(cells.get(column) for column in columns))
    console.print(table)
    if several and not view.based:
        print_line(console, APART)
    if kept is not None:
        print_line(console, _legend(kept))


def _legend(kept: KeptSums) -> str:
    """The legend of the columns about kept elements."""
    texts = ["kept: share of the elements"]
    if kept.squares is not None:
        texts.append("energy: of the squared norm")
    if kept.agreeing is not None:
        texts.append("agree: kept elements with the elected sign")
    return "; ".join(texts)


def _likeness_word(view: ModelInspection) -> str:
    return "cos" if view.based else "apart"


def _likeness(view: ModelInspection, sums: VectorSums, one: int, two: int) -> float | None:
    """The cosine of two task vectors, or without a base the relative distance between the models."""
    return sums.cosine(one, two) if view.based else sums.apart(one, two)


def _likeness_text(view: ModelInspection, value: float | None) -> str:
    return number(value, "+.3f") if view.based else percent(value, 3)


def _likeness_columns(view: ModelInspection, *, wide: bool) -> list[str]:
    """The columns of cosines or distances: one for each preceding model, or only the mean if there are too many."""
    word = _likeness_word(view)
    many = len(view.models) > MOST_COSINES and not wide
    return [f"mean {word}"] if many else [f"{word} {place}" for place in range(1, len(view.models))]


def _spread(least_mean_greatest: tuple[float, float, float]) -> str:
    least, mean, greatest = least_mean_greatest
    return f"{mean:.3g}" if greatest - least < 5e-4 * abs(mean) else f"{least:.3g} to {greatest:.3g}"


def _groups(console: Console, view: ModelInspection, name: str, groups: dict[str, Group], *, wide: bool) -> None:
    """Print means over the models, by kind of tensor or by layer."""
    whole = view.whole
    several = len(view.models) > 1
    columns, likeness_column = ["tensors"] if wide else [], "cosine" if view.based else "apart"
    if whole.vectors is not None:
        columns += [*(["of base"] if view.based else []), *([likeness_column] if several else [])]
        columns += ["conflicts"] if several and view.based else []
    if whole.kept is not None:
        columns += ["kept", *(["energy"] if wide and whole.kept.squares is not None else [])]
        columns += ["agree"] if whole.kept.agreeing is not None else []
    table = new_table(name, *columns, right=columns, whole=(name,))
    for title, group in groups.items():
        cells = {"tensors": str(group.tensors)}
        sums, kept, models = group.vectors, group.kept, range(len(view.models))
        if sums is not None:
            likeness = _mean([_likeness(view, sums, one, two) for one in models for two in models if one < two])
            cells |= {"of base": percent(_mean([sums.relative(n) for n in models]), 3)}
            cells |= {likeness_column: _likeness_text(view, likeness), "conflicts": percent(sums.conflict)}
        if kept is not None:
            cells |= {
                "kept": percent(_mean([kept.share(n) for n in models])),
                "energy": percent(_mean([kept.energy(n) for n in models])),
                "agree": percent(_mean([kept.agreement(n) for n in models])),
            }
        add_row(table, title, *(cells.get(column, "-") for column in columns))
    console.print(table)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _conflicts(console: Console, view: ModelInspection) -> None:
    """Print the places where signs conflict most."""
    if not view.based or len(view.models) < 2 or view.whole.vectors is None:
        return
    cells = view.groups(lambda spot: f"{spot.stack} {_layer(spot)}, {spot.kind}")
    shares = {name: group.vectors.conflict for name, group in cells.items() if group.vectors is not None}
    known = sorted(((share, name) for name, share in shares.items() if share is not None), key=lambda each: -each[0])
    if known:
        most = "; ".join(f"{name} {percent(share)}" for share, name in known[:MOST_CONFLICTS])
        print_line(
            console, f"signs conflict in {percent(view.whole.vectors.conflict)} of shared elements, most in {most}"
        )
