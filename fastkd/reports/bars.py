"""Stacked bars of a report: what seconds or FLOPs were spent on, as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from fastkd.reports.plots import (
    BLACK,
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILLION,
    YELLOW,
    fit,
    tick,
    to_svg,
)

# Phases and events in a bar's order. Neighbours differ in lightness; events, which are no part of a step, are grey.
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
LEGEND_COLUMNS = 8
HATCHES = {"teacher": "//", "communication": "xx"}


def stacked_bars(
    name: str,
    rows: Sequence[tuple[str, Mapping[str, float]]],
    *,
    title: str,
    x_label: str,
    legend: bool = True,
) -> Markup:
    """One horizontal bar for each of `rows` (label, amount by phase), split in the order of `PHASE_COLOURS`: an inline SVG.

    A piece that is wide enough shows its share of the bar. `legend=False` if a table explains the colours.
    """
    names = sorted({phase for _, parts in rows for phase in parts if parts[phase]}, key=phase_order)
    longest = max((sum(parts.values()) for _, parts in rows), default=0.0) or 1.0
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(9.6, 0.75 + 0.32 * len(rows) + 0.3 * legend))
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
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.spines["left"].set_visible(False)
        if title:
            axes.set_title(title, y=1.0)
        if legend:
            _legend(figure, names)
        fit(figure, axes, labels=[label for label, _ in rows], legend_rows=-(-len(names) // LEGEND_COLUMNS) * legend)
        return to_svg(figure, name, title or x_label)


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
    handles = [
        Patch(facecolor=phase_colour(name), hatch=HATCHES.get(name), edgecolor="white", label=name) for name in names
    ]
    figure.legend(handles=handles, loc="lower left", ncols=LEGEND_COLUMNS, handlelength=1.4, columnspacing=1.2)


def phase_order(name: str) -> tuple[int, str]:
    """A sort key: phases and events in the order of stacked bars, unknown ones last."""
    order = list(PHASE_COLOURS)
    return (order.index(name) if name in order else len(order)), name


def phase_colour(name: str) -> str:
    """Colour of a phase or event in stacked bars and in the table beside them."""
    return PHASE_COLOURS.get(name, "#777777")
