"""From the moments of a run, by tensor, to the sums that quantities are made of, by group.

What a sum is called, and what it is, stands in `analyze.quantities.SUMS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze.quantities import Sums, Values


def unclipping(clip: Values) -> Values:
    """What to multiply a stored gradient with: 1 / `clip`, and 1 where that is not known."""
    known = np.isfinite(clip) & (clip > 0)
    return 1.0 / np.where(known, clip, 1.0)


def gradient_sums(moments: Mapping[str, Values], decay: Values, scale: Values) -> dict[str, Values]:
    """Turn the stored moments of a gradient into the sums above, still by tensor.

    `moments` are those of `analyze.moments.MOMENTS`, each ``[..., P]``. `decay` is the coupled λ
    of each tensor and `scale` takes the stored gradient to g: both broadcast against them.
    """
    with np.errstate(all="ignore"):
        ge, gg = moments["ge"] * scale, moments["gg"] * scale**2
        he = ge + decay * moments["we"]
        hh = gg + 2 * decay * moments["gw"] * scale + decay**2 * moments["ww"]
        return {
            **position_sums(moments),
            "gg": gg,
            "ge": ge,
            "gw": moments["gw"] * scale,
            "g2e2": moments["g2e2"] * scale**2,
            # Without decay exactly the plain ones, even where w is NaN.
            "hh": np.where(decay == 0, gg, hh),
            "he": np.where(decay == 0, ge, he),
        }


def update_sums(moments: Mapping[str, Values]) -> dict[str, Values]:
    """Name the stored moments of an update as sums, by tensor ``[..., P]``."""
    return {**position_sums(moments), "uu": moments["gg"], "ue": moments["ge"]}


def position_sums(moments: Mapping[str, Values]) -> dict[str, Values]:
    """Name the stored moments of the weights alone as sums, by tensor ``[..., P]``."""
    return {name: moments[name] for name in ("ee", "we", "ww")}


def sum_groups(sums: Sums, groups: NDArray[Any], count: int) -> dict[str, Values]:
    """Add the tensors ``[..., P]`` of each group to ``[..., count]``; `groups` is int ``[P]``.

    Tensors are added in the order of the table, so equal inputs give equal bytes.
    """
    return {name: _add(value, groups, count) for name, value in sums.items()}


def adam_sums(
    dot: Values, dist: Values, grad: Values, known: NDArray[Any], groups: NDArray[Any], count: int
) -> dict[str, Values]:
    """Name the sums in Adam's metric and add them by group, ``[..., P]`` to ``[..., count]``.

    Tensors that are not `known` have no second moments and are left out, of ⟨g, e⟩ too; a group of
    none but these is NaN.
    """
    named = {"adam_ge": np.where(known, dot, 0.0), "adam_ee": dist, "adam_gg": grad}
    added = sum_groups({**named, "known": known.astype(np.float64)}, groups, count)
    measured = added.pop("known") > 0
    return {name: np.where(measured, value, np.nan) for name, value in added.items()}


def _add(values: Values, groups: NDArray[Any], count: int) -> Values:
    out = np.zeros((*values.shape[:-1], count))
    with np.errstate(all="ignore"):
        for tensor, group in enumerate(groups):
            out[..., group] += values[..., tensor]
    return out
