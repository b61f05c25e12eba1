"""report.html of a run: what ran, plan against fact, where the GPU-seconds went; and a student's model card.

Every number comes from the run folder's JSON and JSON-lines files, and stands in the page as
`<data data-name="…" value="…">`, so that a test or a script can compare it with its source. The same folder gives
the same bytes.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastkd import files, quantities, quickstart
from fastkd.budget import PARTS
from fastkd.files import Record
from fastkd.reports.expenses import arithmetic_table, efficiency_table, seconds_bar, seconds_table
from fastkd.reports.learning_curves import held_out_table, learning_plots, points_table
from fastkd.reports.model_card import front_matter, method_note
from fastkd.reports.tables import Cell, Table, numeric, share, signed_percent
from fastkd.run_folder import Run, made_from, read_run

QUICKSTART_TEACHER_NOTE = (
    "The quickstart teacher, all-MiniLM-L6-v2, was fine-tuned on NLI and paraphrase pairs: what a student "
    "learns from it is not pretraining alone."
)
NOT_INCLUDED = "The teacher's own pretraining is not included in any number here; fine-tuning (GLUE) has its own line."


def build_report(run_folder: Path) -> Path:
    """Writes `report.html` of a run, finished or not; returns its path.

    Raises:
        ValueError: no such folder, or a damaged file in it.
    """
    run = read_run(run_folder)
    return files.write(run.folder / "report.html", render("report.html", **_contents(run)))


def model_card(run_folder: Path, *, mlm_head: bool) -> str:
    """README.md of a student: what it is, what it cost, what it is not good for.

    Args:
        run_folder: of the run that trained it; its ledger is complete.
        mlm_head: whether the masked-language-modelling head was trained.
    """
    run = read_run(run_folder)
    last = run.last or {"flops": dict.fromkeys(PARTS, 0), "tokens": {"real": 0}, "epoch": 0.0, "joules": None}
    return render(
        "model_card.md",
        metadata=front_matter(run, mlm_head=mlm_head),
        method=run.plan.get("method", run.config.get("method", "unknown")),
        student=describe_model(run.plan.get("student")),
        teacher=describe_model(run.plan.get("teacher")),
        teacher_note=teacher_note(made_from(run.plan)),
        corpus=_corpus_text(run.plan.get("corpus") or {}),
        seq_length=run.config.get("seq_length"),
        budget=budget_text(run),
        charge=run.plan.get("charge", "unknown"),
        charged=quantities.number(run.charged_s),
        tokens=quantities.count(last["tokens"]["real"]),
        epochs=quantities.number(last["epoch"], 3),
        flops={part: quantities.scaled(last["flops"][part], "FLOP") for part in PARTS},
        joules=None if last["joules"] is None else quantities.scaled(last["joules"], "J"),
        warning=loss_warning(run),
        held_out=next((line for line in reversed(run.validations) if line["loss"] is not None), None),
        status=status(run),
        mlm_head=mlm_head,
        method_note=method_note(run),
    )


def render(template: str, **contents: Any) -> str:
    """A file of `fastkd/reports/templates/` filled with `contents`; escapes HTML in templates that end in .html."""
    environment = Environment(
        loader=PackageLoader("fastkd.reports", "templates"),
        autoescape=lambda name: bool(name and name.endswith(".html")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**contents)


def _contents(run: Run) -> Record:
    return {
        "title": f"{run.plan.get('method', run.folder.name)}, {budget_text(run)}",
        "folder": run.folder.resolve().name,
        "status": status(run),
        "key_figures": _key_figures(run),
        "what_ran": _what_ran(run),
        "teacher_note": teacher_note(made_from(run.plan)),
        "warning": loss_warning(run),
        "plan_against_fact": _plan_against_fact(run),
        "seconds_bar": seconds_bar(run),
        "seconds": seconds_table(run),
        "plots": learning_plots(run),
        "held_out": held_out_table(run),
        "points": points_table(run),
        "arithmetic": arithmetic_table(run),
        "efficiency": efficiency_table(run),
        "environment": settings_table({**run.environment, "command": None}, "environment"),
        "config": settings_table(run.config, "option"),
        "command": shlex.join(run.environment.get("command", [])),
        "not_included": NOT_INCLUDED,
    }


def budget_text(run: Run) -> str:
    """The run's budget in words, or that it is not known."""
    budget = run.plan.get("budget")
    if not budget:
        return "no plan yet"
    scale, name = quantities.budget_scale(budget["amount"], budget["unit"])
    return f"{budget['amount'] / scale:,.5g} {name}"


def status(run: Run) -> str:
    """Finished, or how far it came."""
    if run.finished:
        return "finished"
    if run.last is None:
        return "not finished: no step yet"
    return f"not finished: {run.last['progress']:.1%} of the budget at step {run.last['step']:,}"


def teacher_note(models: Iterable[str]) -> str:
    """What readers must know where the quickstart teacher is among the models that a student was made from."""
    return QUICKSTART_TEACHER_NOTE if quickstart.NAME in models else ""


def loss_warning(run: Run) -> str:
    """What to say of a held-out loss that is not finite or above its start; empty where it is neither."""
    if len(run.validations) < 2:
        return ""
    start, end = run.validations[0]["loss"], run.validations[-1]["loss"]
    if end is not None and (start is None or end <= start):
        return ""
    rate = f" than {run.plan['lr']:g}" if "lr" in run.plan else ""
    return (
        f"the held-out loss was {_optional(start)} at the start and is {_optional(end)} now: give a smaller --lr{rate}"
    )


def describe_model(model: Mapping[str, Any] | None) -> str:
    """One line for a plan's student or teacher: its source and shape."""
    if not model:
        return "none"
    layers, run = model["layers"], model.get("layers_run", model["layers"])
    shape = f"{layers} layers, {model['width']} wide, {model['heads']} heads"
    pieces = [model.get("source"), shape, f"{quantities.count(model['parameters'])} parameters"]
    start = f", started from {model['start']}" if model.get("start") else ""
    return ", ".join(filter(None, pieces)) + (f", {run} layers run" if run != layers else "") + start


def _what_ran(run: Run) -> Table:
    plan = run.plan
    rows: list[tuple[Cell | str, ...]] = [
        ("Method", str(plan.get("method", run.config.get("method", "")))),
        ("Student", describe_model(plan.get("student")) if plan else ""),
        ("Teacher", describe_model(plan.get("teacher")) if plan else ""),
        ("Corpus", _corpus_text(plan.get("corpus") or {})),
        ("Budget", budget_text(run) + (f", charge: {plan['charge']}" if "charge" in plan else "")),
        ("Device", f"{plan['devices']} × {plan['device']}" if plan else ""),
        ("Preset", f"{plan['preset']} ({plan['preset_reason']})" if plan else ""),
        ("Numerics", ", ".join(_numerics(plan)) if plan else ""),
        ("Step", _step_text(plan) if plan else ""),
        ("Seed", str(run.config.get("seed", ""))),
    ]
    return Table(("", ""), [row for row in rows if row[1]], kind="settings")


def _corpus_text(corpus: Mapping[str, Any]) -> str:
    if not corpus:
        return ""
    sizes = f"{corpus['documents']:,} documents, {quantities.count(corpus['unique_tokens'])} unique tokens"
    return f"{', '.join(corpus['sources'])}: {sizes}"


def _numerics(plan: Mapping[str, Any]) -> Iterator[str]:
    yield str(plan["dtype"])
    if plan.get("residual") == "bfloat16":
        yield "bfloat16 residual stream"
    yield f"{plan['attention']} attention"
    yield "compiled" if plan["compile"] else "not compiled"


def _step_text(plan: Mapping[str, Any]) -> str:
    micro_batches = f"micro-batches of {plan['micro_batch']:,}"
    return f"{plan['batch_tokens']:,} tokens in {micro_batches}, peak learning rate {plan['lr']:g}"


def _key_figures(run: Run) -> list[tuple[str, Cell, str]]:
    flops = sum(run.last["flops"].values()) if run.last else 0
    tokens = run.last["tokens"]["real"] if run.last else 0
    epochs = f"{quantities.number(run.last['epoch'], 3)} epochs" if run.last else ""
    held_out = run.validations
    loss = held_out[-1]["loss"] if held_out else None
    started = f"{_optional(held_out[0]['loss'])} at step {held_out[0]['step']:,}" if held_out else "not measured yet"
    return [
        ("charged", numeric("charged_s", run.charged_s), "GPU-seconds"),
        ("tokens", numeric("tokens", tokens, quantities.count(tokens)), epochs),
        ("compute", numeric("flops", flops, quantities.scaled(flops, "FLOP")), "student, teacher, loss"),
        ("throughput", numeric("tokens_per_s", run.tokens_per_s), "tokens/s of the steps"),
        ("teacher's share", share("teacher_share", run.phase_s["teacher"], run.step_s), "of the steps' seconds"),
        ("held-out loss", numeric("heldout_loss", loss), started),
    ]


def _optional(value: float | None) -> str:
    return "not finite" if value is None else quantities.number(value)


# ---- plan against fact ------------------------------------------------------------------------------------

# name in the plan: (label, how a run gives it, how it is written)
_Fact = tuple[str, Callable[[Run], float | None], Callable[[float], str]]
_FACTS: dict[str, _Fact] = {
    "steps": ("steps", lambda run: run.last["step"] if run.last else 0, quantities.number),
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


def _plan_row(
    name: str, label: str, planned: float | None, fact: float | None, write: Callable[[float], str]
) -> tuple[Cell | str, ...]:
    difference = (fact - planned) / planned if fact is not None and planned else None
    return (
        label,
        numeric(f"planned.{name}", planned, None if planned is None else write(planned)),
        numeric(f"happened.{name}", fact, None if fact is None else write(fact)),
        numeric(f"difference.{name}", difference, signed_percent(difference)),
    )


def settings_table(settings: Mapping[str, Any], head: str) -> Table:
    """Nested settings as rows of name and value."""
    return Table((head, "value"), list(_flat(settings)), kind="settings")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[Cell | str, ...]]:
    for key in sorted(settings):
        value = settings[key]
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", [], ()):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{prefix}{key}", text
