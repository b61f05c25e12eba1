"""What was spent before this process: the newest checkpoint, and what the ledger charged after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastkd import checkpoint
from fastkd.budget import Ledger, Totals, surviving_steps
from fastkd.decide import Validations
from fastkd.distributed import on_main
from fastkd.files import read_jsonl

if TYPE_CHECKING:
    from fastkd.files import Record
    from fastkd.monitor import Monitor
    from fastkd.train import Trainer


def resume(trainer: Trainer, folder: Path, monitor: Monitor) -> tuple[Ledger, Validations]:
    """Load the newest checkpoint into the trainer and take over what was charged; a new run starts at zero."""
    config, world = trainer.setup.config, trainer.world
    totals, recent = _restore(trainer, folder / "checkpoints", monitor)
    ledger = Ledger(folder / "ledger.jsonl", config.charge, totals, world.size, write=world.is_main)
    ledger.complete(recent)
    validations = Validations(config.validations, world.size)
    lines = read_jsonl(folder / "ledger.jsonl")
    if lines:
        validations.take_over([line for line in lines if line["step"] <= totals.step])
        monitor.rewind(totals.step)
        _charge_the_lost(ledger, lines, folder, monitor)
    return ledger, validations


def _restore(trainer: Trainer, checkpoints: Path, monitor: Monitor) -> tuple[Totals, list[Record]]:
    """What was spent, and the ledger's lines of the last steps, at the newest checkpoint."""
    found = on_main(trainer.world, lambda: checkpoint.newest(checkpoints, monitor.say))
    if found is None:
        return Totals(), []
    found.restore(trainer.objective, trainer.optimizer)
    return Totals(**found.state["totals"]), found.state.get("recent", [])


def _charge_the_lost(ledger: Ledger, lines: list[Record], folder: Path, monitor: Monitor) -> None:
    """Take over what the ledger charged after the checkpoint: events unchanged, lost steps as one crash."""
    totals = ledger.totals
    lost = [step for step in surviving_steps(folder / "ledger.jsonl") if step["step"] > totals.step]
    lost_s = sum(sum(step["phase_s"].values()) for step in lost)
    beyond = max(line.get("charged_s", 0.0) for line in lines) - totals.charged_s
    totals.charged_s += max(0.0, beyond - lost_s * ledger.devices)
    if lost:
        ledger.event("crash", lost_s, lost_steps=len(lost))
        monitor.say(f"resumed at step {totals.step}: {len(lost)} steps after its checkpoint are repeated")
