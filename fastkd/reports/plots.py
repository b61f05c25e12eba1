"""Plots of a report as inline SVG: curves and scores. The same numbers give the same bytes.

The colours are Okabe and Ito's, which the colour-blind can tell apart; line styles, markers and labels do it in black
and white.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fastkd import quantities

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW, BLACK = "#E69F00", "#56B4E9", "#F0E442", "#000000"
# (colour, dashes, marker) of a plot's first line, second line, …
LINE_STYLES: tuple[tuple[str, Any, str], ...] = (
    (BLUE, "-", "o"),
    (VERMILLION, (0, (5, 1.5)), "s"),
    (GREEN, (0, (1, 1)), "^"),
    (PURPLE, (0, (5, 1.2, 1, 1.2)), "D"),
    (ORANGE, (0, (3, 1, 1, 1, 1, 1)), "v"),
    (BLACK, (0, (7, 2)), "P"),
    (SKY, "-", "X"),
    ("#777777", (0, (4, 1)), "*"),
    ("#8C510A", (0, (2, 1)), "<"),
    ("#332288", (0, (4, 1, 1, 1)), ">"),
    ("#882255", (0, (6, 1, 2, 1)), "p"),
    ("#117733", (0, (1, 2)), "h"),
)
INK, FAINT = "#222222", "#DDDDDD"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "text.parse_math": False,  # a $ in a name is a $
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
    """A curve. `band`: the lowest and highest values around it. A point whose y is None is a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    band: tuple[Sequence[float | None], Sequence[float | None]] | None = None
    marked: bool = False
    solid: bool = False  # without the style's dashes
    style: int | None = None  # index into LINE_STYLES; default: its place among the lines


def curves(
    name: str,
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    x_scale: float = 1.0,
    x_max: float | None = None,
    from_zero: bool = False,
    size: tuple[float, float] = (4.7, 2.65),
) -> Markup:
    """Lines over one x-axis, as an inline SVG.

    Args:
        name: unique in the page; it makes the SVG's ids unique, and the bytes the same each time.
        x_scale: x is divided by it, so that `x_label` can say GPU-hours.
        x_max: right end of the x-axis, before scaling.
        from_zero: the y-axis starts at 0.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size)
        axes = figure.add_subplot()
        for place, line in enumerate(lines):
            _draw(axes, line, LINE_STYLES[(place if line.style is None else line.style) % len(LINE_STYLES)], x_scale)
        axes.set_title(title, y=1.0)
        axes.set_xlabel(x_label)
        if x_max:
            axes.set_xlim(-0.02 * x_max / x_scale, 1.02 * x_max / x_scale)
        if from_zero:
            axes.set_ylim(0, 1.08 * max((y for line in lines for y in line.y if y is not None), default=1.0) or 1.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        if any(line.label or line.band for line in lines):
            axes.legend(loc="upper right")
        fit(figure, axes)
        return to_svg(figure, name, f"{title}; horizontal: {x_label}")


def _draw(axes: Any, line: Line, style: tuple[str, Any, str], x_scale: float) -> None:
    colour, dashes, marker = style
    x = [value / x_scale for value in line.x]
    if line.band is not None:
        low, high = (_gaps(side) for side in line.band)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, label="lowest to highest")
    points = marker if line.marked or len(x) == 1 else ""
    linestyle = "-" if line.solid else dashes
    axes.plot(x, _gaps(line.y), color=colour, linestyle=linestyle, marker=points, label=line.label)


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


@dataclass(frozen=True)
class Points:
    """Scores of one label: a mean (x, y, deviation of y or None) for each budget, and a point (x, y) for each seed.

    `joined`: a line joins the means.
    """

    label: str
    means: Sequence[tuple[float, float, float | None]]
    seeds: Sequence[tuple[float, float]]
    joined: bool


def scores(
    name: str,
    series: Sequence[Points],
    levels: Sequence[tuple[str, float]],
    *,
    title: str,
    x_label: str,
    x_scale: float,
) -> Markup:
    """Scores against the budget: means with one standard deviation, seeds as small points, references as `levels`.

    If all spent the same within 5%, the points are side by side around it, on an axis that starts at 0. If the largest
    is at least 5 times the smallest, the axis is logarithmic.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(4.7, 3.3))
        axes = figure.add_subplot()
        spent = [x / x_scale for points in series for x, _, _ in points.means]
        same = max(spent) <= 1.05 * min(spent)
        for place, points in enumerate(series):
            if not points.means:
                continue  # this label lacks the score; the others keep their colours
            aside = (place - (len(series) - 1) / 2) * 0.03 * max(spent) if same else 0.0
            _draw_points(axes, points, LINE_STYLES[place % len(LINE_STYLES)], x_scale, aside)
        for label, value in levels:
            axes.axhline(value, color="#999999", linewidth=0.9, linestyle=(0, (6, 3)), zorder=1)
            axes.annotate(label, (0.995, value), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                          fontsize=7.5, color="#555555")  # fmt: skip
        axes.set_title(title, y=1.0)
        axes.set_xlabel(x_label)
        axes.margins(x=0.12)
        if same:
            axes.set_xlim(0, 1.25 * max(spent))
        elif max(spent) >= 5 * min(spent):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        handles, _ = axes.get_legend_handles_labels()
        columns = _legend_columns([points.label for points in series], figure.get_size_inches()[0])
        figure.legend(handles=handles, loc="lower left", ncols=columns, handlelength=2.2, columnspacing=1.2)
        rows = -(-len(handles) // columns)
        figure.set_figheight(3.3 + 0.175 * max(0, rows - 3))
        fit(figure, axes, legend_rows=rows)
        return to_svg(figure, name, f"{title}; horizontal: {x_label}")


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """How many columns of a legend with these labels, at most three, are not wider than ``width`` inches."""
    font = FontProperties(size=STYLE["legend.fontsize"])
    widest = max(text_to_path.get_text_width_height_descent(label, font, False)[0] for label in labels) / 72
    return int(min(3, max(1, width // (widest + 0.5))))  # 0.5: a handle and the space between columns


def _draw_points(axes: Any, points: Points, style: tuple[str, Any, str], x_scale: float, aside: float) -> None:
    colour, dashes, marker = style
    x, y = [x / x_scale + aside for x, _ in points.seeds], [y for _, y in points.seeds]
    axes.scatter(x, y, s=9, marker=marker, color=colour, alpha=0.45, linewidths=0)
    means = sorted(points.means)
    x, y = [x / x_scale + aside for x, _, _ in means], [y for _, y, _ in means]
    deviations = [deviation or 0.0 for _, _, deviation in means]
    axes.errorbar(x, y, yerr=deviations, color=colour, linestyle=dashes if points.joined else "none", marker=marker,
                  markersize=6, capsize=2.5, elinewidth=1, label=points.label, zorder=3)  # fmt: skip


def fit(figure: Figure, axes: Any, *, labels: Sequence[str] | None = None, legend_rows: int = 0) -> None:
    """Give the axes what title, ticks, labels and a legend below leave of the figure.

    matplotlib's own layouts find that out by drawing everything a few times, which takes longer than the drawing.

    Args:
        labels: those of the y-axis; None: numbers as `tick` writes them.
    """
    width, height = figure.get_size_inches()
    title = 0.29 if axes.get_title(loc="left") else 0.08
    figure.subplots_adjust(
        top=1 - title / height, bottom=(0.49 + (0.07 + 0.175 * legend_rows) * bool(legend_rows)) / height
    )
    if labels is None:
        low, high = sorted(axes.get_ylim())
        labels = [tick(place) for place in axes.yaxis.get_majorticklocs() if low <= place <= high]
    font = FontProperties(size=matplotlib.rcParams["font.size"])
    widest = max((text_to_path.get_text_width_height_descent(label, font, False)[0] for label in labels), default=0.0)
    figure.subplots_adjust(left=(0.16 + widest / 72) / width, right=1 - 0.2 / width)


def tick(value: float) -> str:
    """A number on an axis."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def x_axis(total: float | None, unit: str, reached: float) -> tuple[float, str]:
    """Divisor and label of an axis of budget spent, for a budget of `total` (None: unknown), or what was `reached`."""
    scale, name = quantities.budget_scale(total or reached or 1.0, unit)
    return scale, f"{name} spent"


def to_svg(figure: Any, name: str, alt: str) -> Markup:
    """A figure as an inline SVG. `name`: unique in the page. `alt`: what the drawing shows, for those who cannot see it."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The metadata hold the date and matplotlib's version, which change the bytes.
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # Several drawings share a page: the name makes each id unique.
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    label = f'<svg class="plot" role="img" aria-label="{escape(alt)}" '
    return Markup(text.replace("<svg ", label, 1))
