"""Student's t-distribution with any number of degrees of freedom: what `intervals` needs of it, without scipy."""

from __future__ import annotations

import math

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(128)
NEVER = 15.0  # with more than MANY degrees of freedom, |T| is above this once in 1e14 times
MANY = 30


def cdf(t: float, df: float) -> float:
    """P(T ≤ t) = 1/2 + c ∫₀^θ cos^(df−1) u du with θ = arctan(t/√df) and c = Γ((df+1)/2) / (√π Γ(df/2)), by Gauss and Legendre.

    Args:
        df: degrees of freedom, at least 1.
    """
    if df > MANY:
        t = min(max(t, -NEVER), NEVER)
    half = math.atan(t / math.sqrt(df)) / 2
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    area = half * float(WEIGHTS @ np.cos(half * (NODES + 1)) ** (df - 1))
    return min(1.0, max(0.0, 0.5 + scale * area))


def quantile(p: float, df: float) -> float:
    """The t for which P(T ≤ t) is p, by bisection.

    Args:
        p: from 0.5 to 0.999.
        df: degrees of freedom, at least 1.
    """
    low, high = 0.0, 400.0  # 318 for 0.999 and one degree of freedom
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(middle, df) < p else (low, middle)
    return high
