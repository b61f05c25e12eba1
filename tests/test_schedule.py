"""Schedules are functions of only the progress, and end where the budget does."""

import math
from itertools import pairwise

import pytest

from fastkd.schedule import learning_rate


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


def test_without_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0.0, 1.0, 0.0) == pytest.approx(1.0)


@pytest.mark.parametrize("warmup", [-0.1, 1.0, math.nan])
def test_refuses_a_warmup_that_is_no_share(warmup: float) -> None:
    with pytest.raises(ValueError, match="--warmup"):
        learning_rate(0.5, 1.0, warmup)
