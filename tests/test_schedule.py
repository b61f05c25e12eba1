"""Schedules are functions of only the progress, and end where the budget does."""

import math
from itertools import pairwise

import pytest

from fastkd.schedule import FINAL_LR_FRACTION, Schedule, learning_rate


def test_rises_to_the_peak_then_falls_to_one_percent() -> None:
    peak = 6e-4
    assert learning_rate(0.03, peak, 0.06) == pytest.approx(peak / 2)
    assert learning_rate(0.06, peak, 0.06) == pytest.approx(peak)
    assert learning_rate(0.53, peak, 0.06) == pytest.approx(peak * (0.01 + 0.99 / 2))
    assert learning_rate(1.0, peak, 0.06) == pytest.approx(peak * 0.01)


def test_is_positive_and_continuous() -> None:
    values = [learning_rate(i / 1000, 1.0, 0.06) for i in range(1001)]
    assert all(v > 0 for v in values)
    assert max(abs(a - b) for a, b in pairwise(values)) < 0.02
    assert max(values) == pytest.approx(1.0)


def test_wsd_stays_at_the_peak_until_it_decays_over_the_last_fifth() -> None:
    def rate(progress: float, warmup: float = 0.06) -> float:
        return learning_rate(progress, 2.0, warmup, "wsd")

    assert rate(0.0) == 2.0 * FINAL_LR_FRACTION and rate(0.03) == pytest.approx(1.0)
    assert rate(0.06) == rate(0.5) == rate(0.8) == pytest.approx(2.0)
    assert rate(0.85) == pytest.approx(2.0 * (0.01 + 0.99 * 0.5))  # a quarter of the decay, whose root is one half
    assert rate(1.0) == rate(1.1) == 2.0 * FINAL_LR_FRACTION == learning_rate(1.0, 2.0, 0.06)
    values = [rate(i / 1000) for i in range(1001)]
    assert all(a >= b for a, b in pairwise(values[60:])) and min(values) > 0
    for edge in (0.06, 0.8):  # continuous, though the root falls steeply at first
        assert rate(edge - 1e-9) == pytest.approx(rate(edge + 1e-9), rel=1e-3)
    assert 2.0 == rate(0.9, warmup=0.9) > rate(0.95, warmup=0.9) > rate(1.0, warmup=0.9) == 2.0 * FINAL_LR_FRACTION


def test_linear_is_what_it_is_without_a_name() -> None:
    for progress in (0.0, 0.03, 0.06, 0.5, 1.0):
        assert learning_rate(progress, 6e-4, 0.06, "linear") == learning_rate(progress, 6e-4, 0.06)


def test_without_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0.0, 1.0, 0.0) == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["linear", "wsd"])
@pytest.mark.parametrize("warmup", [-0.1, 1.0, math.nan])
def test_refuses_a_warmup_that_is_no_share(warmup: float, schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="--warmup"):
        learning_rate(0.5, 1.0, warmup, schedule)
