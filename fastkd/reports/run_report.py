"""report.html of a run: what ran, plan against fact, where the GPU-seconds went, how it learned.

Every number comes from the run folder's JSON and JSON-lines files and is in the page as
`<data data-name="…" value="…">`: a test or a script can compare it with its source. The same folder gives the same
bytes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastkd import files, quantities
from fastkd.budget import PARTS
from fastkd.files import Record
from fastkd.plan_lines import rates
from fastkd.reports.descriptions import (
    budget_text,
    corpus_text,
    loss_text,
    model_text,
    optimizer_text,
    status,
    warning_of,
)
from fastkd.reports.expenses import arithmetic_table, efficiency_table, seconds_bar, seconds_table, stage_table
from fastkd.reports.learning_curves import held_out_table, learning_plots, points_table
from fastkd.reports.page import NOT_INCLUDED, render, teacher_note
from fastkd.reports.probe_table import probe_table
from fastkd.reports.tables import Cell, Cells, Table, numeric, settings_table, share, signed_percent
from fastkd.run_folder import Run, made_from, read_run


def build_report(run_folder: Path) -> Path:
    """Writes `report.html` of a run, finished or not, unless it is there as it would be written; returns its path.

    Raises:
        ValueError: no such folder, or a damaged file in it.
    """
    run = read_run(run_folder)
    path, page = run.folder / "report.html", render("report.html", **_contents(run)).encode()
    return path if path.is_file() and path.read_bytes() == page else files.write(path, page)


def _contents(run: Run) -> Record:
    return {
        "title": f"{run.plan.get('method', run.folder.name)}, {budget_text(run)}",
        "folder": run.folder.resolve().name,
        "status": status(run),
        "key_figures": _key_figures(run),
        "what_ran": _what_ran(run),
        "teacher_note": teacher_note(made_from(run.plan)),
        "warning": warning_of(run),
        "plan_against_fact": _plan_against_fact(run),
        "seconds_bar": seconds_bar(run),
        "seconds": seconds_table(run),
        "stages": stage_table(run),
        "plots": learning_plots(run),
        "held_out": held_out_table(run),
        "points": points_table(run),
        "probes": probe_table(run.folder),
        "arithmetic": arithmetic_table(run),
        "efficiency": efficiency_table(run),
        "environment": settings_table({**run.environment, "command": None}, "environment"),
        "config": settings_table(run.config, "option"),
        "command": shlex.join(run.environment.get("command", [])),
        "not_included": NOT_INCLUDED,
    }


def _what_ran(run: Run) -> Table:
    plan = run.plan
    rows: list[Cells] = [
        ("Method", str(plan.get("method", run.config.get("method", "")))),
        ("Student", model_text(plan.get("student")) if plan else ""),
        ("Teacher", model_text(plan.get("teacher")) if plan else ""),
        ("Corpus", corpus_text(plan.get("corpus"))),
        ("Budget", budget_text(run) + (f", charge: {plan['charge']}" if "charge" in plan else "")),
        ("Device", f"{plan['devices']} × {plan['device']}" if plan else ""),
        ("Preset", f"{plan['preset']} ({plan['preset_reason']})" if plan else ""),
        ("Numerics", ", ".join(_numerics(plan)) if plan else ""),
        ("Step", _step_text(plan) if plan else ""),
        ("Seed", str(run.config.get("seed", ""))),
    ]
    return Table(("", ""), [row for row in rows if row[1]], kind="settings")


def _numerics(plan: Mapping[str, Any]) -> Iterator[str]:
    yield str(plan["dtype"])
    if plan.get("residual") == "bfloat16":
        yield "bfloat16 residual stream"
    yield f"{plan['attention']} attention"
    yield "compiled" if plan["compile"] else "not compiled"


def _step_text(plan: Mapping[str, Any]) -> str:
    micro_batches = f"micro-batches of {plan['micro_batch']:,}"
    return f"{plan['batch_tokens']:,} tokens in {micro_batches}, peak learning rate {rates(plan)}{optimizer_text(plan)}"


def _key_figures(run: Run) -> list[tuple[str, Cell, str]]:
    flops = sum(run.last["flops"].values()) if run.last else 0
    tokens = run.last["tokens"]["real"] if run.last else 0
    epochs = f"{quantities.number(run.last['epoch'], 3)} epochs" if run.last else ""
    held_out = run.last_validations
    loss = held_out[-1]["loss"] if held_out else None
    started = f"{loss_text(held_out[0]['loss'])} at step {held_out[0]['step']:,}" if held_out else "not measured yet"
    return [
        ("charged", numeric("charged_s", run.charged_s), "GPU-seconds"),
        ("tokens", numeric("tokens", tokens, quantities.count(tokens)), epochs),
        ("compute", numeric("flops", flops, quantities.scaled(flops, "FLOP")), "student, teacher, loss"),
        ("throughput", numeric("tokens_per_s", run.tokens_per_s), "tokens/s of the steps"),
        ("teacher's share", share("teacher_share", run.phase_s["teacher"], run.step_s), "of the steps' seconds"),
        ("held-out loss", numeric("heldout_loss", loss), started),
    ]


# ---- plan against fact ------------------------------------------------------------------------------------

# name in the plan: (label, how a run gives it, how it is written)
_Fact = tuple[str, Callable[[Run], float | None], Callable[[float], str]]
_FACTS: dict[str, _Fact] = {
    "steps": ("steps", lambda run: run.last["step"] if run.last else 0, quantities.number),
    "skipped": ("steps skipped", lambda run: run.last.get("skipped", 0) if run.last else 0, quantities.number),
    "tokens": ("tokens", lambda run: run.last["tokens"]["real"] if run.last else 0, quantities.count),
    "epochs": ("epochs", lambda run: run.last["epoch"] if run.last else 0.0, quantities.number),
    "tokens_per_s": ("tokens per second", lambda run: run.tokens_per_s, quantities.number),
    "step_seconds": ("seconds per step", lambda run: run.seconds_per_step, quantities.number),
    "joules": ("joules", lambda run: run.last["joules"] if run.last else None, quantities.number),
    "teacher_seconds_share": (
        "teacher's share of the seconds",
        lambda run: run.teacher_share,
        lambda part: f"{part:.1%}",
    ),
}


def _plan_against_fact(run: Run) -> Table:
    rows = []
    if run.unit == "gpu-seconds":
        budget = run.plan.get("budget", {}).get("amount")
        rows.append(_plan_row("charged_s", "GPU-seconds", budget, run.charged_s, quantities.number))
    for name, (label, measure, write) in _FACTS.items():
        rows.append(_plan_row(name, label, run.plan.get(name), measure(run), write))
    for part in PARTS:
        planned = run.plan.get("flops_per_token", {}).get(part)
        label = f"FLOPs a token, {part}"
        rows.append(_plan_row(f"flops_per_token.{part}", label, planned, run.flops_per_token(part), _flop))
    return Table(("", "planned", "happened", "difference"), rows)


def _flop(value: float) -> str:
    return quantities.scaled(value, "FLOP")


def _plan_row(name: str, label: str, planned: float | None, fact: float | None, write: Callable[[float], str]) -> Cells:
    difference = (fact - planned) / planned if fact is not None and planned else None
    return (
        label,
        numeric(f"planned.{name}", planned, None if planned is None else write(planned)),
        numeric(f"happened.{name}", fact, None if fact is None else write(fact)),
        numeric(f"difference.{name}", difference, signed_percent(difference)),
    )
