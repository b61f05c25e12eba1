"""Budget: how far along a run is, and when it stops.

A budget has one governing unit: ``gpu-seconds`` (summed over devices), ``flops`` or ``tokens``. The ledger records all
of them for every step, whichever governs, so that runs can be compared in either unit afterwards.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Literal

Unit = Literal["gpu-seconds", "flops", "tokens"]
Charge = Literal["loop", "compute", "all"]

VALIDATION_SHARE = 0.02  # of what is charged: validations that would cost more are left out
LAST_STEP_MARGIN = 0.25  # of a step: if less than this would remain after one more step, the step counts as the last
PARTS = ("student", "teacher", "loss")


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

    @classmethod
    def fits(cls, kept: object) -> bool:
        """Whether an object is what a checkpoint kept of totals; an older version kept fewer of them."""
        start = asdict(cls())
        return isinstance(kept, dict) and kept.keys() <= start.keys() and all(_alike(kept[k], start[k]) for k in kept)


def _alike(value: object, start: object) -> bool:
    if isinstance(start, dict):
        return isinstance(value, dict) and value.keys() == start.keys() and all(_alike(value[k], 0) for k in value)
    return isinstance(value, int | float) or (value is None and start is None)


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
