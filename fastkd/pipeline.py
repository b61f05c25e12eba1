"""One run from its options to its report: plan, train, export, probe, report, push.

The same options again resume an interrupted run, and say where a finished one is.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastkd import monitor, plan_lines, planning
from fastkd.budget import BudgetTooSmall
from fastkd.config import Resolved
from fastkd.data import hub
from fastkd.device import environment
from fastkd.device.clock import now, trace
from fastkd.distributed import World, on_main, phase
from fastkd.loop import Loop
from fastkd.models import hf
from fastkd.opening import alone_in, take_over, write_opening
from fastkd.push import destination, push_folder
from fastkd.reports.descriptions import warning_of
from fastkd.reports.model_card import model_card
from fastkd.reports.run_report import build_report
from fastkd.run_folder import INPUTS, Run, has_student, read_run, refuse_links
from fastkd.setup import Setup, model_folder, prepare
from fastkd.terminal import Console
from fastkd.train import Trainer

READ_AHEAD = 1.05  # text is tokenised ahead of time for this many times the planned steps


def run(resolved: Resolved, world: World, console: Console, score: Callable[[], None] | None = None) -> Path:
    """Do the run, or what is left of it; returns its folder. ``score`` is called when the student is there, before the report.

    Raises:
        ValueError: a configuration that cannot work, or a folder that holds another run or another process.
        BudgetTooSmall: the budget does not pay for one step.
        Interrupted: stopped by a signal, saved.
    """
    started, folder = now(), resolved.output_dir
    on_main(world, lambda: refuse_links(folder))
    with alone_in(folder, world):
        began = on_main(world, lambda: take_over(folder, resolved))
        repository = pushed_to(resolved, world)
        finished = on_main(world, lambda: has_student(folder))
        if not finished:
            train_and_export(resolved, began, world, console, started)
        if score is not None:
            with phase("the probes"):
                on_main(world, score)
        on_main(world, lambda: report(folder, console))
        push(folder, repository, world, console)
    if finished:
        console.print(f"{folder} is finished already: {folder}/final, {folder}/report.html")
    else:
        console.print(f"student {folder}/final · report {folder}/report.html · ledger {folder}/ledger.jsonl")
    return folder


def train_and_export(resolved: Resolved, began: Run | None, world: World, console: Console, started: float) -> None:
    """Set up, plan, train to the end of the budget, and write ``final/``. ``started``: when this process began the run."""
    folder = resolved.output_dir
    plan_lines.announce(resolved, console)
    with phase("set-up"):
        with hub.pinned(began.environment.get("corpus_sources", []) if began else []):
            setup = prepare(with_measured_dtype(resolved, began), world)
        check_inputs(began, setup)
        trainer = Trainer(setup)
        measured = planning.measure(trainer)
        the_plan = planning.make(resolved, trainer, measured)
        trainer.stream.want(round(READ_AHEAD * the_plan["steps"]))
        if world.is_main:
            plan_lines.render(the_plan, console)
        on_main(world, lambda: write_opening(folder, opening(resolved, setup, the_plan)))
    with contextlib.closing(setup.shards):
        train(trainer, folder, measured, setup_seconds=now() - started)
        on_main(world, lambda: export(setup, folder))


def opening(resolved: Resolved, setup: Setup, the_plan: dict[str, Any]) -> dict[str, str]:
    """What is known before the first step: the texts of three files, by name."""
    begun = {"command": resolved.command(), "corpus_sources": setup.shards.first.recipe["sources"]}
    facts = environment.describe() | begun | setup.inputs | {"teacher_revision": setup.teacher_revision}
    return {
        "environment.json": json.dumps(facts, indent=1) + "\n",
        "plan.json": json.dumps(the_plan, indent=1) + "\n",
        "config.toml": resolved.to_toml(),
    }


def report(folder: Path, console: Console) -> None:
    """Write report.html, if there is none or it is not what the folder's files make, and say how it went."""
    build_report(folder)
    if warning := warning_of(read_run(folder)):
        console.print(f"warning: {warning}")


def train(trainer: Trainer, folder: Path, measured: Sequence[planning.Measurement], setup_seconds: float) -> None:
    """From the checkpoint, if there is one, to the end of the budget."""
    config, world = trainer.setup.config, trainer.world
    budget = config.budget
    watch = monitor.Monitor if world.is_main else monitor.SilentMonitor
    log_to = tuple(config.log_to) if world.is_main else ()
    shown = watch(folder, budget.amount, budget.unit, log_to=log_to, resume=True, log_every=config.log_every)
    with shown:
        loop = Loop(trainer, folder, shown, [each.step_seconds for each in measured])
        with contextlib.closing(loop.ledger):
            loop.ledger.event("setup", setup_seconds)
            if compiling := sum(each.compile_seconds for each in measured):
                loop.ledger.event("compile", compiling)
            if loop.totals.step == 0:
                loop.record_validation(0.0, in_loop=False)
            with trace(folder / "trace.json", config.trace) as traced:
                loop.run(traced)
            if loop.totals.step == 0:
                raise BudgetTooSmall(
                    f"the budget went to set-up or to steps that were lost, none is left for a step: raise it, or remove {folder}"
                )
            loop.record_validation(1.0, in_loop=False)
            loop.ledger.end()


def export(setup: Setup, folder: Path) -> None:
    """The student as a Hugging Face folder with its model card."""
    ran = {stage.number for stage in read_run(folder).stage_sums}
    head = any(method.trains_mlm_head for number, method in enumerate(setup.stages.methods) if number in ran)
    longest = setup.config.seq_length
    card = model_card(folder, mlm_head=head)
    hf.export(setup.student, setup.tokenizer, folder / "final", card=card, mlm_head=head, max_length=longest)


def pushed_to(resolved: Resolved, world: World) -> str | None:
    """The repository on the hub that will get the student, checked before anything is spent; None without --push-to-hub.

    Raises:
        ValueError: a name that cannot be, or a token that may not write there.
    """
    name = resolved.run.push_to_hub
    return None if name is None else on_main(world, lambda: destination(name))


def push(folder: Path, repository: str | None, world: World, console: Console) -> None:
    """Send the finished student to the hub, if that was asked for.

    Raises:
        NotPushed: the student is saved, and the same command sends it again.
    """
    if repository and world.is_main:
        console.print(f"pushed to {push_folder(folder / 'final', repository)}")


def with_measured_dtype(resolved: Resolved, began: Run | None) -> Resolved:
    """``--dtype auto`` keeps the dtype that the run began with: a second measurement may choose another one."""
    dtype = began.plan.get("dtype") if began else None
    if dtype is None or resolved.run.dtype != "auto":
        return resolved
    return replace(resolved, run=replace(resolved.run, dtype=dtype))


def check_inputs(began: Run | None, setup: Setup) -> None:
    """Refuse to go on with other inputs than a run began with. An older run did not note all of them, and of its teacher the
    commit on the hub or the digest of its files.

    Raises:
        ValueError: naming those that have changed.
    """
    if began is None:
        return
    found, noted = dict(setup.inputs), began.environment
    if setup.config.teacher and "teacher_sha256" not in noted and "teacher_version" in noted:
        found["teacher_version"] = setup.teacher_revision or hf.digest_of_files(model_folder(setup.config.teacher))
    changed = [INPUTS[name] for name, version in found.items() if noted.get(name, version) != version]
    if changed:
        raise ValueError(
            f"the {' and the '.join(changed)} changed since the run in {began.folder} began: bring back what it was, "
            "or give another --output-dir"
        )
