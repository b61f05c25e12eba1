"""Differences with their intervals, one under the other (a forest plot), as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fastkd.reports.plots import BLUE, STYLE, fit, tick, to_svg

GREY = "#777777"
WIDEST = 2.0  # the axis reaches to this many times the largest difference: of a wider interval, an arrow shows that it goes on


@dataclass(frozen=True)
class Estimate:
    """A difference. `half_width`: of its interval, None if nothing is known of chance; `holds`: it is told apart from 0."""

    label: str
    mean: float
    half_width: float | None
    holds: bool


def forest(name: str, estimates: Sequence[Estimate], *, title: str, x_label: str) -> Markup:
    """Differences from 0, which is a line: filled and blue where they hold, open and grey where not.

    Args:
        name: unique in the page.
    """
    labels = [each.label for each in estimates]
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(7.2, 0.85 + 0.27 * len(estimates)))
        axes = figure.add_subplot()
        low, high = _limits(estimates)
        axes.axvline(0, color="#222222", linewidth=0.9)
        for place, each in enumerate(estimates):
            _draw(axes, place, each, low, high)
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(low, high)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.spines["left"].set_visible(False)
        axes.set_title(title, y=1.0)
        fit(figure, axes, labels=labels)
        return to_svg(figure, name, f"{title}; horizontal: {x_label}")


def _limits(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Both ends of the axis: as far as the intervals go, but not much farther than the differences."""
    most = (
        WIDEST * max(abs(each.mean) for each in estimates) or max(each.half_width or 0.0 for each in estimates) or 1.0
    )
    ends = [each.mean + sign * (each.half_width or 0.0) for each in estimates for sign in (-1, 1)]
    low, high = max(min(0.0, *ends), -most), min(max(0.0, *ends), most)
    margin = 0.04 * ((high - low) or most)
    return low - margin, high + margin


def _draw(axes: Any, place: int, each: Estimate, low: float, high: float) -> None:
    colour = BLUE if each.holds else GREY
    if each.half_width is not None:
        left, right = each.mean - each.half_width, each.mean + each.half_width
        axes.plot(
            [max(left, low), min(right, high)], [place, place], color=colour, linewidth=1.4, solid_capstyle="butt"
        )
        for end, edge, arrow in ((left, low, "<"), (right, high, ">")):
            cut = end < low or end > high
            axes.plot(
                [edge if cut else end], [place], color=colour, marker=arrow if cut else "|", markersize=6, clip_on=False
            )
    face = colour if each.holds else "white"
    axes.plot([each.mean], [place], color=colour, marker="o", markersize=6, markerfacecolor=face, zorder=3)
