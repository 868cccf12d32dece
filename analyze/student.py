"""Quantiles of Student's t and of the normal distribution, without scipy.

Loading scipy for these two takes longer than measuring a run that was summed before. Sources:
Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5 (the expansion in 1/ν) and 26.7.1
(the tail as an incomplete beta function); NIST Digital Library of Mathematical Functions, 8.17.22
(its continued fraction), summed as Lentz does (Applied Optics 15, 1976).
"""

from __future__ import annotations

import math
from functools import cache
from itertools import count
from statistics import NormalDist

# From here on the expansion is right to the last digits, for any level in use.
_MANY_DEGREES = 1000.0
_ENOUGH = 1e-15
# Newton's steps double the digits: after one as small as this all are there.
_CLOSE = 1e-9


def normal_quantile(level: float) -> float:
    """Distance from the mean, in standard deviations, that a share `level` stays within."""
    return -NormalDist().inv_cdf((1 - level) / 2)


@cache
def student_quantile(level: float, degrees: float) -> float:
    """The same for Student's t with ν `degrees` of freedom, not necessarily whole."""
    z = normal_quantile(level)
    found = max(z, _expansion(z, degrees))
    if z <= 0 or degrees >= _MANY_DEGREES:
        return found
    # Newton's steps on log P(|T| > t) over log t: falling and concave, so they never go astray.
    for _ in range(100):
        beyond = _beyond(found, degrees)
        slope = 2 * found * _density(found, degrees) / beyond
        step = math.log(beyond / (1 - level)) / slope
        found *= math.exp(step)
        if abs(step) < _CLOSE:
            break
    return found


def _expansion(z: float, degrees: float) -> float:
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def _density(t: float, degrees: float) -> float:
    power = -(degrees + 1) / 2 * math.log1p(t * t / degrees)
    return math.exp(power - _log_beta(degrees / 2, 0.5)) / math.sqrt(degrees)


def _beyond(t: float, degrees: float) -> float:
    """P(|T| > t)."""
    inner, outer = degrees / (degrees + t * t), t * t / (degrees + t * t)
    a = degrees / 2
    if inner < (a + 1) / (a + 2.5):
        return _incomplete_beta(inner, outer, a, 0.5)
    return 1 - _incomplete_beta(outer, inner, 0.5, a)


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """I_x(a, b), `rest` being 1 - x; the fraction converges for x < (a + 1) / (a + b + 2)."""
    front = math.exp(a * math.log(x) + b * math.log(rest) - _log_beta(a, b)) / a
    above, below = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = below
    for m in count(1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            below, above = 1 / (1 + term * below), 1 + term / above
            fraction *= above * below
        if abs(above * below - 1) < _ENOUGH:
            break
    return front * fraction


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
