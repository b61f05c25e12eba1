"""The plan of a run, measured before anything is spent.

A few real steps of each stage are timed and their effect on the parameters is undone. The plan that follows is printed
(``plan_lines.py``), and kept in the run folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastkd.budget import PARTS, VALIDATION_SHARE, Budget, BudgetTooSmall, Meter, StepCost, Totals
from fastkd.data.unknown import unknown_share
from fastkd.device import environment, waiting
from fastkd.device.clock import PHASES, PhaseClock, now
from fastkd.device.peaks import measured_matmul_flops, peak_flops
from fastkd.device.power import PowerMeter
from fastkd.distributed import mean, node_devices, on_main, smallest
from fastkd.exchange import OutOfMemory
from fastkd.run_folder import ancestors

if TYPE_CHECKING:
    from fastkd.config import Resolved
    from fastkd.data.batches import Batch
    from fastkd.models.encoder import EncoderConfig
    from fastkd.run_config import RunConfig
    from fastkd.setup import Setup
    from fastkd.train import Trainer

log = logging.getLogger("fastkd.plan")

WARMUP_STEPS = 2
MEASURED_STEPS = 20
MEASURED_SECONDS = 8.0


@dataclass(frozen=True)
class Measurement:
    """What a few steps of a stage took, in wall-clock seconds; the same on every rank."""

    step_seconds: float
    phase_s: dict[str, float]  # of one step
    joules: float | None  # of one step, all devices together; None where they do not count
    compile_seconds: float
    validation_seconds: float
    matmul_flops: float  # FLOP/s of a large matrix product on this device
    queued_share: float  # of the time of these steps: how long the process waited for a core that others used


def measure(trainer: Trainer) -> list[Measurement]:
    """Time real steps of each stage, then put every parameter back; the optimiser starts again, in the first stage.

    Raises:
        BudgetTooSmall: the budget does not pay for one step of each stage.
    """
    config, stages = trainer.setup.config, trainer.setup.stages
    require_steps(config.budget, trainer)
    log.info("timing steps, for %.0f seconds at most", len(stages.all) * MEASURED_SECONDS)
    measured = []
    for number in range(len(stages.all)):
        trainer.enter(number, for_good=False)
        measured.append(_measure_stage(trainer))
    trainer.enter(0, for_good=False)
    return measured


def _measure_stage(trainer: Trainer) -> Measurement:
    """Where memory runs out, the micro-batch is halved and all steps are timed again."""
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
    budget, stage = trainer.setup.config.budget, trainer.setup.stages.stage
    amount = Meter(budget, Totals(), estimate * trainer.world.size).step_amount(trainer.step_cost(0))
    most = min(MEASURED_SECONDS / estimate, stage.share * budget.amount / amount)
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


@dataclass(frozen=True)
class Bought:
    """What its share of the budget buys of a stage."""

    steps: int
    cost: StepCost  # of one step
    optimizer_flops: int  # of one step, among the student's
    times: Measurement

    @property
    def seconds(self) -> float:
        """On the wall clock."""
        return self.steps * self.times.step_seconds


def bought(config: RunConfig, trainer: Trainer, measured: Sequence[Measurement]) -> list[Bought]:
    """The steps of each stage that the budget of ``config`` buys. What a stage leaves goes to the next one.

    Raises:
        BudgetTooSmall: it does not pay for one step of each.
    """
    budget, devices = config.budget, trainer.world.size
    amounts = require_steps(budget, trainer, measured)
    usable, left, found = budget.amount, 0.0, []
    if budget.unit == "gpu-seconds" and config.charge != "compute":
        usable -= sum(each.compile_seconds for each in measured) * devices
        usable -= _validation_seconds(config, max(each.validation_seconds for each in measured), devices)
    for number, (stage, amount, times) in enumerate(zip(trainer.setup.stages.all, amounts, measured, strict=True)):
        left += usable * stage.share
        steps = max(1, int(left // amount))
        left -= steps * amount
        found.append(Bought(steps, trainer.step_cost(0, number), trainer.optimizer_flops(number), times))
    return found


def require_steps(budget: Budget, trainer: Trainer, measured: Sequence[Measurement] = ()) -> list[float]:
    """What one step of each stage takes of the budget: GPU-seconds as measured, FLOPs and tokens exactly.

    Raises:
        BudgetTooSmall: one takes more than all that its stage has.
    """
    stages, found = trainer.setup.stages.all, []
    for number, stage in enumerate(stages):
        seconds = measured[number].step_seconds * trainer.world.size if measured else 0.0
        amount = Meter(budget, Totals(), seconds).step_amount(trainer.step_cost(0, number))
        whole = Budget(budget.unit, stage.share * budget.amount)
        if amount > whole.amount:
            needed = Budget(budget.unit, amount)
            if len(stages) == 1:
                raise BudgetTooSmall(
                    f"one step takes {needed}, the budget is {budget}: raise it, or lower --batch-tokens"
                )
            raise BudgetTooSmall(
                f"one step of {stage.method} takes {needed}, its share of the budget is {whole}: raise the budget or the "
                "share, or lower --batch-tokens"
            )
        found.append(amount)
    return found


def _validation_seconds(config: RunConfig, seconds: float, devices: int) -> float:
    """GPU-seconds of the validations within the loop: as many as were asked for, but at most 2% of the budget."""
    each = seconds * devices
    affordable = int(VALIDATION_SHARE * config.budget.amount // each)
    return min(config.validations, affordable) * each


def make(resolved: Resolved, trainer: Trainer, measured: Sequence[Measurement]) -> dict[str, Any]:
    """The plan as plan.json holds it. One measurement serves any budget: what was asked for is read from ``resolved`` only.

    Raises:
        BudgetTooSmall: the budget does not pay for one step of each stage.
    """
    config, setup = resolved.run, trainer.setup
    stages = bought(config, trainer, measured)
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
        "matmul_flops_per_s": measured[0].matmul_flops,
        "lr": setup.rate(0),
        "schedule": config.schedule,
        "optimizer": config.optimizer,
        "batch_tokens": config.batch_tokens,
        "micro_batch": trainer.micro_tokens,
        "attention": setup.attention,
        "attention_remark": setup.attention_remark,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "compile": setup.compile,
        "residual": config.residual,
        "activation_bytes": setup.activation_bytes(trainer.micro_tokens),
        "validation_seconds": measured[-1].validation_seconds,
        "queued_share": max(each.queued_share for each in measured),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "epochs": trainer.stream.epoch_of(sum(each.steps for each in stages)),
        **_amounts(stages, trainer),
        "stages": _stages(setup, stages, trainer) if stages[1:] else [],
    }


def _amounts(stages: Sequence[Bought], trainer: Trainer) -> dict[str, Any]:
    """What stages take together, and what that is in each step, second and token."""
    steps, seconds = sum(each.steps for each in stages), sum(each.seconds for each in stages)
    tokens = sum(each.steps * each.cost.real for each in stages)
    flops = {part: sum(each.steps * each.cost.flops[part] for each in stages) for part in PARTS}
    phase_s = {name: sum(each.steps * each.times.phase_s[name] for each in stages) / steps for name in PHASES}
    joules = [None if each.times.joules is None else each.steps * each.times.joules for each in stages]
    rate, peak = sum(flops.values()) / seconds, peak_flops(trainer.device)
    return {
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds,
        "step_seconds": seconds / steps,
        "tokens_per_s": tokens / seconds,
        "flops": flops,
        "flops_per_token": {part: value / tokens for part, value in flops.items()},
        "optimizer_flops_per_token": sum(each.steps * each.optimizer_flops for each in stages) / tokens,
        "flops_per_s": rate,
        "mfu": None if peak is None else rate / peak / trainer.world.size,
        "joules": None if None in joules else sum(joules),
        "phase_s": phase_s,
        "teacher_share": flops["teacher"] / sum(flops.values()),
        "teacher_seconds_share": phase_s["teacher"] * steps / seconds,
    }


def _stages(setup: Setup, stages: Sequence[Bought], trainer: Trainer) -> list[dict[str, Any]]:
    """The same for each stage, with its method, options, share of the budget and peak learning rate."""
    return [
        {"method": stage.method, "options": asdict(stage.options), "share": stage.share, "lr": setup.rate(number)}
        | _amounts([each], trainer)
        for number, (stage, each) in enumerate(zip(setup.stages.all, stages, strict=True))
    ]


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


def _model(config: EncoderConfig) -> dict[str, Any]:
    return {
        "layers": config.num_layers,
        "width": config.hidden_size,
        "heads": config.num_heads,
        "vocabulary": config.vocab_size,
    }


def _teacher(config: RunConfig, setup: Setup) -> dict[str, Any] | None:
    teacher, layers = setup.stages.last_teacher, [0]
    if teacher is None:
        return None
    layers += [
        each.teacher_needs.depth(teacher.config.num_layers) for each in setup.stages.methods if each.teacher_needs
    ]
    return _model(teacher.config) | {
        "parameters": setup.teacher_parameters,
        "source": config.teacher,
        "layers_run": max(layers),
        "attention": teacher.attention,
        "attention_remark": teacher.attention_remark,
    }
