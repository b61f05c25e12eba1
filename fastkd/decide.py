"""Rank 0's decisions before each step: the progress it belongs to, whether to stop, to validate and to save."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastkd import recipe
from fastkd.budget import VALIDATION_SHARE, Meter, StepCost, Totals
from fastkd.distributed import Decision
from fastkd.ledger import replayed_progress

if TYPE_CHECKING:
    from fastkd.files import Record
    from fastkd.recipe import Stage
    from fastkd.run_config import RunConfig


class Validations:
    """When to validate: ``wanted`` times in a budget, as long as all validations stay within a share of what is charged."""

    def __init__(self, wanted: int, devices: int) -> None:
        self._wanted, self._devices, self._reached = wanted, devices, 0
        self.count = 0  # within the loop
        self.seconds = 0.0  # of the last one

    def take_over(self, lines: Sequence[Record], step: int) -> None:
        """Go on after ``step`` of a ledger's lines. Validations after a step that was lost are to be made again, but
        what they took was spent."""
        validations = [line for line in lines if line.get("event") == "validation"]
        self.count = sum(line["step"] > 0 for line in validations)
        self.seconds = validations[-1]["seconds"] if validations else 0.0
        counted: list[Record] = []
        for line in lines:
            if line.get("event") == "crash":
                counted = [other for other in counted if other["step"] <= line["step"]]
            elif "progress" in line:
                counted.append(line)
        progress = max((line["progress"] for line in counted if line["step"] <= step), default=0.0)
        self._reached = int(progress * self._wanted)

    def due(self, progress: float, charged_s: float) -> bool:
        """Whether ``progress`` passed another multiple of 1/wanted, and one more validation is within its share."""
        reached = int(progress * self._wanted)
        if reached <= self._reached or progress >= 1:
            return False
        self._reached = reached
        cost = self.seconds * (self.count + 1) * self._devices
        return cost <= VALIDATION_SHARE * charged_s


class Checkpoints:
    """When to save: some minutes after the last checkpoint, if a step was issued since then."""

    def __init__(self, minutes: float) -> None:
        self._minutes = minutes
        self.saved()

    def saved(self) -> None:
        """A checkpoint has just been written, or training starts."""
        self._saved_at, self.unsaved = time.monotonic(), False

    def due(self) -> bool:
        """Whether to save now."""
        return self.unsaved and time.monotonic() - self._saved_at >= self._minutes * 60


class Decider:
    """The decisions of one run. A step's progress is what the meter says, or what a replayed ledger says."""

    def __init__(
        self, config: RunConfig, totals: Totals, stages: Sequence[Stage], step_cost: Callable[[int, int], StepCost],
        step_seconds: Sequence[float], validations: Validations,
    ) -> None:  # fmt: skip
        """``step_cost``: by a step's number and its stage's. ``step_seconds``: for each stage, a first guess at a step's
        charged seconds."""
        self._meters = [Meter(config.budget, totals, seconds) for seconds in step_seconds]
        self.stage = recipe.at(stages, totals.progress)  # that the run is in
        self.validations, self.checkpoints = validations, Checkpoints(config.checkpoint_minutes)
        self._totals, self._stages, self._step_cost = totals, stages, step_cost
        self._replayed = None if config.replay is None else replayed_progress(Path(config.replay))

    @property
    def meter(self) -> Meter:
        """Of the stage that the run is in."""
        return self._meters[self.stage]

    def decide(self, number: int, in_flight: Sequence[StepCost], *, interrupted: bool) -> Decision:
        """What to do before step ``number``; ``in_flight``: the costs of steps before it that are not charged yet."""
        progress = self._progress(number, in_flight)
        if progress is None:
            return Decision(0.0, stop=True)
        return Decision(
            progress,
            validate=self.validations.due(progress, self._totals.charged_s),
            checkpoint=self.checkpoints.due(),
            interrupted=interrupted,
        )

    def _progress(self, number: int, in_flight: Sequence[StepCost]) -> float | None:
        """The progress of a step, or None where it does not fit the budget."""
        if self._replayed is not None:
            return self._replayed[number] if number < len(self._replayed) else None
        return self._fitting(number, in_flight)

    def _fitting(self, like: int, in_flight: Sequence[StepCost]) -> float | None:
        """The progress of a step that costs what step ``like`` does, in the first stage, from the present one on, that it fits."""
        spent = self.meter.charged(in_flight)
        for number in range(self.stage, len(self._stages)):
            stage, cost = self._stages[number], self._step_cost(like, number)
            progress = self._meters[number].next_progress(cost, spent=spent, start=stage.start, end=stage.end)
            if progress is not None:
                return progress
        return None

    def is_spent(self, number: int, in_flight: Sequence[StepCost]) -> bool:
        """Whether step ``number`` would not fit if it cost what the one before it did.

        Asked before the text of that step is there: no part of the corpus is built for a step that will not run.
        """
        if self._replayed is not None:
            return number >= len(self._replayed)
        return self._fitting(number - 1, in_flight) is None
