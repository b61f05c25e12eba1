"""Plots of a report as inline SVG: curves and stacked bars, the same bytes for the same numbers.

Colours are Okabe and Ito's, told apart by the colour-blind; line styles, markers and labels tell them apart
in black and white.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fastkd import quantities

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW, BLACK = "#E69F00", "#56B4E9", "#F0E442", "#000000"
# (colour, line style, marker), in the order in which a plot's lines take them
STYLES: tuple[tuple[str, Any, str], ...] = (
    (BLUE, "-", "o"),
    (VERMILLION, (0, (5, 1.5)), "s"),
    (GREEN, (0, (1, 1)), "^"),
    (PURPLE, (0, (5, 1.2, 1, 1.2)), "D"),
    (ORANGE, (0, (3, 1, 1, 1, 1, 1)), "v"),
    (BLACK, (0, (7, 2)), "P"),
    (SKY, "-", "X"),
)
# Where the seconds go. Neighbours differ in lightness; what is not a step is grey.
PHASE_COLOURS = {
    "teacher": ORANGE,
    "student": BLUE,
    "loss": YELLOW,
    "backward": SKY,
    "optimizer": GREEN,
    "communication": PURPLE,
    "data": VERMILLION,
    "other": "#BBBBBB",
    "validation": "#555555",
    "checkpoint": "#999999",
    "compile": "#333333",
    "crash": BLACK,
}
HATCHES = {"teacher": "//", "communication": "xx"}
INK, FAINT = "#222222", "#DDDDDD"
_RC: dict[Any, Any] = {
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "xtick.color": "#777777",
    "ytick.color": "#777777",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
}


@dataclass(frozen=True)
class Line:
    """A curve. `band`: lowest and highest values behind it. Points whose y is None are gaps."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    band: tuple[Sequence[float | None], Sequence[float | None]] | None = None
    marked: bool = False
    style: int | None = None  # index into STYLES; its place among the lines unless given


def curves(
    name: str,
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str = "",
    x_scale: float = 1.0,
    x_max: float | None = None,
    from_zero: bool = False,
    log_x: bool = False,
    size: tuple[float, float] = (4.7, 2.65),
) -> Markup:
    """Lines over one x-axis, as an inline SVG.

    Args:
        name: unique in the page; makes the SVG's ids so, and the bytes the same each time.
        x_scale: x is divided by it, so that `x_label` may say GPU-hours.
        x_max: right end of the x-axis, before scaling.
        from_zero: the y-axis starts at 0.
    """
    with matplotlib.rc_context(_RC | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for place, line in enumerate(lines):
            _draw(axes, line, STYLES[(place if line.style is None else line.style) % len(STYLES)], x_scale)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if log_x:
            axes.set_xscale("log")
        elif x_max:
            axes.set_xlim(-0.02 * x_max / x_scale, 1.02 * x_max / x_scale)
        if from_zero:
            axes.set_ylim(0, 1.08 * max((y for line in lines for y in line.y if y is not None), default=1.0) or 1.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        if len(lines) > 1 or any(line.band for line in lines):
            axes.legend()
        return _svg(figure, name, f"{title}; horizontal: {x_label}")


def _draw(axes: Any, line: Line, style: tuple[str, Any, str], x_scale: float) -> None:
    colour, dashes, marker = style
    x = [value / x_scale for value in line.x]
    if line.band is not None:
        low, high = (_gaps(side) for side in line.band)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, label="lowest to highest")
    points = marker if line.marked or len(x) == 1 else ""
    axes.plot(x, _gaps(line.y), color=colour, linestyle=dashes, marker=points, label=line.label)


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _tick(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def stacked_bars(
    name: str,
    rows: Sequence[tuple[str, Mapping[str, float]]],
    *,
    title: str,
    x_label: str,
    legend: bool = True,
    width: float = 9.6,
) -> Markup:
    """One horizontal bar a row, split by phase in the order of `PHASE_COLOURS`, as an inline SVG.

    Pieces wide enough carry their share of the bar. `legend=False` where a table explains the colours.
    """
    names = sorted({phase for _, parts in rows for phase in parts if parts[phase]}, key=phase_order)
    longest = max((sum(parts.values()) for _, parts in rows), default=0.0) or 1.0
    with matplotlib.rc_context(_RC | {"svg.hashsalt": name, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(width, 0.75 + 0.32 * len(rows) + 0.3 * legend), layout="constrained")
        axes = figure.add_subplot()
        lefts = [0.0] * len(rows)
        for phase in names:
            for place, (_, parts) in enumerate(rows):
                _piece(axes, place, lefts[place], parts.get(phase, 0.0), phase, sum(parts.values()), longest)
                lefts[place] += parts.get(phase, 0.0)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlim(0, longest)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.spines["left"].set_visible(False)
        if title:
            axes.set_title(title)
        if legend:
            _legend(figure, names)
        return _svg(figure, name, title or x_label)


def _piece(axes: Any, place: int, left: float, seconds: float, phase: str, total: float, longest: float) -> None:
    if seconds <= 0:
        return
    colour = phase_colour(phase)
    axes.barh(place, seconds, 0.72, left, color=colour, hatch=HATCHES.get(phase), edgecolor="white", linewidth=0.8)
    if seconds < 0.055 * longest:
        return
    label = f"{seconds / total:.0%}" if seconds < 0.13 * longest else f"{phase} {seconds / total:.0%}"
    text = axes.text(left + seconds / 2, place, label, ha="center", va="center", fontsize=8)
    dark = colour in (BLUE, GREEN, VERMILLION, BLACK, "#555555", "#333333")
    text.set_color("white" if dark else INK)
    if phase in HATCHES:
        text.set_bbox({"facecolor": colour, "edgecolor": "none", "pad": 1.2})


def _legend(figure: Any, names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=phase_colour(name), hatch=HATCHES.get(name), edgecolor="white", label=name) for name in names
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=8, handlelength=1.4, columnspacing=1.2)


def phase_order(name: str) -> tuple[int, str]:
    """Sorts phases and events as stacked bars hold them; unknown ones come last."""
    order = list(PHASE_COLOURS)
    return (order.index(name) if name in order else len(order)), name


def phase_colour(name: str) -> str:
    """Colour of a phase or event in stacked bars and in the table beside them."""
    return PHASE_COLOURS.get(name, "#777777")


def x_axis(total: float | None, unit: str, reached: float) -> tuple[float, str]:
    """Divisor and label of an axis of budget spent, at the scale of the budget (or of what was reached)."""
    scale, name = quantities.budget_scale(total or reached or 1.0, unit)
    return scale, f"{name} spent"


def _svg(figure: Any, name: str, alt: str) -> Markup:
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # Several drawings share a page: ids are made unique by the drawing's name.
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    label = f'<svg class="plot" role="img" aria-label="{escape(alt)}" '
    return Markup(text.replace("<svg ", label, 1))
