"""Quantities as people read them: durations, FLOPs, tokens, bytes, each with its unit."""

import math

UNITS = ("gpu-seconds", "flops", "tokens")

_SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"))
_COUNT = ((1e9, " B"), (1e6, " M"), (1e3, " k"))


def number(value: float, digits: int = 4) -> str:
    """`value` to `digits` significant digits, thousands separated, an exponent where that is shorter.

    >>> number(86400.4), number(0.013249), number(3e-05), number(71.0)
    ('86,400', '0.01325', '3e-05', '71.00')
    """
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) < 1e9:
        return f"{value:,}"
    size = abs(float(f"{value:.{digits}g}"))
    if size == 0:
        return "0"
    if not 1e-3 <= size < 1e9:
        return f"{value:.{digits}g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"


def aligned(value: float, largest: float, digits: int = 4) -> str:
    """`value` with as many decimals as `largest` needs for `digits` digits: for columns of one unit.

    >>> aligned(0.0712, 35.63), aligned(35.63, 35.63), aligned(412.4, 57507.0)
    ('0.07', '35.63', '412')
    """
    whole = math.floor(math.log10(abs(largest))) if largest else 0
    text = f"{value:,.{max(0, digits - 1 - whole)}f}"
    return text.removeprefix("-") if not text.strip("-0.") else text


def scaled(value: float, unit: str) -> str:
    """`value` with an SI prefix on `unit`: 1.234 PFLOP, 12.00 kJ, 0 J."""
    for factor, prefix in (*_SI, *_SMALL):
        if abs(value) >= factor * 0.9995:
            return f"{number(value / factor)} {prefix}{unit}"
    return f"{number(value)} {unit}"


def count(value: float) -> str:
    """A count of tokens or parameters: 512, 81.92 k, 1.600 M, 2.600 B."""
    for factor, suffix in _COUNT:
        if abs(value) >= factor * 0.9995:
            return f"{number(value / factor)}{suffix}"
    return f"{value:,.0f}"


def memory(size_bytes: float) -> str:
    """Bytes as MiB or GiB."""
    gib = size_bytes / 2**30
    return f"{number(gib, 3)} GiB" if gib >= 1 else f"{number(size_bytes / 2**20, 3)} MiB"


def duration(seconds: float) -> str:
    """Seconds as 0.412 s, 42.0 s, 3 min 20 s, 5 h 12 min."""
    if seconds < 99.95:
        return f"{number(seconds, 3)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def spent(used: float, total: float, unit: str) -> str:
    """`used` of `total` in one scale: "29.70 of 72.00 GPU-s", "3.210 of 24.00 GPU-h"."""
    factor, name = budget_scale(total, unit)
    return f"{number(used / factor)} of {number(total / factor)} {name}"


def budget_scale(total: float, unit: str) -> tuple[float, str]:
    """Divisor and name that make a budget of `total` `unit` readable.

    Raises:
        ValueError: `unit` is no budget unit.
    """
    if unit == "gpu-seconds":
        return (3600.0, "GPU-h") if total >= 3600 else (1.0, "GPU-s")
    if unit not in UNITS:
        raise ValueError(f"unknown budget unit {unit!r}: one of {', '.join(UNITS)}")
    name = "FLOP" if unit == "flops" else "tokens"
    for factor, prefix in _SI if unit == "flops" else _COUNT:
        if total >= factor:
            return factor, f"{prefix}{name}" if unit == "flops" else f"{prefix.strip()} {name}"
    return 1.0, name
