"""Schedules: pure functions of progress in [0, 1], the share of the budget that is charged.

Nothing here reads a clock or a step number, so a schedule fits any budget in any unit, and a run can be replayed.
"""

from __future__ import annotations

FINAL_LR_FRACTION = 0.01


def learning_rate(progress: float, peak: float, warmup: float) -> float:
    """Linear warm-up over the first ``warmup`` share of the budget, then linear decay to 1% of the peak at progress 1.

    The end is not 0, so that the last step, which runs at progress 1, still counts.

    Raises:
        ValueError: ``warmup`` outside [0, 1).
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"--warmup is a share of the budget in [0, 1), got {warmup}")
    if progress < warmup:
        return peak * max(progress / warmup, FINAL_LR_FRACTION)
    decayed = (1 - progress) / (1 - warmup)
    return peak * (FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * max(decayed, 0.0))
