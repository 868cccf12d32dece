"""What γ(t, s) would be if all gradients of the path were orthogonal: its null.

The null of a gradient against a later iterate w_s is that of `analyze.controls` with w* = w_s: with
plain SGD it falls as 1/√(s - t), a line of slope -½ on log-log axes. Against an earlier iterate it
is 0: the way from there to w_t was made of other gradients.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from analyze.optimizer import own_path
from analyze.quantities import Values
from analyze.sums import sum_groups
from capture.store import Run

Integers = NDArray[np.int64]

NULL_SUMS = ("null_ge", "null_gg", "null_ee")


def pair_null(
    run: Run, steps: Integers, pairs: Integers, groups: Integers
) -> tuple[Mapping[str, Values], str]:
    """Compute ⟨g_i, w_i - w_j⟩₀, ‖g_i‖² and ‖w_i - w_j‖²₀ of minibatch gradients: each ``[N, K]``.

    `steps` ``[T]`` are those of the rows, `pairs` ``[N, 2]`` rows i < j, `groups` the group of each
    tensor ``[P]``. Nothing where there is no null; and what it rests on, or why there is none.
    NaN where the every-step scalars do not reach, or are not finite on the way.
    """
    path = own_path(run)
    if isinstance(path, str):
        return {}, path
    count = int(groups.max()) + 1
    found = {name: np.full((len(pairs), count), np.nan) for name in NULL_SUMS}
    broken = path.unsound()
    last = len(path.grad_norms) if broken is None else broken
    for row in np.unique(pairs[:, 1]):
        end = int(steps[row])
        if end <= last:
            here = np.flatnonzero(pairs[:, 1] == row)
            null = path.null(steps[pairs[here, 0]], end)
            parts = (null.dot, null.grad, null.dist)
            sums = sum_groups(dict(zip(NULL_SUMS, parts, strict=True)), groups, count)
            for name, values in sums.items():
                found[name][here] = values
    text = path.assumption()
    return found, text if broken is None else f"{text}; none beyond step {broken}, not finite there"
