"""The plan of a run, measured before anything is spent.

A few real steps are timed and their effect on the parameters is undone. The plan that follows is printed, and kept in the run
folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastkd import quantities
from fastkd.budget import VALIDATION_SHARE, Budget, BudgetTooSmall, Meter, StepCost, Totals
from fastkd.data.unknown import unknown_remark, unknown_share
from fastkd.device import environment, waiting
from fastkd.device.clock import PHASES, PhaseClock, now
from fastkd.device.peaks import measured_matmul_flops, peak_flops
from fastkd.device.power import PowerMeter
from fastkd.distributed import mean, node_devices, on_main, smallest
from fastkd.exchange import OutOfMemory
from fastkd.reports.descriptions import start_text
from fastkd.run_folder import ancestors

if TYPE_CHECKING:
    from fastkd.config import Resolved
    from fastkd.data.batches import Batch
    from fastkd.models.encoder import EncoderConfig
    from fastkd.run_config import RunConfig
    from fastkd.setup import Setup
    from fastkd.terminal import Console
    from fastkd.train import Trainer

log = logging.getLogger("fastkd.plan")

WARMUP_STEPS = 2
MEASURED_STEPS = 20
MEASURED_SECONDS = 8.0
SHORT = 0.5  # of --seq-length: if the average sequence is shorter, the plan warns


@dataclass(frozen=True)
class Measurement:
    """What a few steps took, in wall-clock seconds; the same on every rank."""

    step_seconds: float
    phase_s: dict[str, float]  # of one step
    joules: float | None  # of one step, all devices together; None where they do not count
    compile_seconds: float
    validation_seconds: float
    matmul_flops: float  # FLOP/s of a large matrix product on this device
    queued_share: float  # of the time of these steps: how long the process waited for a core that others used


def measure(trainer: Trainer) -> Measurement:
    """Time real steps, then put every parameter back; the optimiser starts again.

    Where memory runs out, the micro-batch is halved and all steps are timed again.

    Raises:
        BudgetTooSmall: the budget does not pay for one step.
    """
    require_a_step(trainer.setup.config.budget, trainer.step_cost(0))
    log.info("timing steps, for %.0f seconds at most", MEASURED_SECONDS)
    saved = {name: value.clone() for name, value in trainer.objective.state_dict().items()}
    measured = None
    while measured is None:
        try:
            measured = _measure(trainer)
        except torch.OutOfMemoryError as error:
            if trainer.world.size > 1 and not isinstance(error, OutOfMemory):  # of which the others know nothing
                raise OSError("out of memory in a validation, though steps fitted: free the device") from error
        trainer.objective.load_state_dict(saved)
        trainer.optimizer = trainer.new_optimizer()
        fits, began = measured is not None, now()
        while not fits:
            trainer.halve_micro_batch()
            fits = trainer.fits(trainer.stream.step(0)[0])
        trainer.rehearsal_seconds += now() - began
    return on_main(trainer.world, lambda: measured)


def _measure(trainer: Trainer) -> Measurement:
    """This rank's seconds; the parameters are not put back."""
    power = PowerMeter(node_devices(trainer.world) if trainer.world.is_main else [])
    with contextlib.closing(trainer.stream.prefetch(0)) as stream:  # as a run reads them
        first, *_ = warm_up = [_timed_step(trainer, stream, step) for step in range(WARMUP_STEPS)]
        count = _ready_steps(trainer, _steps_worth_timing(trainer, sum(warm_up[-1].values())))
        power.joules_since_last()
        began, queued = now(), waiting.queued_seconds()
        laps = [_timed_step(trainer, stream, WARMUP_STEPS + step) for step in range(count)]
        joules = power.joules_since_last()
        queued_share = (waiting.queued_seconds() - queued) / (now() - began)
    step_seconds = sum(sum(lap.values()) for lap in laps) / count
    compile_seconds = trainer.rehearsal_seconds + sum(first.values()) - 2 * step_seconds
    trainer.validate()
    compile_seconds += trainer.clock.event("validation")
    trainer.validate()
    validation_seconds = trainer.clock.event("validation")
    compile_seconds -= validation_seconds
    return Measurement(
        step_seconds=step_seconds,
        phase_s={phase: sum(lap[phase] for lap in laps) / count for phase in PHASES},
        joules=None if joules is None else joules / count,
        compile_seconds=max(0.0, compile_seconds) if trainer.setup.compile else 0.0,
        validation_seconds=validation_seconds,
        matmul_flops=measured_matmul_flops(trainer.device, trainer.setup.dtype),
        queued_share=queued_share,
    )


def _steps_worth_timing(trainer: Trainer, estimate: float) -> int:
    """How many steps of some ``estimate`` seconds to time: at most as many as the run itself will take, but at least three."""
    budget = trainer.setup.config.budget
    amount = Meter(budget, Totals(), estimate * trainer.world.size).step_amount(trainer.step_cost(0))
    most = min(MEASURED_SECONDS / estimate, budget.amount / amount)
    return int(mean(trainer.world, torch.tensor(most)).clamp(3, MEASURED_STEPS))


def _ready_steps(trainer: Trainer, most: int) -> int:
    """How many steps to time: those whose text is tokenised already, but at least three."""
    missing = (step for step in range(3, most) if not trainer.stream.is_there(WARMUP_STEPS + step))
    return int(smallest(trainer.world, next(missing, most)))


def _timed_step(trainer: Trainer, stream: Iterator[list[Batch]], step: int) -> dict[str, float]:
    trainer.stream.wait(step)  # while text is tokenised, for which a run is not charged either
    trainer.clock = PhaseClock(trainer.device)
    batches = next(stream)
    trainer.clock.mark("data")
    loss, _, _ = trainer.step(batches, lr=trainer.setup.lr)
    float(loss)
    trainer.clock.mark("other")
    return trainer.clock.lap().seconds()


def predict(config: RunConfig, trainer: Trainer, measured: Measurement) -> dict[str, Any]:
    """Steps, tokens, epochs and energy that the budget of ``config`` buys.

    Raises:
        BudgetTooSmall: it does not pay for one step.
    """
    budget, devices, cost = config.budget, trainer.world.size, trainer.step_cost(0)
    amount = require_a_step(budget, cost, measured.step_seconds * devices)
    usable = budget.amount
    if budget.unit == "gpu-seconds" and config.charge != "compute":
        usable -= measured.compile_seconds * devices + _validation_seconds(config, measured, devices)
    steps = max(1, int(usable // amount))
    tokens = steps * cost.real
    return {
        "step_seconds": measured.step_seconds,
        "tokens_per_s": cost.real / measured.step_seconds,
        "steps": steps,
        "tokens": tokens,
        "epochs": trainer.stream.epoch_of(steps),
        "seconds": steps * measured.step_seconds,
        "flops": {part: steps * value for part, value in cost.flops.items()},
        "joules": None if measured.joules is None else steps * measured.joules,
    }


def require_a_step(budget: Budget, cost: StepCost, step_charged: float = 0.0) -> float:
    """What one step takes of the budget: GPU-seconds as measured (``step_charged``), FLOPs and tokens exactly.

    Raises:
        BudgetTooSmall: more than all of it.
    """
    amount = Meter(budget, Totals(), step_charged).step_amount(cost)
    if amount > budget.amount:
        needed = Budget(budget.unit, amount)
        raise BudgetTooSmall(f"one step takes {needed}, the budget is {budget}: raise it, or lower --batch-tokens")
    return amount


def _validation_seconds(config: RunConfig, measured: Measurement, devices: int) -> float:
    """GPU-seconds of the validations within the loop: as many as were asked for, but at most 2% of the budget."""
    each = measured.validation_seconds * devices
    affordable = int(VALIDATION_SHARE * config.budget.amount // each)
    return min(config.validations, affordable) * each


def make(resolved: Resolved, trainer: Trainer, measured: Measurement) -> dict[str, Any]:
    """The plan as plan.json holds it. One measurement serves any budget: what was asked for is read from ``resolved`` only."""
    config, setup, cost = resolved.run, trainer.setup, trainer.step_cost(0)
    total = sum(cost.flops.values())
    per_token = {part: value / cost.real for part, value in cost.flops.items()}
    return {
        "device": environment.device_name(),
        "devices": trainer.world.size,
        "preset": config.preset,
        "preset_reason": resolved.preset_reason,
        "method": config.method,
        "student": _model(setup.student.config)
        | {
            "spec": config.student,
            "parameters": sum(p.numel() for p in setup.student.parameters()),
            "start": config.teacher if config.init_from_teacher else None,
            "start_remark": setup.start_remark,
        },
        "teacher": _teacher(config, setup),
        "ancestors": ancestors(config.teacher),
        "corpus": _corpus(config, trainer),
        "budget": asdict(config.budget),
        "charge": config.charge,
        "flops_per_token": per_token,
        "teacher_share": cost.flops["teacher"] / total,
        "teacher_seconds_share": measured.phase_s["teacher"] / measured.step_seconds,
        "phase_s": measured.phase_s,
        "flops_per_s": total / measured.step_seconds,
        "matmul_flops_per_s": measured.matmul_flops,
        "mfu": _mfu(trainer, cost, measured),
        "lr": setup.lr,
        "batch_tokens": config.batch_tokens,
        "micro_batch": trainer.micro_tokens,
        "attention": setup.attention,
        "attention_remark": setup.attention_remark,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "compile": setup.compile,
        "residual": config.residual,
        "activation_bytes": setup.activation_bytes(trainer.micro_tokens),
        "validation_seconds": measured.validation_seconds,
        "queued_share": measured.queued_share,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    } | predict(config, trainer, measured)


def _corpus(config: RunConfig, trainer: Trainer) -> dict[str, Any]:
    """Sizes of the corpus; estimates until all of it is tokenised."""
    shards = trainer.setup.shards
    tokens, sizes = shards.unique_tokens, shards.sizes
    return {
        "sources": config.corpus,
        "documents": round(sizes["documents"]["train"] * tokens / sizes["tokens"]["train"]),
        "unique_tokens": tokens,
        "is_complete": shards.is_complete,
        "held_out_tokens": shards.held_out_tokens,
        "unknown_share": unknown_share(shards.first.documents()[0], trainer.setup.tokenizer.unk_token_id),
        "mean_sequence": trainer.stream.mean_sequence,
        "seq_length": config.seq_length,
    }


def _corpus_line(corpus: dict[str, Any]) -> str:
    about = "" if corpus["is_complete"] else "about "
    share = corpus["held_out_tokens"] / (corpus["unique_tokens"] + corpus["held_out_tokens"])
    return (
        f"{', '.join(corpus['sources'])}: {about}{quantities.count(corpus['unique_tokens'])} tokens, "
        f"{quantities.count(corpus['held_out_tokens'])} held out ({share:.1%}), "
        f"sequences of {corpus['mean_sequence']:.0f} tokens on average"
    )


def _short_sequences(corpus: dict[str, Any]) -> str | None:
    """A warning if sequences are far from full."""
    if corpus["mean_sequence"] >= SHORT * corpus["seq_length"]:
        return None
    return (
        f"sequences hold {corpus['mean_sequence']:.0f} tokens on average, under half of --seq-length {corpus['seq_length']}: "
        "--packing full-sentences fills them; where a row or line is a sentence, +join after the corpus's name joins them"
    )


def _mfu(trainer: Trainer, cost: StepCost, measured: Measurement) -> float | None:
    peak = peak_flops(trainer.device)
    return None if peak is None else sum(cost.flops.values()) / measured.step_seconds / peak / trainer.world.size


def _model(config: EncoderConfig) -> dict[str, Any]:
    return {
        "layers": config.num_layers,
        "width": config.hidden_size,
        "heads": config.num_heads,
        "vocabulary": config.vocab_size,
    }


def _teacher(config: RunConfig, setup: Setup) -> dict[str, Any] | None:
    if setup.teacher is None:
        return None
    teacher = setup.teacher
    return _model(teacher.config) | {
        "parameters": setup.teacher_parameters,
        "source": config.teacher,
        "layers_run": teacher.needs.depth(teacher.config.num_layers),
        "attention": teacher.attention,
        "attention_remark": teacher.attention_remark,
    }


def render(plan: dict[str, Any], console: Console) -> None:
    """Print a plan, a line a fact."""
    student, teacher, q = plan["student"], plan["teacher"], quantities
    flops, rounded = plan["flops_per_token"], ", bfloat16 residual stream" if plan["residual"] == "bfloat16" else ""
    rows = [
        ("device", f"{plan['devices']} × {plan['device']}, {plan['dtype']}{rounded}, "
                   f"attention {_attention(plan)}, compile {'on' if plan['compile'] else 'off'}"),
        ("method", f"{plan['method']}, learning rate {plan['lr']:g}"),
        ("student", f"{student['spec']}, {q.count(student['parameters'])} parameters"
                    + start_text(student)),
        ("teacher", "none" if teacher is None else f"{teacher['source']}, {q.count(teacher['parameters'])} parameters, "
                                                   f"{teacher['layers_run']} of {teacher['layers']} layers run, "
                                                   f"attention {_attention(teacher)}"),
        ("corpus", _corpus_line(plan["corpus"])),
        ("budget", f"{Budget(**plan['budget'])}, charged: {plan['charge']}"),
        ("step", f"{q.count(plan['batch_tokens'])} tokens in micro-batches of {q.count(plan['micro_batch'])}, "
                 f"{q.duration(plan['step_seconds'])}, {q.memory(plan['activation_bytes'])} of activations"),
        ("FLOPs a token", ", ".join(f"{part} {q.scaled(value, 'FLOP')}" for part, value in flops.items())),
        ("teacher's share", f"{plan['teacher_share']:.1%} of the FLOPs, "
                            f"{plan['teacher_seconds_share']:.1%} of the seconds"),
        ("throughput", f"{q.count(plan['tokens_per_s'])} tokens/s, {q.scaled(plan['flops_per_s'], 'FLOP/s')} = "
                       f"{plan['flops_per_s'] / plan['matmul_flops_per_s'] / plan['devices']:.1%} of a matrix product's"
                       + ("" if plan["mfu"] is None else f", MFU {plan['mfu']:.1%}")),
        ("predicted", f"{plan['steps']:,} steps, {q.count(plan['tokens'])} tokens, {plan['epochs']:.2f} epochs, "
                      f"{q.scaled(sum(plan['flops'].values()), 'FLOP')}, {q.duration(plan['seconds'])}"
                      + ("" if plan["joules"] is None else f", {q.scaled(plan['joules'], 'J')}")),
    ]  # fmt: skip
    if plan["queued_share"] > waiting.BUSY_SHARE:
        load = "" if plan["load"] is None else f" (load {plan['load']:.1f})"
        rows.append(("busy", f"other programs had the cores for {plan['queued_share']:.0%} of the time that steps were "
                             f"timed{load}: without them steps are faster"))  # fmt: skip
    for name, value in rows:
        console.print(f"{name:<17}{value}")
    corpus = plan["corpus"]
    for warning in filter(None, (_short_sequences(corpus), unknown_remark(corpus["unknown_share"]))):
        console.print(f"warning: {warning}")


def announce(resolved: Resolved, console: Console) -> None:
    """The plan's first line, which is known before anything is loaded."""
    console.print(f"{'preset':<17}{resolved.run.preset} ({resolved.preset_reason})")


def _attention(model: dict[str, Any]) -> str:
    """A backend, and if it is a slow one, why."""
    return model["attention"] + (f" ({model['attention_remark']})" if model["attention_remark"] else "")
