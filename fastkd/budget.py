"""Budget and ledger: what is charged, how far along a run is, and when it stops.

A budget has one governing unit: ``gpu-seconds`` (summed over devices), ``flops`` or ``tokens``. The ledger records all
of them for every step, whichever governs, so that runs can be compared in either unit afterwards.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from fastkd.files import drop_torn_line, read_jsonl, to_line

Unit = Literal["gpu-seconds", "flops", "tokens"]
Charge = Literal["loop", "compute", "all"]

# Events that cost GPU-seconds under each policy (steps are always charged). A crash is the time of lost steps.
CHARGED_EVENTS: dict[str, frozenset[str]] = {
    "compute": frozenset(),
    "loop": frozenset({"validation", "checkpoint", "compile", "crash"}),
    "all": frozenset({"validation", "checkpoint", "compile", "crash", "setup"}),
}
VALIDATION_SHARE = 0.02  # of what is charged: validations that would cost more are left out
LAST_STEP_MARGIN = 0.25  # of a step: if less than this would remain after one more step, the step counts as the last
PARTS = ("student", "teacher", "loss")
RECENT = 3  # lines of the ledger that a checkpoint keeps: ranks are never that many steps apart


class BudgetTooSmall(Exception):
    """The budget does not pay for one step."""


@dataclass(frozen=True)
class Budget:
    """An amount of one unit."""

    unit: Unit
    amount: float

    def __str__(self) -> str:
        if self.unit == "gpu-seconds":
            return f"{self.amount:g} GPU-seconds ({self.amount / 3600:g} GPU-hours)"
        return f"{self.amount:.6g} {self.unit}"


@dataclass(frozen=True)
class StepCost:
    """What is known of one step before it runs: FLOPs of student, teacher and loss, and tokens, over all ranks."""

    flops: dict[str, int]
    real: int
    predicted: int


@dataclass
class Totals:
    """Cumulative counters of a run; saved in every checkpoint."""

    step: int = 0
    charged_s: float = 0.0
    flops: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: {"real": 0, "predicted": 0, "unique": 0})
    joules: float | None = None
    skipped: int = 0  # steps without effect: their loss or gradient was not finite
    skipped_in_a_row: int = 0  # up to the last step


class Meter:
    """Decides, before each step, the progress it belongs to and whether it still fits.

    Progress is the share of the budget that will be charged when the step ends; it is 1 for the step after which no
    further one fits, so that a schedule on progress reaches its final value at the stop.
    """

    def __init__(self, budget: Budget, totals: Totals, step_seconds: float | None = None) -> None:
        """``step_seconds``: a first guess at a step's charged seconds, until steps have been timed."""
        self.budget, self.totals = budget, totals
        self._recent: deque[float] = deque(maxlen=9)
        self._guess = step_seconds or 0.0

    def observe(self, step_seconds: float) -> None:
        """Take note of a finished step's charged seconds."""
        self._recent.append(step_seconds)

    @property
    def predicted_step_seconds(self) -> float:
        """Charged seconds that the next step will take: the median of the last nine."""
        return median(self._recent) if self._recent else self._guess

    def charged(self) -> float:
        """Spent so far, in the governing unit."""
        if self.budget.unit == "gpu-seconds":
            return self.totals.charged_s
        if self.budget.unit == "flops":
            return float(sum(self.totals.flops.values()))
        return float(self.totals.tokens["real"])

    def step_amount(self, cost: StepCost) -> float:
        """What a step of this cost will take of the budget."""
        if self.budget.unit == "gpu-seconds":
            return self.predicted_step_seconds
        return float(sum(cost.flops.values()) if self.budget.unit == "flops" else cost.real)

    def next_progress(self, cost: StepCost, *, in_flight: int = 0) -> float | None:
        """Progress of the next step, or None when it no longer fits.

        Args:
            in_flight: steps that were issued to the device but whose seconds are not known yet.
        """
        amount = self.step_amount(cost)
        spent = self.charged()
        if self.budget.unit == "gpu-seconds":
            spent += in_flight * amount
        if spent + amount > self.budget.amount:
            return None
        if spent + (2 + LAST_STEP_MARGIN) * amount > self.budget.amount:
            return 1.0
        return (spent + amount) / self.budget.amount


class Ledger:
    """``ledger.jsonl``: one line a step, and lines with ``event`` between them. Append-only; nothing is rewritten."""

    def __init__(self, path: Path, charge: Charge, totals: Totals, devices: int = 1, *, write: bool = True) -> None:
        """``devices``: seconds are charged once for each. ``write``: only rank 0 writes."""
        self.totals, self.charge, self.devices = totals, charge, devices
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)  # the last steps' lines
        self._path = path
        if write:
            drop_torn_line(path)
        self._file = open(path, "a", encoding="utf-8") if write else None  # noqa: SIM115 (closed by close())

    def step(
        self, cost: StepCost, phase_s: dict[str, float], *, progress: float, epoch: float, unique: int,
        joules: float | None, lr: float, loss: float, skipped: bool = False,
    ) -> float:  # fmt: skip
        """Charge a finished step, ``skipped`` or not; returns its charged GPU-seconds. ``phase_s`` is its seconds by phase."""
        t = self.totals
        charged = sum(phase_s.values()) * self.devices
        t.step += 1
        t.charged_s += charged
        for part in PARTS:
            t.flops[part] += cost.flops[part]
        t.tokens["real"] += cost.real
        t.tokens["predicted"] += cost.predicted
        t.tokens["unique"] = unique
        t.skipped += skipped
        t.skipped_in_a_row = t.skipped_in_a_row + 1 if skipped else 0
        if joules is not None:
            t.joules = (t.joules or 0.0) + joules
        self.recent.append({
            "step": t.step, "progress": progress, "charged_s": t.charged_s, "phase_s": phase_s, "flops": dict(t.flops),
            "tokens": dict(t.tokens), "epoch": epoch, "joules": t.joules, "lr": lr, "loss": loss,
            "skipped": t.skipped,
        })  # fmt: skip
        self._write(self.recent[-1])
        return charged

    def complete(self, recent: Sequence[dict[str, Any]]) -> None:
        """Write the last lines of a checkpoint that are missing: rank 0 died before it wrote them, and another rank saved."""
        written = {line["step"] for line in surviving_steps(self._path)} if recent else set()
        for line in recent:
            if line["step"] not in written:
                self._write(line)

    def event(self, name: str, seconds: float, *, in_loop: bool = True, **details: Any) -> None:
        """Record an event between steps, in wall-clock seconds, and charge it if the policy says so.

        After the last step nothing is charged: the budget is spent by then.
        """
        charged = name in CHARGED_EVENTS[self.charge] and (in_loop or name == "setup")
        if charged:
            self.totals.charged_s += seconds * self.devices
        line = {"event": name, "seconds": seconds, "step": self.totals.step, "charged": charged}
        self._write(line | {"charged_s": self.totals.charged_s} | details)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(to_line(line))
            self._file.flush()

    def sync(self) -> None:
        """Put every line on the disk: called before a checkpoint that relies on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def replayed_progress(path: Path) -> list[float]:
    """The progress of each step of a finished run's ledger, for a run that replays it instead of reading the clock.

    It need not rise at every step: after a step that was faster than predicted, the next one may be lower.

    Raises:
        ValueError: the file is no ledger of a run from its first step on.
    """
    remedy = "give the ledger.jsonl of a finished run"
    try:
        steps = surviving_steps(path) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise ValueError(f"--replay {path} cannot be read as a ledger: {remedy}") from error
    if steps is None:
        raise ValueError(f"--replay {path} is no file: {remedy}")
    if not steps:
        raise ValueError(f"--replay {path} holds no steps: {remedy}")
    for number, line in enumerate(steps, start=1):
        progress = line.get("progress")
        if line.get("step") != number or not isinstance(progress, int | float) or not 0 < progress <= 1:
            raise ValueError(f"--replay {path} lacks step {number} with a progress above 0 and at most 1: {remedy}")
    return [float(line["progress"]) for line in steps]


def surviving_steps(path: Path) -> list[dict[str, Any]]:
    """The step lines of a ledger that count: those after a crash's rewind point were lost and are left out.

    Raises:
        ValueError: a damaged file.
    """
    steps: list[dict[str, Any]] = []
    for line in read_jsonl(path):
        if line.get("event", "crash") != "crash":
            continue
        if not isinstance(line.get("step"), int):
            raise ValueError(f"{path} has a line without its step: restore the file or start a new run folder")
        if "event" in line:
            steps = [step for step in steps if step["step"] <= line["step"]]
        else:
            steps.append(line)
    return steps
