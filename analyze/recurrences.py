"""Linear recurrences, solved for all their steps at once.

Axes: S steps, K the size of the state, C columns that share their factors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def solve(factors: Floats, terms: Floats, start: Floats) -> Floats:
    """Give x_0 … x_S of x_{s+1} = A_s x_s + b_s: float64 ``[K, S + 1, C]``.

    `factors` is A ``[K, K, S]``, `terms` b ``[K, S, C]``, `start` x_0 ``[K, C]``. Two steps make
    one of the same form, x_{s+2} = A_{s+1} A_s x_s + (A_{s+1} b_s + b_{s+1}): every second state
    follows from half as many steps, and each of the others from the one before it. A state is made
    of the steps before it alone, so what is not finite reaches later ones only.
    """
    size, steps, columns = terms.shape
    states = np.empty((size, steps + 1, columns))
    if steps > 1:
        first, second = factors[..., 0 : steps - 1 : 2], factors[..., 1::2]
        both = np.einsum("ijs,jks->iks", second, first)
        term = _apply(second, terms[:, 0 : steps - 1 : 2]) + terms[:, 1::2]
        states[:, ::2] = solve(both, term, start)
    else:
        states[:, 0] = start
    before = states[:, 0:steps:2]
    states[:, 1::2] = _apply(factors[..., ::2], before) + terms[:, ::2]
    return states


def _apply(factors: Floats, states: Floats) -> Floats:
    """A_s x_s of every step, ``[K, S, C]``."""
    return np.asarray(np.einsum("ijs,jsc->isc", factors, states))
