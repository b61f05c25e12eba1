"""The meter stops neither early nor late."""

import math
import random
from pathlib import Path

import pytest
from ledgers import COST, charge_step

from fastkd.budget import Budget, Meter, StepCost, Totals
from fastkd.ledger import Ledger


def spend(budget: Budget, seconds_of_a_step: list[float], tmp_path: Path) -> tuple[Totals, list[float]]:
    totals = Totals()
    meter, progress = Meter(budget, totals, step_seconds=1.0), []
    ledger = Ledger(tmp_path / "ledger.jsonl", "loop", totals)
    for seconds in seconds_of_a_step:
        now = meter.next_progress(COST)
        if now is None:
            break
        progress.append(now)
        meter.observe(charge_step(ledger, seconds))
    ledger.close()
    return totals, progress


@pytest.mark.parametrize("seed", range(10))
def test_gpu_seconds_end_within_a_step_of_the_budget(seed: int, tmp_path: Path) -> None:
    jitter = random.Random(seed)
    budget = Budget("gpu-seconds", 40 + 37 * seed)
    totals, progress = spend(budget, [jitter.uniform(0.97, 1.03) for _ in range(1000)], tmp_path)
    assert -0.1 <= budget.amount - totals.charged_s <= 1.05
    assert progress[-1] == 1.0
    assert all(0 < p <= 1 for p in progress)
    assert progress == sorted(progress)


@pytest.mark.parametrize(("unit", "step"), [("flops", 100), ("tokens", 4000)])
def test_flops_and_tokens_are_never_exceeded_and_leave_under_a_step(unit, step, tmp_path: Path) -> None:
    budget = Budget(unit, 17.5 * step)
    totals, progress = spend(budget, [1.0] * 100, tmp_path)
    assert totals.step == 17
    assert progress[-1] == 1.0
    assert progress[0] == pytest.approx(1 / 17.5)


def test_a_budget_under_one_step_allows_none() -> None:
    assert Meter(Budget("flops", 99), Totals()).next_progress(COST) is None
    assert Meter(Budget("gpu-seconds", 0.5), Totals(), step_seconds=1.0).next_progress(COST) is None


@pytest.mark.parametrize(("unit", "step"), [("gpu-seconds", 1), ("flops", 100), ("tokens", 4000)])
def test_steps_on_the_device_count_before_they_are_charged(unit, step, tmp_path: Path) -> None:
    budget, charged = Budget(unit, 6.5 * step), Totals()
    ahead, behind = Meter(budget, Totals(), step_seconds=1.0), Meter(budget, charged, step_seconds=1.0)
    ledger = Ledger(tmp_path / "ledger.jsonl", "loop", charged)
    for count in range(7):
        found, expected = ahead.next_progress(COST, spent=ahead.charged([COST] * count)), behind.next_progress(COST)
        assert found == (pytest.approx(expected) if unit == "gpu-seconds" else expected)  # others repeat to the bit
        charge_step(ledger, 1.0)
    ledger.close()


def test_a_part_of_the_budget_ends_and_the_next_one_begins_above_it() -> None:
    meter = Meter(Budget("tokens", 10 * 4000), Totals())
    spent, parts = [], []
    for start, end in ((0.0, 0.55), (0.55, 1.0)):
        while (progress := meter.next_progress(COST, spent=meter.charged(spent), start=start, end=end)) is not None:
            spent.append(COST)
            parts.append(progress)
    assert len(spent) == 10 and parts == sorted(parts)
    assert parts[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.55]) and parts[5] > 0.55 and parts[-1] == 1.0
    cheap = StepCost(COST.flops, real=1000, predicted=150)
    assert meter.next_progress(cheap, spent=meter.charged([COST] * 5), start=0.55) == math.nextafter(0.55, 1)
