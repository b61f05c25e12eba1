"""RESULTS.md and report.html of a comparison, from results.json alone: the same file gives the same bytes."""

import shlex
from pathlib import Path

from markupsafe import Markup

from fastkd import files, quantities
from fastkd.comparison.results import Group, Results, read_results
from fastkd.comparison.tables import (
    agreement,
    budget_text,
    confound_table,
    failure_table,
    main_table,
    score_table,
    scratch_table,
    seconds_table,
    seed_table,
)
from fastkd.files import Record
from fastkd.reports import bars, plots
from fastkd.reports.page import NOT_INCLUDED, render, teacher_note
from fastkd.reports.tables import settings_table


def build_comparison(folder: Path) -> Path:
    """Writes `RESULTS.md`, its `plots/` and `report.html` from `results.json`; returns the page's path.

    Raises:
        ValueError: there is no results.json.
    """
    folder, results = Path(folder), read_results(folder)
    contents = _contents(results)
    drawings: dict[str, Markup] = contents["plots"]
    (folder / "plots").mkdir(exist_ok=True)
    for stale in (folder / "plots").glob("*.svg"):
        stale.unlink()
    for name, drawing in drawings.items():
        files.write(folder / "plots" / f"{name}.svg", str(drawing))
    files.write(folder / "RESULTS.md", render("comparison.md", **contents))
    return files.write(folder / "report.html", render("comparison.html", **contents))


def _contents(results: Results) -> Record:
    groups = results.groups()
    count = len({group.label for group in groups})
    recipes = f"{count} recipes" if count > 1 else "1 recipe"
    matches = " and on ".join(dict.fromkeys(group.match for group in groups)) or results.match
    return {
        "title": f"From scratch or distilled: {recipes}, matched on {matches}",
        "agreement": list(agreement(groups)),
        "main": main_table(results, groups),
        "scores": score_table(results, groups),
        "against_scratch": scratch_table(results, groups),
        "seconds": seconds_table(groups),
        "seeds": seed_table(results),
        "confounds": confound_table(groups),
        "failures": failure_table(results),
        "plots": _plots(results, groups),
        "environment": settings_table(results.environment, "environment"),
        "command": shlex.join(results.command),
        "not_included": NOT_INCLUDED,
        "teacher_note": teacher_note(results.ancestors),
    }


def _plots(results: Results, groups: list[Group]) -> dict[str, Markup]:
    drawn: dict[str, Markup] = {}
    for place, name in enumerate(results.headline):
        for field, unit in (("charged_s", "gpu-seconds"), ("flops", "flops")):
            drawn |= _score_plot(results, groups, name, field, unit, f"score-{place}-{unit}")
    drawn |= _bars(groups, "seconds", "phase_s", "Where the GPU-seconds went", "gpu-seconds")
    drawn |= _bars(groups, "arithmetic", "flops_by_part", "Where the FLOPs went", "flops")
    return drawn | _loss_plots(groups)


def _bars(groups: list[Group], name: str, field: str, title: str, unit: str) -> dict[str, Markup]:
    rows = [(_bar_label(groups, group), parts) for group in groups if (parts := group.mean_of(field))]
    totals = [sum(parts.values()) for _, parts in rows]
    if not totals or min(totals) <= 0:
        return {}
    scale, label = quantities.budget_scale(max(totals), unit)
    scales = [scale] * len(rows)
    if max(totals) > 2 * min(totals):  # budgets lie apart: each bar is a whole
        scales, label = [total / 100 for total in totals], f"% of the row's {label}"
    scaled = [
        (text, {part: value / own for part, value in parts.items()})
        for (text, parts), own in zip(rows, scales, strict=True)
    ]
    return {name: bars.stacked_bars(name, scaled, title=title, x_label=f"{label}, mean over seeds")}


def _bar_label(groups: list[Group], group: Group) -> str:
    pieces = [group.label]
    if len({other.match for other in groups}) > 1:
        pieces.append(group.match)
    if len({other.budget for other in groups}) > 1:
        pieces.append(budget_text(group))
    return ", ".join(filter(None, pieces))


def _score_plot(
    results: Results, groups: list[Group], score: str, field: str, unit: str, name: str
) -> dict[str, Markup]:
    series = []
    for label in dict.fromkeys(group.label for group in groups):
        members = [group for group in groups if group.label == label]
        means = [
            (x.mean, y.mean, y.deviation)
            for group in members
            if (x := group.spread(field)) is not None and (y := group.score(score)) is not None
        ]
        seeds = [
            (row[field], row["scores"][score])
            for group in members
            for row in group.rows
            if row[field] is not None and row["scores"].get(score) is not None
        ]
        series.append(plots.Points(label, means, seeds, joined=len({group.match for group in groups}) == 1))
    reached = max((x for points in series for x, _, _ in points.means), default=0.0)
    if not reached:
        return {}
    levels = [
        (row["label"], row["scores"][score]) for row in results.references if row["scores"].get(score) is not None
    ]
    scale, unit_name = quantities.budget_scale(reached, unit)
    return {name: plots.scores(name, series, levels, title=score, x_label=f"{unit_name} spent", x_scale=scale)}


def _loss_plots(groups: list[Group]) -> dict[str, Markup]:
    # One small plot a label: losses of different methods are different quantities.
    drawn: dict[str, Markup] = {}
    labels = dict.fromkeys(group.label for group in groups)
    reached = max((point[0] for group in groups for row in group.rows for point in row["curves"]), default=0.0)
    scale, unit = quantities.budget_scale(reached or 1.0, "gpu-seconds")
    for place, label in enumerate(labels):
        rows = [row for group in groups if group.label == label for row in group.rows if row["curves"]]
        lines = [
            plots.Line(
                "",
                [point[0] for point in row["curves"]],
                [point[3] for point in row["curves"]],
                style=place,
                solid=True,
            )
            for row in rows
        ]
        if lines:
            drawn[f"loss-{place}"] = plots.curves(
                f"loss-{place}", lines, title=label, x_label=f"{unit} spent", x_scale=scale, x_max=reached,
                size=(3.1, 2.1),
            )  # fmt: skip
    return drawn
