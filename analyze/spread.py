"""How values spread: their median and two quantiles, which are no confidence interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analyze.quantities import Values


@dataclass(frozen=True)
class Band:
    """The median of finite values and their quantiles at 10 % and 90 %; NaN where there are none.

    They tell how the rows spread, and are no confidence interval.
    """

    median: float
    low: float
    high: float


def band_of(values: Values) -> Band:
    """Summarise the finite ones among `values` ``[n]``."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Band(math.nan, math.nan, math.nan)
    low, high = np.quantile(values, [0.1, 0.9])
    return Band(float(np.median(values)), float(low), float(high))
