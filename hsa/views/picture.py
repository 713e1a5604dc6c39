"""An inspection as PNG files, one for each attention block: heat maps of layers by heads, with the merged heads framed.

A page shows the projections of one block side by side, with scores above and cosines below. Its height depends only on
the number of layers, so every page of any Whisper model fits a screen or a sheet of paper.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hsa.errors import RequestError, one_line
from hsa.inspection.inspect import Inspection, TensorInspection
from hsa.methods.all_settings import summary
from hsa.methods.selection import count_heads

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 150
MAX_PIXELS = 12_000
"""The longest edge of a page in pixels. For a model with very many layers or heads, the resolution is lowered."""

CELL = 0.2
"""The size of a head, and of a layer, in a panel, in inches."""

BESIDE, ABOVE = 0.9, 1.1
"""The space for a panel's labels beside and above its cells, in inches."""


def render(inspection: Inspection) -> dict[str, bytes]:
    """The bytes of each page by its name. The name of the first block's page is empty, since most merges have only one
    block.

    The bytes are deterministic for one version of matplotlib. Raises RequestError without matplotlib.
    """
    check_installed()
    pages = _pages(inspection)
    first = next(iter(pages))
    return {"" if name == first else name: _page(inspection, name, panels) for name, panels in pages.items()}


def _pages(inspection: Inspection) -> dict[str, dict[str, list[TensorInspection]]]:
    """The tensors by page and panel, in order of layers: a page for each block, and a panel for the weights or the
    biases of each projection."""
    pages: dict[str, dict[str, list[TensorInspection]]] = {}
    for part in ("weight", "bias"):
        for tensor in inspection.tensors.values():
            p = tensor.projection
            if p.part == part:
                page = pages.setdefault(f"{p.stack}-{p.block}", {})
                page.setdefault(f"{p.module} {p.part}", []).append(tensor)
    return pages


def _page(inspection: Inspection, name: str, panels: dict[str, list[TensorInspection]]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_geometry = all(tensor.geometry is not None for tensors in panels.values() for tensor in tensors)
    rows = ("score", "cosine of tv1 and tv2") if has_geometry else ("score",)
    heads = [max(tensor.heads for tensor in tensors) for tensors in panels.values()]
    width = 1.5 + sum(BESIDE + max(1.2, CELL * count) for count in heads)
    height = 1.3 + len(rows) * (ABOVE + max(1.0, CELL * max(map(len, panels.values()))))
    dpi = min(DPI, int(MAX_PIXELS / max(width, height)))
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        _title(inspection, name, [t for tensors in panels.values() for t in tensors]), fontsize=12, parse_math=False
    )
    grid = figure.subplots(len(rows), len(panels), squeeze=False, width_ratios=[max(6, count) for count in heads])
    for axes, quantity in zip(grid, rows, strict=True):
        for part in ("weight", "bias"):  # separate scales: scores of biases are an order of magnitude smaller
            chosen = [place for place, title in enumerate(panels) if title.endswith(part)]
            if not chosen:
                continue
            members = [list(panels.values())[place] for place in chosen]
            scale = _scale(quantity, members)
            images = [
                _panel(axes[place], list(panels)[place], tensors, quantity, scale)
                for place, tensors in zip(chosen, members, strict=True)
            ]
            label = f"{quantity}, {'weights' if part == 'weight' else 'biases'}"
            figure.colorbar(images[0], ax=[axes[place] for place in chosen], label=label, fraction=0.03, pad=0.01)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a title in a script that the font lacks is drawn as boxes
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def check_installed() -> None:
    """Raise RequestError if matplotlib cannot be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RequestError(
            f'a picture needs matplotlib ({error}); install it with pip install "hsa-merge[plot]"'
        ) from error


def _title(inspection: Inspection, page: str, tensors: Sequence[TensorInspection]) -> str:
    numbers = {name: value for name, value in summary(inspection.parameters).items() if not isinstance(value, str)}
    settings = ", ".join(f"{name} {'per tensor' if isinstance(v, dict) else v}" for name, v in numbers.items())
    title = one_line(inspection.title)
    return f"{title[:80]}\n{page.replace('-', ', ')}: {count_heads(tensors)} heads are merged and framed ({settings})"


def _values(tensor: TensorInspection, quantity: str) -> list[float]:
    if quantity == "score" or tensor.geometry is None:
        return list(tensor.scores)
    return [float("nan") if value is None else value for value in tensor.geometry.cosines]


def _scale(quantity: str, panels: list[list[TensorInspection]]) -> tuple[float, float, str]:
    if quantity != "score":
        return -1.0, 1.0, "RdBu"
    scores = [score for tensors in panels for tensor in tensors for score in tensor.scores]
    return min(scores), max(scores), "viridis"


def _panel(
    axes: Axes, title: str, tensors: list[TensorInspection], quantity: str, scale: tuple[float, float, str]
) -> Any:
    import numpy as np
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    heads = max(tensor.heads for tensor in tensors)
    values = np.full((len(tensors), heads), np.nan)
    for row, tensor in enumerate(tensors):
        values[row, : tensor.heads] = _values(tensor, quantity)
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
    axes.set_xticks(_ticks(heads))
    rows = _ticks(len(tensors))
    axes.set_yticks(rows, [str(tensors[row].projection.layer) for row in rows])
    axes.tick_params(labelsize=7)
    return image


def _ticks(count: int) -> range:
    """The labelled ones of `count` rows or columns: all of a few, every second or fourth of many."""
    return range(0, count, 1 if count <= 12 else 2 if count <= 24 else 4)
