"""An inspection as a PNG: heat maps of layers by heads, one for each projection, with the merged heads framed."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

from hsa.errors import RequestError, one_line
from hsa.inspection import Inspection, TensorInspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 150
MAX_PIXELS = 30_000
"""The tallest picture: viewers have their limits, and a model of many layers has its resolution lowered."""

COLUMNS = 3
"""Panels side by side: q, k and v."""


def render(inspection: Inspection) -> bytes:
    """The file's bytes; the same for the same inspection and matplotlib. Raises RequestError without matplotlib."""
    check_installed()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(_rows(inspection))
    heights = [1.1 + 0.28 * max(len(each) for each in panels.values()) for _, panels in rows]
    height = 1.2 + sum(heights)
    figure = Figure(figsize=(13.0, height), dpi=min(DPI, int(MAX_PIXELS / height)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(inspection), fontsize=12, parse_math=False)
    grid = figure.subplots(len(rows), COLUMNS, squeeze=False, height_ratios=heights)
    for axes, (drawn, panels) in zip(grid, rows, strict=True):
        for place in axes[len(panels) :]:
            place.set_axis_off()
        shown = axes[: len(panels)]
        low, high, colours = _scale(drawn, panels)
        image: Any = None
        for place, (title, tensors) in zip(shown, panels.items(), strict=True):
            image = _panel(place, f"{title}", tensors, drawn, (low, high, colours))
        figure.colorbar(image, ax=list(axes), label=drawn, fraction=0.02, pad=0.01)
    held = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a title in a script that the font lacks is drawn as boxes
        figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()


def check_installed() -> None:
    """RequestError where matplotlib cannot be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f'a picture needs matplotlib ({error}); install it with pip install "hsa-merge[plot]"'
        ) from error


def _title(inspection: Inspection) -> str:
    shown = {name: inspection.parameters.get(name) for name in ("k", "lambda", "alpha")}
    parameters = ", ".join(f"{name} {'per tensor' if isinstance(v, dict) else v}" for name, v in shown.items())
    title = one_line(inspection.title)
    return f"{title[:80]}\n{inspection.selected_heads} of {inspection.total_heads} heads framed: {parameters}"


def _rows(inspection: Inspection) -> Any:
    """What each row of panels shows, and its panels: tensors of one projection in order of layers."""
    blocks: dict[tuple[str, str, str], dict[str, list[TensorInspection]]] = {}
    for tensor in inspection.tensors.values():
        p = tensor.projection
        blocks.setdefault((p.stack, p.block, p.part), {}).setdefault(p.kind, []).append(tensor)
    for (stack, block, part), kinds in blocks.items():
        for names in (("q", "k", "v"), ("out",)):
            panels = {f"{stack} {block} {kind}_proj {part}": kinds[kind] for kind in names if kind in kinds}
            if panels:
                yield "score", panels
                if all(tensor.geometry is not None for tensors in panels.values() for tensor in tensors):
                    yield "cosine of tv1 and tv2", panels


def _values(tensor: TensorInspection, drawn: str) -> list[float]:
    if drawn == "score" or tensor.geometry is None:
        return list(tensor.scores)
    return [float("nan") if value is None else value for value in tensor.geometry.cosines]


def _scale(drawn: str, panels: dict[str, list[TensorInspection]]) -> tuple[float, float, str]:
    if drawn != "score":
        return -1.0, 1.0, "RdBu"
    scores = [score for tensors in panels.values() for tensor in tensors for score in tensor.scores]
    return min(scores), max(scores), "viridis"


def _panel(axes: Axes, title: str, tensors: list[TensorInspection], drawn: str, scale: tuple[float, float, str]) -> Any:
    import numpy as np
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    heads = max(tensor.heads for tensor in tensors)
    values = np.full((len(tensors), heads), np.nan)
    for row, tensor in enumerate(tensors):
        values[row, : tensor.heads] = _values(tensor, drawn)
    low, high, colours = scale
    image = axes.imshow(values, vmin=low, vmax=high, cmap=colours, aspect="auto", interpolation="nearest")
    frames = [
        Rectangle((head - 0.44, row - 0.44), 0.88, 0.88)
        for row, tensor in enumerate(tensors)
        for head in tensor.selected
    ]
    for colour, width in (("white", 2.6), ("black", 1.1)):
        axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor=colour, linewidth=width))
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_xticks(range(heads))
    axes.set_yticks(range(len(tensors)), [str(tensor.projection.layer) for tensor in tensors])
    axes.tick_params(labelsize=7)
    return image
