"""RESULTS.md, its plots and report.html of a comparison, from results.json: the same file gives the same bytes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from fastkd import files, quantities
from fastkd.comparison import claims, tables
from fastkd.comparison.results import Results, lower_is_better, read_results
from fastkd.reports import bars, forest, plots
from fastkd.reports.page import NOT_INCLUDED, fenced, render, teacher_note
from fastkd.reports.tables import settings_table

if TYPE_CHECKING:
    from markupsafe import Markup

    from fastkd.files import Record


def build_comparison(folder: Path) -> Path:
    """Writes `RESULTS.md`, its `plots/` and `report.html` from `results.json`; returns the path of report.html.

    Raises:
        ValueError: there is no results.json.
    """
    folder, results = Path(folder), read_results(folder)
    drawings = _plots(results)
    (folder / "plots").mkdir(exist_ok=True)
    for stale in (folder / "plots").glob("*.svg"):
        stale.unlink()
    for name, drawing in drawings.items():
        files.write(folder / "plots" / f"{name}.svg", str(drawing))
    contents = _contents(results) | {"plots": drawings}
    command = fenced(contents["command"])
    files.write(folder / "RESULTS.md", render("comparison.md", **contents | {"command": command}))
    return files.write(folder / "report.html", render("comparison.html", **contents))


def _contents(results: Results) -> Record:
    count = len(results.labels)
    recipes = f"{count} recipes" if count > 1 else "1 recipe"
    matches = " and on ".join(dict.fromkeys(arm.match for arm in results.arms)) or results.match
    return {
        "title": f"From scratch or distilled: {recipes}, matched on {matches}",
        "agreement": list(tables.agreement(results)),
        "main": tables.main_table(results),
        "scores": tables.score_table(results),
        "lead": claims.sentence(results),
        "against": _against(results),
        "seconds": tables.seconds_table(results),
        "seeds": tables.seed_table(results),
        "differences": tables.differences_table(results),
        "failures": tables.failure_table(results),
        "environment": settings_table(results.environment, "environment"),
        "command": shlex.join(results.command),
        "not_included": NOT_INCLUDED,
        "teacher_note": teacher_note(results.ancestors),
    }


def _against(results: Results) -> list[Record]:
    """For each headline score that two rows have: its name, its table, and what its intervals rest on."""
    found = [(score, tables.claims_table(results, score)) for score in results.headline]
    return [
        {
            "score": score,
            "table": table,
            "basis": claims.basis(results, score),
            "plot": f"difference-{place}",
        }
        for place, (score, table) in enumerate(found)
        if table.rows
    ]


def _plots(results: Results) -> dict[str, Markup]:
    """The plots by name, which is that of the file."""
    drawn: dict[str, Markup] = {}
    for place, score in enumerate(results.headline):
        for field, unit in (("charged_s", "gpu-seconds"), ("flops", "flops")):
            drawn |= _score_plot(results, score, field, unit, f"score-{place}-{unit}")
        drawn |= _difference_plot(results, score, f"difference-{place}")
    drawn |= _bars(results, "seconds", "phase_s", "Where the GPU-seconds went", "gpu-seconds")
    drawn |= _bars(results, "arithmetic", "flops_by_part", "Where the FLOPs went", "flops")
    return drawn | _loss_plots(results)


def _bars(results: Results, name: str, field: str, title: str, unit: str) -> dict[str, Markup]:
    rows = [(results.name_of(arm), parts) for arm in results.arms if (parts := arm.mean_of(field))]
    totals = [sum(parts.values()) for _, parts in rows]
    if not totals or min(totals) <= 0:
        return {}
    scale, label = quantities.budget_scale(max(totals), unit)
    scales = [scale] * len(rows)
    if max(totals) > 2 * min(totals):  # budgets differ much: each bar is 100%
        scales, label = [total / 100 for total in totals], f"% of the row's {label}"
    scaled = [
        (text, {part: value / own for part, value in parts.items()})
        for (text, parts), own in zip(rows, scales, strict=True)
    ]
    return {name: bars.stacked_bars(name, scaled, title=title, x_label=f"{label}, mean over seeds")}


def _score_plot(results: Results, score: str, field: str, unit: str, name: str) -> dict[str, Markup]:
    """A score against what was spent: a field in a budget's unit."""
    series = [_points(results, label, score, field) for label in results.labels]
    reached = max((x for points in series for x, _, _ in points.means), default=0.0)
    if not reached:
        return {}
    levels = [
        (row["label"], row["scores"][score]) for row in results.references if row["scores"].get(score) is not None
    ]
    scale, unit_name = quantities.budget_scale(reached, unit)
    return {name: plots.scores(name, series, levels, title=score, x_label=f"{unit_name} spent", x_scale=scale)}


def _difference_plot(results: Results, score: str, name: str) -> dict[str, Markup]:
    """A score's differences from scratch training; none if no row has one."""
    found = claims.against(results, "scratch", score)
    rows = [
        forest.Estimate(results.name_of(claim.arm), claim.difference.mean, claim.difference.half_width, claim.holds)
        for claim in found
    ]
    better = "lower" if lower_is_better(score) else "higher"
    label = f"less that of scratch training; {better} is better"
    return {name: forest.forest(name, rows, title=score, x_label=label)} if rows else {}


def _points(results: Results, label: str, score: str, field: str) -> plots.Points:
    members = [arm for arm in results.arms if arm.label == label]
    means = [
        (x.mean, y.mean, y.deviation)
        for arm in members
        if (x := arm.spread(field)) is not None and (y := arm.score(score)) is not None
    ]
    seeds = [
        (row[field], row["scores"][score])
        for arm in members
        for row in arm.rows
        if row[field] is not None and row["scores"].get(score) is not None
    ]
    return plots.Points(label, means, seeds, joined="match" not in results.varied)


def _loss_plots(results: Results) -> dict[str, Markup]:
    """One small plot for each label: losses of different methods are different quantities."""
    drawn: dict[str, Markup] = {}
    reached = max((point[0] for arm in results.arms for row in arm.rows for point in row["curves"]), default=0.0)
    scale, unit = quantities.budget_scale(reached or 1.0, "gpu-seconds")
    for place, label in enumerate(results.labels):
        rows = [row for arm in results.arms if arm.label == label for row in arm.rows if row["curves"]]
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
