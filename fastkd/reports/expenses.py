"""What a run's budget was spent on: GPU-seconds by phase and event, FLOPs by part, energy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

from fastkd import quantities
from fastkd.reports import bars
from fastkd.reports.tables import Cell, Cells, Table, numeric, share

if TYPE_CHECKING:
    from fastkd.run_folder import EventSum, Run, StageSum


def seconds_bar(run: Run) -> Markup:
    """The parts of `charged_s` as one bar, whose legend is `seconds_table`; empty if nothing was charged."""
    if not run.accounted_s:
        return Markup()
    pieces = [("", run.seconds_by_kind)]
    return bars.stacked_bars("seconds", pieces, title="", x_label="charged GPU-seconds", legend=False)


def seconds_table(run: Run) -> Table:
    """GPU-seconds of phases and charged events, their sum beside the ledger's charge, then events not charged."""
    charged = sorted(
        (event for event in run.event_sums if event.charged), key=lambda event: bars.phase_order(event.name)
    )
    free = [event for event in run.event_sums if not event.charged]
    rows = [_phase_row(run, name) for name in sorted(run.phase_s, key=bars.phase_order)]
    rows += [_event_row(run, event) for event in charged]
    rows += _totals(run)
    rows += [_free_row(run, event) for event in free]
    return Table(("", "GPU-seconds", "share", "ms each"), rows, sums=3 + len(free), kind="narrow")


def _phase_row(run: Run, name: str) -> Cells:
    each = run.phase_s[name] / len(run.steps) * 1e3 if run.steps else None
    return _row(run, name, name, f"phase.{name}", run.phase_s[name], each)


def _event_row(run: Run, event: EventSum) -> Cells:
    label = f"{event.name} × {event.times}"
    return _row(run, event.name, label, f"event.{event.name}", event.seconds, event.seconds / event.times * 1e3)


def _row(run: Run, kind: str, label: str, name: str, seconds: float, each_ms: float | None) -> Cells:
    return (
        Cell(label, colour=bars.phase_colour(kind)),
        _seconds(run, name, seconds),
        share(f"share.{name}", seconds, run.accounted_s),
        numeric(f"each.{name}", each_ms),
    )


def _seconds(run: Run, name: str, seconds: float) -> Cell:
    return numeric(name, seconds, quantities.aligned(seconds, run.accounted_s))


def _totals(run: Run) -> list[Cells]:
    whole = run.accounted_s
    totals = (
        ("sum of the above", "accounted_s", whole),
        ("charged by the ledger", "ledger.charged_s", run.charged_s),
        ("difference", "unaccounted_s", run.charged_s - whole),
    )
    return [
        (label, _seconds(run, name, value), share(f"share.{name}", value, whole), "") for label, name, value in totals
    ]


def _free_row(run: Run, event: EventSum) -> Cells:
    label = f"not charged: {event.name} × {event.times}"
    return label, _seconds(run, f"free.{event.name}", event.seconds), "", ""


def stage_table(run: Run) -> Table:
    """What each stage of a recipe took; empty for a run by one method."""
    head = ("stage", "steps", "tokens", "GPU-seconds", "share", "teacher's part", "FLOPs", "share")
    found = run.stage_sums
    return Table(head, [_stage_row(run, stage) for stage in found] if len(found) > 1 else [])


def _stage_row(run: Run, stage: StageSum) -> Cells:
    name, whole = f"stage.{stage.number}", sum(each.flops for each in run.stage_sums)
    return (
        f"{stage.number + 1}: {stage.method}",
        numeric(f"{name}.steps", stage.steps),
        numeric(f"{name}.tokens", stage.tokens, quantities.count(stage.tokens)),
        _seconds(run, f"{name}.seconds", stage.seconds),
        share(f"{name}.seconds_share", stage.seconds, run.step_s),
        share(f"{name}.teacher_share", stage.teacher_seconds, stage.seconds),
        numeric(f"{name}.flops", stage.flops, quantities.scaled(stage.flops, "FLOP")),
        share(f"{name}.flops_share", stage.flops, whole),
    )


def arithmetic_table(run: Run) -> Table:
    """FLOPs by part, per token and per GPU-second, the total in the last row; empty before the first step."""
    if run.last is None:
        return Table(("",), [])
    parts = dict(run.last["flops"])
    whole = sum(parts.values())
    rows = [_flops_row(run, part, value, whole) for part, value in {**parts, "all": whole}.items()]
    return Table(("", "FLOPs", "share", "a token", "a GPU-second of steps"), rows, sums=1)


def _flops_row(run: Run, part: str, value: int, whole: int) -> Cells:
    tokens = run.last["tokens"]["real"] if run.last else 0
    each = value / tokens if tokens else None
    rate = value / run.step_s if run.step_s else None
    return (
        part,
        numeric(f"flops.{part}", value, quantities.scaled(value, "FLOP")),
        share(f"flops_share.{part}", value, whole),
        numeric(f"flops_each.{part}", each, quantities.scaled(each or 0.0, "FLOP")),
        numeric(f"flops_rate.{part}", rate, quantities.scaled(rate or 0.0, "FLOP/s")),
    )


def efficiency_table(run: Run) -> Table:
    """Use of the device, energy, clocks and memory; what was not measured is blank."""
    joules = run.last["joules"] if run.last else None
    tokens = run.last["tokens"]["real"] if run.last else 0
    each = joules / tokens if joules is not None and tokens else None
    power = joules / run.step_s if joules is not None and run.step_s else None
    memory = max((line.get("peak_memory_bytes") or 0 for line in run.metrics), default=0) or None
    rows: list[Cells] = [
        _use_row(run, "matmul_share", "of a measured matrix product", run.plan.get("matmul_flops_per_s")),
        _use_row(run, "mfu", "MFU: of the data sheet's peak", run.peak_flops),
        ("energy of the steps", numeric("joules", joules, quantities.scaled(joules or 0.0, "J"))),
        ("energy a token", numeric("joules_per_token", each, quantities.scaled(each or 0.0, "J"))),
        ("mean power of a device", numeric("watts", power, quantities.scaled(power or 0.0, "W"))),
        ("SM clock, mean of readings", numeric("sm_clock_mhz", run.sm_clock_mhz, f"{run.sm_clock_mhz or 0:,.0f} MHz")),
        *_throttle_rows(run),
        ("peak memory", numeric("peak_memory_bytes", memory, quantities.memory(memory or 0))),
    ]
    return Table(("", ""), rows)


def _throttle_rows(run: Run) -> list[Cells]:
    shares = run.throttle_shares
    if shares is None:
        return [("readings throttled", numeric("throttled", None))]
    return [(f"readings throttled: {name}", share(f"throttled.{name}", value, 1.0)) for name, value in shares.items()]


def _use_row(run: Run, name: str, label: str, possible: float | None) -> Cells:
    use = run.flops_per_s / possible if run.flops_per_s is not None and possible else None
    return label, numeric(name, use, f"{use or 0:.1%}")
