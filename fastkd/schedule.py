"""Schedules: pure functions of progress in [0, 1], the share of the budget that is charged.

Nothing here reads a clock or a step number, so a schedule fits any budget in any unit, and a run can be replayed.
"""

from __future__ import annotations

from math import sqrt
from typing import Literal

FINAL_LR_FRACTION = 0.01
STABLE_UNTIL = 0.8  # of the progress: the schedule wsd decays over the last 20%
Schedule = Literal["linear", "wsd"]


def learning_rate(progress: float, peak: float, warmup: float, schedule: Schedule = "linear") -> float:
    """The learning rate at a progress: linear warm-up over the first ``warmup`` share, then a decay to 1% of the peak.

    ``linear`` decays from the warm-up's end to progress 1. ``wsd`` (warm-up, stable, decay) keeps the peak until 80% and
    decays by 1 − √((n − N₀) / (N − N₀)), n from N₀ = 80% to N = 100% (Hägele et al. 2024, arXiv 2405.18392).
    The end is not 0, so that the last step, which runs at progress 1, still counts.

    Raises:
        ValueError: ``warmup`` outside [0, 1).
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"--warmup is a share of the budget in [0, 1), got {warmup}")
    if progress < warmup:
        return peak * max(progress / warmup, FINAL_LR_FRACTION)
    left = 1 - sqrt(_decayed(progress, warmup)) if schedule == "wsd" else (1 - progress) / (1 - warmup)
    return peak * (FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * max(left, 0.0))


def _decayed(progress: float, warmup: float) -> float:
    """How much of the decay of ``wsd`` is over, from 0 to 1: it begins at 80%, or where a longer warm-up ends."""
    begins = max(STABLE_UNTIL, warmup)
    return min(max((progress - begins) / (1 - begins), 0.0), 1.0)
