"""The loop: steps until the budget is spent. Rank 0 decides, the ledger is charged, the run is validated and saved."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkd import checkpoint, health, ledger, schedule, signals
from fastkd.decide import Decider
from fastkd.device.clock import Lap, PhaseClock
from fastkd.device.memory import peak_memory_bytes
from fastkd.device.power import PowerMeter
from fastkd.distributed import Decision, agree, any_rank, barrier, node_devices, phase
from fastkd.health import Diverged
from fastkd.resume import resume

if TYPE_CHECKING:
    from fastkd.budget import StepCost
    from fastkd.data.batches import Batch
    from fastkd.monitor import Monitor
    from fastkd.train import Trainer

STEPS_AHEAD = 2  # of the device: its clock counts, and no step waits for the host
ENERGY_S = 1.0  # between readings of the energy while steps follow one another
SKIPS_TOLERATED = 20  # steps in a row whose loss or gradient is not finite


class Interrupted(KeyboardInterrupt):
    """Asked to stop (Ctrl-C, SIGTERM); the run is saved and can be resumed."""


@dataclass
class IssuedStep:
    """A step that was given to the device; its seconds and loss are read once the device is done."""

    cost: StepCost
    progress: float
    lr: float
    epoch: float
    lap: Lap
    loss: Tensor  # on the host; valid once the lap has ended
    skipped: Tensor


class Loop:
    """Steps until the budget is spent: issues, settles, logs, validates and saves."""

    def __init__(self, trainer: Trainer, folder: Path, monitor: Monitor, step_seconds: Sequence[float]) -> None:
        """``step_seconds``: what a step of each stage takes on the wall clock, as measured."""
        self.trainer, self.setup, self.world = trainer, trainer.setup, trainer.world
        self.folder, self.monitor, self.config = folder, monitor, trainer.setup.config
        self.ledger, self.validations = resume(trainer, folder, monitor)
        self.totals, self.stages = self.ledger.totals, trainer.setup.stages
        charged = [seconds * self.world.size for seconds in step_seconds]
        self.decider = Decider(self.config, self.totals, self.stages.all, trainer.step_cost, charged, self.validations)
        self.checkpoints = self.decider.checkpoints
        self.power = PowerMeter(node_devices(self.world) if self.world.is_main else [])
        self.issued: deque[IssuedStep] = deque()
        self.seconds = 0.0  # of steps, in this process
        self._logged = (self.totals.tokens["real"], 0.0, self.totals.joules or 0.0)
        self._ahead: Generator[list[Batch], None, None] | None = None

    @property
    def number(self) -> int:
        """Of the next step that is issued, from 0."""
        return self.totals.step + len(self.issued)

    def run(self, traced: Callable[[], None] = lambda: None) -> None:
        """Train until no further step fits, and save the last one; ``traced`` is called after each step.

        A finished run takes no step more, even if one would fit that is faster than those before it.

        Raises:
            Interrupted: after a signal, once saved.
            Diverged: weights are not finite, or step after step was skipped; the last healthy state is kept.
        """
        with signals.deferred(), phase("a step"):
            try:
                if not self.ledger.finished:
                    self._run(traced)
                self.save_the_end()  # before anything that may be interrupted
                self._stop_if_asked(any_rank(self.world, signals.asked()))
            except (RuntimeError, OSError):
                # A peer is gone, the device or a disk failed, or there is no more text: this rank holds the last whole step.
                with contextlib.suppress(RuntimeError, OSError, Diverged):
                    self._rescue()
                raise
            finally:
                self._stop_reading()

    def _run(self, traced: Callable[[], None]) -> None:
        self.trainer.clock = PhaseClock(self.trainer.device)
        self._await_text()
        decision = Decision(0.0)
        while True:
            while len(self.issued) >= STEPS_AHEAD or (self.issued and self.trainer.device.type == "cpu"):
                self._settle()
            self._require_health(SKIPS_TOLERATED)
            self.trainer.clock.mark("other")
            if self.trainer.stream.enters_part(self.number):
                spent = self.world.is_main and self.decider.is_spent(self.number, self._in_flight())
                if any_rank(self.world, spent):
                    break
                self._await_text()
            decision = agree(self.world, self._decide())
            self.trainer.clock.mark("communication")
            if decision.stop or decision.interrupted:
                break
            if decision.validate:
                self._validate_between_steps(decision.progress)
            if decision.checkpoint:
                self.save()
            if (stage := self.stages.at(decision.progress)) > self.stages.number:  # a replayed progress may fall
                self._enter(stage)
            self._issue(self._read(), decision.progress)
            traced()
        while self.issued:
            self._settle()
        if decision.interrupted:
            self.save()
        self._stop_if_asked(decision.interrupted)
        all_of_a_short_run = max(1, min(SKIPS_TOLERATED, self.totals.step))
        self._require_health(all_of_a_short_run)

    def _stop_if_asked(self, asked: bool) -> None:
        """Raises Interrupted on every rank if ``asked``, which all know: the run is saved."""
        if asked:
            raise Interrupted(f"stopped at step {self.totals.step}; issue the same command again to resume")

    def _await_text(self) -> None:
        """Every rank waits for the text of the next step, and shuffles it, before any of them waits in a decision.

        For a large corpus this takes longer than ranks wait for a peer before they take it for dead.
        """
        number, stream = self.number, self.trainer.stream
        if not stream.is_there(number):
            self.monitor.say("waiting for the next part of the corpus, which is being tokenised")
        with phase("waiting for text"), contextlib.suppress(InterruptedError):
            stream.wait(number, signals.asked)
            self.trainer.step_cost(number)
        barrier(self.world)
        self.trainer.clock.mark("data")

    def _read(self) -> list[Batch]:
        """This rank's micro-batches of the next step; those of the steps after it are read meanwhile."""
        if self._ahead is None:
            self._ahead = self.trainer.stream.prefetch(self.number)
        return next(self._ahead)

    def _stop_reading(self) -> None:
        """Forget what was read ahead: the next step is read again, in micro-batches of the new size."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _decide(self) -> Decision:
        if not self.world.is_main:
            return Decision(0.0, interrupted=signals.asked())
        if signals.asked() and not self.trainer.stream.is_there(self.number):
            return Decision(0.0, interrupted=True)  # what the step costs is not known without its text
        return self.decider.decide(self.number, self._in_flight(), interrupted=signals.asked())

    def _in_flight(self) -> list[StepCost]:
        return [step.cost for step in self.issued]

    def _enter(self, number: int) -> None:
        """Go over to another stage of the recipe."""
        while self.issued:
            self._settle()
        self._stop_reading()  # its micro-batches may be smaller
        with phase("a stage's start"):
            self.trainer.enter(number)
        self.decider.stage = number
        # What is saved from here on is of this stage.
        self.totals.progress = math.nextafter(self.stages.stage.start, 1.0)
        seconds = self.trainer.clock.event("stage")
        self.ledger.event("stage", seconds, stage=number, joules=self.power.joules_since_last())
        name, count = self.stages.stage.method, len(self.stages.all)
        self.monitor.say(f"step {self.totals.step:,} · stage {number + 1} of {count}: {name}")

    # ---- one step, from issue to charge ---------------------------------------------------------------------

    def _issue(self, batches: list[Batch], progress: float) -> None:
        """Give a step to the device; where memory runs out, halve the micro-batch and repeat it."""
        trainer, number = self.trainer, self.number
        trainer.clock.mark("data")
        lr = schedule.learning_rate(progress, self.setup.lr, self.config.warmup, self.config.schedule)
        if self.config.dropout:
            torch.manual_seed(self.config.seed + number * self.world.size + self.world.rank)
        loss, norm, terms = self._step_within_memory(batches, lr)
        host = torch.empty(2, dtype=torch.float32, pin_memory=loss.is_cuda)
        host.copy_(torch.stack([loss, trainer.skipped]), non_blocking=True)
        trainer.clock.mark("other")
        epoch = self.trainer.stream.epoch_of(number + 1)
        step = IssuedStep(self.trainer.step_cost(number), progress, lr, epoch, trainer.clock.lap(), host[0], host[1])
        self.issued.append(step)
        self.checkpoints.unsaved = True
        if self.monitor.due(number + 1):
            self._log(norm, terms)

    def _step_within_memory(self, batches: list[Batch], lr: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        while True:
            with contextlib.suppress(torch.OutOfMemoryError):
                return self.trainer.step(batches, lr)
            fits = False
            while not fits:
                self.trainer.halve_micro_batch()
                self._stop_reading()
                batches = self._read()
                fits = self.trainer.fits(batches[0])

    def _settle(self) -> None:
        """Charge the oldest step that was issued, once the device has finished it."""
        step = self.issued.popleft()
        phase_s = step.lap.seconds()
        charged = self.ledger.step(
            step.cost, phase_s, progress=step.progress, epoch=step.epoch,
            unique=self.trainer.stream.unique_of(self.totals.step + 1), joules=self._joules(),
            lr=step.lr, loss=float(step.loss), skipped=bool(step.skipped), stage=self._stage().get("stage"),
        )  # fmt: skip
        self.decider.meter.observe(charged)
        self.seconds += charged / self.world.size
        self.monitor.advance(min(1.0, self.decider.meter.charged() / self.config.budget.amount))

    def _stage(self) -> dict[str, int]:
        """The number of the stage, for lines of a run that has several."""
        return {"stage": self.stages.number} if len(self.stages.all) > 1 else {}

    def _joules(self) -> float | None:
        """Joules since the last reading. Once one is missing it stays None: a total that lacks a part is no total.

        Read about once a second, and with the last step before anything else happens: energy of an event is not a step's.
        """
        joules = self.power.joules_since_last(ENERGY_S if self.issued else 0.0)
        if joules is None or (self.totals.step > 0 and self.totals.joules is None):
            joules = self.totals.joules = None
        return joules

    def _log(self, norm: Tensor, terms: dict[str, Tensor]) -> None:
        """Write one line of metrics; the only place in the loop that waits for the device."""
        clocks = self.power.clocks()  # while the device still works on the step
        while self.issued:
            self._settle()
        if not self.world.is_main:
            return
        t, line = self.totals, self.ledger.recent[-1]
        (tokens, seconds, joules), self._logged = self._logged, (t.tokens["real"], self.seconds, t.joules or 0.0)
        taken = self.seconds - seconds
        self.monitor.step({
            "step": t.step, **self._stage(), "progress": line["progress"], "charged_s": t.charged_s,
            "tokens": t.tokens["real"], "loss": line["loss"], "parts": {name: float(value) for name, value in terms.items()},
            "lr": line["lr"], "skipped": t.skipped, "grad_norm": float(norm), "tokens_per_s": (t.tokens["real"] - tokens) / taken,
            "watts": None if t.joules is None else (t.joules - joules) / taken, **asdict(clocks),
            "peak_memory_bytes": peak_memory_bytes(self.trainer.device),
        })  # fmt: skip

    # ---- between steps --------------------------------------------------------------------------------------

    def _validate_between_steps(self, progress: float) -> None:
        while self.issued:
            self._settle()
        self.validations.count += 1
        self.record_validation(progress, in_loop=True)

    def record_validation(self, progress: float, *, in_loop: bool) -> None:
        """Validate and write it down. Before the first and after the last step it costs the budget nothing."""
        if not in_loop:
            self.trainer.clock = PhaseClock(self.trainer.device)
        with phase("validation"):
            found = self.trainer.validate()
        self.validations.seconds = self.trainer.clock.event("validation")
        joules = self.power.joules_since_last()
        self.ledger.event("validation", self.validations.seconds, in_loop=in_loop, progress=progress, joules=joules)
        t = self.totals
        if self.world.is_main:
            self.monitor.validation({
                "step": t.step, **self._stage(), "progress": progress, "charged_s": t.charged_s, "tokens": t.tokens["real"],
                **asdict(found),
            })  # fmt: skip

    def save_the_end(self) -> None:
        """Save the steps after the last checkpoint, so that a validation or an export that fails can be repeated."""
        if self.checkpoints.unsaved:
            self.save(in_loop=False)

    def save(self, *, in_loop: bool = True) -> None:
        """Write a checkpoint of the last finished step.

        Raises:
            Diverged: on every rank, if a weight or a moment is not finite; the checkpoints that are there stay.
        """
        while self.issued:
            self._settle()
        self.ledger.sync()
        with phase("a checkpoint"):
            try:
                if self.world.is_main:
                    self._write_checkpoint()
                else:  # as rank 0 does: all hold the same weights
                    checkpoint.require_finite(self.trainer.objective, self.trainer.optimizer)
            except Diverged as error:
                raise self._diverged(str(error), error.cause) from error
            barrier(self.world)
        seconds = self.trainer.clock.event("checkpoint")
        self.ledger.event("checkpoint", seconds, in_loop=in_loop, joules=self.power.joules_since_last())

    def _rescue(self) -> None:
        """Save without asking the other ranks, which may be gone; if several survived, one of them writes."""
        while self.issued:
            self._settle()
        if not self.checkpoints.unsaved:
            return
        claim = self.folder / f".rescue-step-{self.totals.step}"
        with contextlib.suppress(FileExistsError):  # another survivor writes it
            claim.mkdir()
            try:
                self._write_checkpoint(goes_on=False)
            finally:
                claim.rmdir()

    def _write_checkpoint(self, *, goes_on: bool = True) -> None:
        state = {"step": self.totals.step, "totals": asdict(self.totals)}
        checkpoint.save(
            self.folder / "checkpoints", self.trainer.objective, self.trainer.optimizer, state,
            copies={ledger.NAME: self.ledger.copy()}, goes_on=goes_on, say=self.monitor.say,
        )  # fmt: skip
        self.checkpoints.saved()

    # ---- when numbers are not finite ------------------------------------------------------------------------

    def _require_health(self, tolerated: int) -> None:
        """End a run whose last steps were all skipped, and keep its weights: no skipped step changed them."""
        skips = self.totals.skipped_in_a_row
        if skips < tolerated:
            return
        while self.issued:
            self._settle()
        if self.checkpoints.unsaved:
            self.save()  # says it better where a weight is not finite
        cause = health.likely_cause(self.trainer, self.totals.step - 1)
        raise self._diverged(f"no loss and gradient were finite in {skips} steps in a row", cause)

    def _diverged(self, found: str, cause: health.Cause) -> Diverged:
        kept = checkpoint.latest(self.folder / "checkpoints")
        state = f"the last healthy state is {kept}" if kept else "no healthy state was saved before"
        text = f"diverged by step {self.totals.step}: {found}; {health.remedy(cause, self.setup, self.folder)}; {state}"
        return Diverged(text, cause)
