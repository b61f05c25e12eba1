"""Quantities as people read them."""

import doctest

import pytest

from fastkd import quantities


def test_docstrings_tell_the_truth() -> None:
    assert doctest.testmod(quantities).failed == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0, "0"), (7, "7"), (12345, "12,345"), (0.5, "0.5000"), (9.99996, "10.00"), (-1234.56, "-1,235"),
     (1e12, "1e+12"), (float("nan"), "nan")],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert quantities.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 FLOP"), (999.0, "999.0 FLOP"), (1.5e15, "1.500 PFLOP"), (9.9996e5, "1.000 MFLOP"), (2e-4, "200.0 µFLOP")],
)
def test_scaled(value: float, text: str) -> None:
    assert quantities.scaled(value, "FLOP") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.400 s"), (42.0, "42.0 s"), (99.96, "1 min 40 s"), (3599.7, "1 h 00 min"), (18720, "5 h 12 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert quantities.duration(seconds) == text


@pytest.mark.parametrize(
    ("used", "total", "unit", "text"),
    [
        (29.7, 72.0, "gpu-seconds", "29.70 of 72.00 GPU-s"),
        (43200.0, 86400.0, "gpu-seconds", "12.00 of 24.00 GPU-h"),
        (2.5e11, 1e12, "flops", "0.2500 of 1.000 TFLOP"),
        (1e5, 2e5, "tokens", "100.0 of 200.0 k tokens"),
    ],
)
def test_spent(used: float, total: float, unit: str, text: str) -> None:
    assert quantities.spent(used, total, unit) == text


def test_unknown_unit_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'hours'.*gpu-seconds, flops, tokens"):
        quantities.budget_scale(1.0, "hours")


@pytest.mark.parametrize(("value", "text"), [(512, "512"), (81920, "81.92 k"), (1.6e6, "1.600 M"), (2.6e9, "2.600 B")])
def test_count(value: float, text: str) -> None:
    assert quantities.count(value) == text


def test_memory() -> None:
    assert quantities.memory(3 * 2**29) == "1.50 GiB"
    assert quantities.memory(2**20) == "1.00 MiB"
