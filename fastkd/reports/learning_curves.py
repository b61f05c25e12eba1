"""How a run learned: loss, learning rate and throughput against the budget, as plots and as their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from fastkd import quantities
from fastkd.reports import plots
from fastkd.reports.tables import Cells, Table, numeric
from fastkd.run_folder import stage_of

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
        plots.curves("loss", _loss_lines(run, bins), title="Training loss", **shared),
        *_held_out_plot(run, shared),
        plots.curves("lr", [rates], title="Learning rate", from_zero=True, **shared),
        plots.curves("throughput", [speeds], title="Throughput (tokens/s)", from_zero=True, **shared),
        *_parts_plot(run, shared),
    ]


def _loss_lines(run: Run, bins: list[Bin]) -> list[plots.Line]:
    """One for each stage: their losses are not the same quantity."""
    found = []
    for stage in run.stage_sums:
        own = [point for point in bins if point.stage == stage.number]
        first, last = own[0].steps
        name = [stage.method] if run.stage_sums[1:] else []
        name += [f"mean of {last - first + 1} steps"] if first < last else []
        band = ([point.low for point in own], [point.high for point in own]) if first < last else None
        found.append(
            plots.Line(", ".join(name), [point.spent for point in own], [point.loss for point in own], band=band)
        )
    return found


def _held_out_plot(run: Run, shared: Record) -> list[Markup]:
    spent = run.spent_at()
    known = [(stage_of(line), x, line["loss"]) for line in run.validations if (x := spent(line["step"])) is not None]
    if not known:
        return []
    names = {stage.number: stage.method for stage in run.stage_sums} if run.stage_sums[1:] else {}
    lines = [
        plots.Line(
            names.get(number, ""),
            [x for stage, x, _ in known if stage == number],
            [y for stage, _, y in known if stage == number],
            marked=True,
        )
        for number in dict.fromkeys(stage for stage, *_ in known)
    ]
    return [plots.curves("heldout", lines, title="Held-out loss", **shared)]


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
