"""The pictures of the report: the same rows give the same bytes of PNG.

Needs matplotlib, which is imported when something is drawn, so that checking the report does without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rows import Row

from hsa.testing.whisper_config import SHAPES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito's, and a grey: they differ for colour-blind readers too."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "p", ">")
"""More than colours, so that no two series of a picture look alike."""

FILLS = {"float32": "full", "float16": "none", "bfloat16": "left", "mixed types": "bottom"}
"""How much of a marker is filled, by element type of the models."""

APART = 0.035
"""How far series at one place are set apart along a logarithmic axis, as a share of the value."""

SCORE_OPS, BLEND_OPS = 5, 6
"""Float operations of the formula for one element; sign changes and comparisons are not counted.

Score, for every element: two task vectors, their sum, its square, the sum over the head. Blend, for an element of a
selected head: two task vectors, two products, their sum, base added.
"""

Styles = dict[str, tuple[str, str, float]]
"""Colour, marker and sideways shift of every series."""


@dataclass(frozen=True)
class Point:
    """A measured value with the least and the greatest; `dtype` is one of FILLS."""

    series: str
    dtype: str
    x: float
    y: float
    low: float
    high: float


def draw_merge(path: Path, rows: Sequence[Row]) -> None:
    """Wall seconds and peak MiB against the size of the model in GB, on logarithmic axes."""
    rows = [row for row in rows if _value(row, "model_bytes") and _value(row, "median_s")]
    if not rows:
        return
    seconds = [_point(row, _value(row, "model_bytes") / 1e9, ("median_s", "min_s", "max_s"), 1) for row in rows]
    memory = [_point(row, _value(row, "model_bytes") / 1e9, ("peak_bytes",) * 3, 1 / 2**20) for row in rows]
    styles = _styles(seconds)
    sizes = [point.x for point in seconds]
    with _canvas(path, 2, height=7.6) as (figure, (left, right)):
        for axes, points, label in (
            (left, seconds, "wall seconds: median, bar from min to max"),
            (right, [point for point in memory if point.y >= 1], "peak memory, MiB (below 1 MiB not drawn)"),
        ):
            _scatter(axes, points, styles, lines=True)
            axes.set_xlim(min(sizes) / 2, max(sizes) * 2)
            axes.set_xlabel("size of one model, GB (markers set apart a little)")
            axes.set_ylabel(label)
            _plain_ticks(axes.xaxis)
            _plain_ticks(axes.yaxis)
        _legend(figure, styles, seconds, columns=4)


def draw_kernels(path: Path, rows: Sequence[Row]) -> None:
    """Rooflines: what was reached against what the measured copy bandwidth allows.

    A panel for each device, with its largest shape: of the others the intensities are the same.
    """
    devices: dict[str, list[Row]] = {}
    for row in rows:
        if row["shape"] in SHAPES and _value(row, "median_ms") and _value(row, "bytes"):
            devices.setdefault(row.get("gpu") or row.get("cpu") or row["device"], []).append(row)
    for device, held in devices.items():
        largest = max((row["shape"] for row in held), key=_elements)
        devices[device] = [row for row in held if row["shape"] == largest]
    if not devices:
        return
    points = {device: [_reached(row) for row in held] for device, held in devices.items()}
    every = [point for held in points.values() for point in held]
    styles = _styles(every)
    with _canvas(path, len(devices), height=8.8) as (figure, panels):
        for axes, (device, held) in zip(panels, devices.items(), strict=True):
            _scatter(axes, points[device], styles, lines=False)
            low, high = min(point.x for point in points[device]) / 1.6, max(point.x for point in points[device]) * 1.6
            for bandwidth in sorted({_value(row, "copy_gb_s") for row in held} - {0.0}):
                axes.plot([low, high], [low * bandwidth, high * bandwidth], color="#444444", linewidth=2)
                _along(axes, f"measured copy, {bandwidth:g} GB/s", low, bandwidth)
            axes.set_xlim(low, high)
            axes.set_title(f"{device}, {held[0]['shape']}")
            axes.set_xlabel("operations of the formula per byte moved")
            _plain_ticks(axes.xaxis)
            _plain_ticks(axes.yaxis)
        panels[0].set_ylabel("1e9 operations a second: median, bar from min to max")
        _legend(figure, styles, every, columns=3)


def draw_wer(path: Path, models: Mapping[str, Sequence[Row]]) -> None:
    """Word error rates in percent with their intervals, a panel for each model, in the order given from the top."""
    most = max(map(len, models.values()))
    with _canvas(path, len(models), height=max(3.6, 1.8 + 0.6 * most)) as (_, panels):
        for axes, (model, rows) in zip(panels, models.items(), strict=True):
            for height, row in enumerate(rows):
                rate = _value(row, "wer")
                low, high = (_value(row, end if row.get(end) else "wer") for end in ("wer_low", "wer_high"))
                axes.hlines(height, low, high, color=COLOURS[0], linewidth=3)
                axes.plot([rate], [height], "o", color=COLOURS[0], markersize=10)
                axes.annotate(f"{rate:.2f}", (rate, height), (0, 10), textcoords="offset points", ha="center")
            axes.set_yticks(range(len(rows)), [_variant(row) for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.8)
            axes.margins(x=0.1)
            axes.set_title(model)
            axes.set_xlabel("word error rate, % (bar: 95 % interval)")


def operations(row: Row) -> float:
    """Float operations of a case of kernels.csv: of the formula, whatever an implementation repeats.

    Blend alone where the case's name says "apply only", else score and blend.
    """
    score = 0 if "apply only" in row["case"] else SCORE_OPS
    each = score + BLEND_OPS * _value(row, "share_selected")
    return each * _elements(row["shape"])


def _elements(shape: str) -> int:
    """Of the encoder's q, k and v weights."""
    return 3 * SHAPES[shape].encoder_layers * SHAPES[shape].d_model ** 2


def _reached(row: Row) -> Point:
    """Operations per byte, and 1e9 operations a second, of one case of kernels.csv."""
    done = operations(row)
    times = [_value(row, f"{of}_ms") or _value(row, "median_ms") for of in ("median", "max", "min")]
    return Point(row["case"], _filling(row), done / _value(row, "bytes"), *(done / ms / 1e6 for ms in times))


def _value(row: Row, column: str) -> float:
    return float(row.get(column) or 0)


def _point(row: Row, x: float, columns: Sequence[str], unit: float) -> Point:
    values = [(_value(row, column) or _value(row, columns[0])) * unit for column in columns]
    return Point(row["program"], _filling(row), x, *values)


def _filling(row: Row) -> str:
    return row["dtype"] if row["dtype"] in FILLS else "mixed types"


def _variant(row: Row) -> str:
    """What a merge was made with, in two lines at most."""
    settings = [row.get("targets") or ""]
    settings += [
        f"{sign} {row[column]}"
        for sign, column in (("k", "k"), ("lambda", "lam"), ("alpha", "alpha"))
        if row.get(column)
    ]
    return "\n".join(filter(None, (row["variant"], ", ".join(filter(None, settings)))))


@contextmanager
def _canvas(path: Path, columns: int, height: float) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure 1600 pixels wide with panels side by side, written when the block ends, without date or version."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 16, "axes.titlesize": 17, "axes.grid": True, "grid.color": "#dddddd"})
        matplotlib.rcParams.update({"axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False})
        matplotlib.rcParams["text.parse_math"] = False
        figure = Figure(figsize=(16, height), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
        FigureCanvasAgg(figure)
        yield figure, list(figure.subplots(1, columns, squeeze=False)[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": None})


def _styles(points: Iterable[Point]) -> Styles:
    """The styles of the series, in the order of their appearance."""
    names = list(dict.fromkeys(point.series for point in points))
    middle = (len(names) - 1) / 2
    return {
        name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], math.exp(APART * (i - middle)))
        for i, name in enumerate(names)
    }


def _scatter(axes: Axes, points: Sequence[Point], styles: Styles, *, lines: bool) -> None:
    """Markers with bars from low to high; `lines` joins the sizes of one series and sets the series apart."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name, (colour, marker, shift) in styles.items():
        for dtype in FILLS:
            held = sorted((p for p in points if (p.series, p.dtype) == (name, dtype)), key=lambda p: p.x)
            x, y = [p.x * (shift if lines else 1) for p in held], [p.y for p in held]
            axes.vlines(x, [p.low for p in held], [p.high for p in held], color=colour, linewidth=2)
            if lines:
                axes.plot(x, y, "-" if dtype == "float32" else "--", color=colour, alpha=0.5, linewidth=1.5)
            axes.plot(x, y, **_marker(colour, marker, dtype))


def _marker(colour: str, marker: str, dtype: str) -> dict[str, Any]:
    fill = FILLS[dtype]
    return {
        "linestyle": "",
        "color": colour,
        "marker": marker,
        "markersize": 10,
        "markeredgewidth": 2,
        "fillstyle": "full" if fill == "none" else fill,
        "markerfacecolor": "white" if fill == "none" else colour,
        "markerfacecoloralt": "white",
    }


def _along(axes: Axes, text: str, x: float, slope: float) -> None:
    """Write along the line y = slope * x, just above it, from a little right of x on."""
    axes.text(
        x * 1.05,
        x * 1.05 * slope * 1.1,
        text,
        rotation=math.degrees(math.atan(slope)),
        rotation_mode="anchor",
        transform_rotates_text=True,
        clip_on=True,
    )


def _plain_ticks(axis: Axis) -> None:
    """Numbers such as 0.5 and 200 on a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    steps = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 3 else (1.0, 3.0)
    axis.set_major_locator(LogLocator(subs=steps if decades < 5 else (1.0,), numticks=30))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}" if value < 1000 else f"{value:.0f}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, styles: Styles, points: Sequence[Point], *, columns: int) -> None:
    """Series by colour and marker, and element types by filling, below the panels."""
    from matplotlib.lines import Line2D

    drawn = {point.dtype for point in points}
    looks = [(name, _marker(colour, marker, "float32")) for name, (colour, marker, _) in styles.items()]
    looks += [(f"{dtype} (any marker)", _marker("#444444", "o", dtype)) for dtype in FILLS if dtype in drawn]
    handles = [Line2D([], [], label=label, **look) for label, look in looks]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=15)
