"""How a run learned: loss, learning rate and throughput against the budget, as plots and as their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from fastkd import quantities
from fastkd.reports import plots
from fastkd.reports.tables import Cells, Table, numeric

if TYPE_CHECKING:
    from fastkd.files import Record
    from fastkd.run_folder import Bin, Run


def learning_plots(run: Run) -> list[Markup]:
    """Training loss, held-out loss, learning rate, throughput and the loss's parts; empty before the first step."""
    bins = run.bins()
    if not bins:
        return []
    total = run.plan.get("budget", {}).get("amount")
    scale, label = plots.x_axis(total, run.unit, bins[-1].spent)
    shared: dict[str, Any] = {"x_label": label, "x_scale": scale, "x_max": total or bins[-1].spent}
    x = [point.spent for point in bins]
    rates = plots.Line("", x, [point.lr for point in bins])
    speeds = plots.Line("", x, [point.tokens_per_s for point in bins])
    return [
        plots.curves("loss", [_loss_line(bins)], title="Training loss", **shared),
        *_held_out_plot(run, shared),
        plots.curves("lr", [rates], title="Learning rate", from_zero=True, **shared),
        plots.curves("throughput", [speeds], title="Throughput (tokens/s)", from_zero=True, **shared),
        *_parts_plot(run, shared),
    ]


def _loss_line(bins: list[Bin]) -> plots.Line:
    x, means = [point.spent for point in bins], [point.loss for point in bins]
    first, last = bins[0].steps
    if first == last:
        return plots.Line("", x, means)
    band = ([point.low for point in bins], [point.high for point in bins])
    return plots.Line(f"mean of {last - first + 1} steps", x, means, band=band)


def _held_out_plot(run: Run, shared: Record) -> list[Markup]:
    spent = run.spent_at()
    points = [(spent(line["step"]), line["loss"]) for line in run.validations]
    known = [(x, y) for x, y in points if x is not None]
    if not known:
        return []
    line = plots.Line("", [x for x, _ in known], [y for _, y in known], marked=True)
    return [plots.curves("heldout", [line], title="Held-out loss", **shared)]


def _parts_plot(run: Run, shared: Record) -> list[Markup]:
    spent = run.spent_at()
    steps = [line for line in run.metrics if "event" not in line and spent(line["step"]) is not None]
    names = list(dict.fromkeys(name for line in steps for name in line.get("parts", {})))
    if len(names) < 2:
        return []
    x = [spent(line["step"]) or 0.0 for line in steps]
    lines = [plots.Line(name, x, [line["parts"].get(name) for line in steps]) for name in names]
    return [plots.curves("parts", lines, title="Parts of the loss", **shared)]


def held_out_table(run: Run) -> Table:
    """Every validation; the accuracy is blank if no MLM head is trained."""
    head = ("step", "GPU-seconds", "tokens", "held-out loss", "accuracy")
    return Table(head, [_validation_row(line) for line in run.validations])


def _validation_row(line: Record) -> Cells:
    key, accuracy = f"validation.{line['step']}", line.get("accuracy")
    return (
        numeric(f"{key}.step", line["step"]),
        numeric(f"{key}.charged_s", line["charged_s"]),
        numeric(f"{key}.tokens", line["tokens"], quantities.count(line["tokens"])),
        numeric(f"{key}.loss", line["loss"]),
        numeric(f"{key}.accuracy", accuracy, f"{accuracy or 0:.2%}"),
    )


def points_table(run: Run) -> Table:
    """The numbers of `learning_plots`, a row for each point."""
    head = ("steps", f"{run.unit} spent", "mean loss", "lowest", "highest", "learning rate", "tokens/s")
    return Table(head, [_point_row(point) for point in run.bins()])


def _point_row(point: Bin) -> Cells:
    first, last = point.steps
    fields = ("spent", "loss", "low", "high", "lr", "tokens_per_s")
    label = f"{first:,}–{last:,}" if last > first else f"{last:,}"
    return label, *(numeric(f"point.{last}.{name}", getattr(point, name)) for name in fields)
