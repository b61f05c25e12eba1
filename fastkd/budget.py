"""Budget: how far along a run is, and when it stops.

A budget has one governing unit: ``gpu-seconds`` (summed over devices), ``flops`` or ``tokens``. The ledger records all
of them for every step, whichever governs, so that runs can be compared in either unit afterwards.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
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
    progress: float = 0.0  # of the last step
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

    def charged(self, in_flight: Sequence[StepCost] = ()) -> float:
        """Spent so far, in the governing unit, with the steps that were issued to the device but are not charged yet."""
        if self.budget.unit == "gpu-seconds":
            return self.totals.charged_s + len(in_flight) * self.predicted_step_seconds
        if self.budget.unit == "flops":
            return float(sum(self.totals.flops.values()) + sum(sum(cost.flops.values()) for cost in in_flight))
        return float(self.totals.tokens["real"] + sum(cost.real for cost in in_flight))

    def step_amount(self, cost: StepCost) -> float:
        """What a step of this cost will take of the budget."""
        if self.budget.unit == "gpu-seconds":
            return self.predicted_step_seconds
        return float(sum(cost.flops.values()) if self.budget.unit == "flops" else cost.real)

    def next_progress(
        self, cost: StepCost, *, spent: float | None = None, start: float = 0.0, end: float = 1.0
    ) -> float | None:
        """Progress of the next step, or None when it no longer fits.

        Args:
            spent: as `charged` says it, with steps in flight if there are any; None: there are none.
            start, end: the part of the budget that the step must fit, in progress. It is ``end`` for the last one that
                does, and above ``start`` for the first one, even if the part before left more than a step's amount.
        """
        amount, most = self.step_amount(cost), end * self.budget.amount
        spent = self.charged() if spent is None else spent
        if spent + amount > most:
            return None
        if spent + (2 + LAST_STEP_MARGIN) * amount > most:
            return end
        return max((spent + amount) / self.budget.amount, math.nextafter(start, 1.0) if start else 0.0)
