"""A run in words, for its report and its model card: models, corpus, budget, how far it came, a warning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastkd import quantities

if TYPE_CHECKING:
    from fastkd.run_folder import Run


def budget_text(run: Run) -> str:
    """The run's budget with its unit, or that there is no plan."""
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


def model_text(model: Mapping[str, Any] | None) -> str:
    """A plan's student or teacher: its source, shape and size."""
    if not model:
        return "none"
    layers, run = model["layers"], model.get("layers_run", model["layers"])
    shape = f"{layers} layers, {model['width']} wide, {model['heads']} heads"
    pieces = [model.get("source"), shape, f"{quantities.count(model['parameters'])} parameters"]
    return ", ".join(filter(None, pieces)) + (f", {run} layers run" if run != layers else "") + start_text(model)


def start_text(student: Mapping[str, Any]) -> str:
    """What a planned student starts from, with what it has of it if that is not all; empty if it starts at random."""
    if not student.get("start"):
        return ""
    return f", started from {student['start']}" + (f": {what}" if (what := student.get("start_remark")) else "")


def optimizer_text(plan: Mapping[str, Any]) -> str:
    """A plan's schedule and optimiser where they are not the usual ones: ``, schedule wsd, optimizer muon``, or nothing."""
    usual = {"schedule": "linear", "optimizer": "adamw"}  # which older plans do not name
    return "".join(f", {name} {plan[name]}" for name in usual if plan.get(name, usual[name]) != usual[name])


def corpus_text(corpus: Mapping[str, Any] | None) -> str:
    """A plan's corpus: its sources and size; empty if the plan has none."""
    if not corpus:
        return ""
    sizes = f"{corpus['documents']:,} documents, {quantities.count(corpus['unique_tokens'])} unique tokens"
    return f"{', '.join(corpus['sources'])}: {sizes}"


def loss_text(loss: float | None) -> str:
    """A loss as a file of a run holds it, where null stands for a number that is not finite."""
    return "not finite" if loss is None else quantities.number(loss)


def warning_of(run: Run) -> str:
    """A warning if a stage of a recipe took no step, or if the last held-out loss is not finite or above the first one; else
    empty."""
    found, stages = run.last_validations, run.plan.get("stages", ())
    ran = {stage.number for stage in run.stage_sums}
    missing = [stage["method"] for number, stage in enumerate(stages) if number not in ran]
    if missing and any(event["event"] == "end" for event in run.events):
        return f"the budget was spent before {' and '.join(missing)} took a step: raise the budget, or its share"
    if len(found) < 2:
        return ""
    start, end = found[0]["loss"], found[-1]["loss"]
    if end is not None and (start is None or end <= start):
        return ""
    rate = f" than {run.plan['lr']:g}" if "lr" in run.plan else ""
    return (
        f"the held-out loss was {loss_text(start)} at the start and is {loss_text(end)} now: give a smaller --lr{rate}"
    )
