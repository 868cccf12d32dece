"""One pass over gradient, weights and reference: the sums that every quantity follows from.

Axes: T saved steps, B batches, D coordinates, P tensors, R references. S segments are the pieces
into which the borders of tensors cut a run of coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze import checksums
from analyze.kernels import CHECK_GRADIENT, CHECK_WEIGHTS, KINDS, add_moments
from analyze.moment_table import GEOMETRY, MOMENTS, WITHOUT_GRADIENT
from capture.store.errors import UsageError

__all__ = [
    "GEOMETRY",
    "MOMENTS",
    "WITHOUT_GRADIENT",
    "SegmentMoments",
    "moment_kind",
    "segment_moments",
]

_CHECKSUM_START = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class SegmentMoments:
    """Moments of S segments.

    `sums` is float64 ``[S, 7]`` in the order of `MOMENTS`, NaN where a moment was not asked for.
    `nonfinite` is int64 ``[S]``: coordinates at which w, g or w* is NaN or infinite. It is counted
    where the sums of a segment are not all finite, and 0 elsewhere. Finite float32 data never
    overflow; finite float64 data whose squares do give an infinite sum with a count of 0.
    `weights_checksum` and `gradient_checksum` are the crc32c of the bytes passed over, `None`
    where they were not asked for or this processor has no fast way to them.
    """

    sums: NDArray[np.float64]
    nonfinite: NDArray[np.int64]
    weights_checksum: int | None = None
    gradient_checksum: int | None = None


def moment_kind(names: Sequence[str]) -> tuple[str, ...]:
    """Choose the smallest set of moments that one pass gives and that holds all of `names`."""
    for kind in (WITHOUT_GRADIENT, GEOMETRY, MOMENTS):
        if set(names) <= set(kind):
            return kind
    unknown = sorted(set(names) - set(MOMENTS))
    raise UsageError(f"there is no moment {unknown[0]!r}", fix=f"choose from {', '.join(MOMENTS)}")


def segment_moments(
    gradient: NDArray[Any] | None,
    weights: NDArray[Any],
    reference: NDArray[Any],
    cuts: NDArray[np.int64],
    *,
    moments: tuple[str, ...] = MOMENTS,
    check_weights: bool = False,
    check_gradient: bool = False,
) -> SegmentMoments:
    """Sum the moments of each segment of one run of N coordinates, in float64.

    `gradient`, `weights` and `reference` are float32 or float64 ``[N]``, gradient and weights of
    one dtype; `cuts` is int64 ``[S + 1]`` from 0 to N, not decreasing. `moments` is one of the
    tuples of `analyze.moment_table`; those named NEXT check no weights, and but for `NEXT_GRADIENT`
    no gradient. Without a gradient the moments are those of `WITHOUT_GRADIENT`. The result depends
    on the values and on `cuts` alone: every segment is summed in the same order from its first
    coordinate on.
    """
    if gradient is None:
        moments = WITHOUT_GRADIENT
    weights, reference = _plain(weights), _plain(reference)
    g = weights if gradient is None else _plain(gradient)
    check_gradient = check_gradient and gradient is not None
    sums = np.zeros((len(cuts) - 1, len(MOMENTS)))
    states = np.full(2, _CHECKSUM_START)
    check = CHECK_WEIGHTS * check_weights | CHECK_GRADIENT * check_gradient
    check = check if checksums.AVAILABLE else 0
    add_moments(KINDS[moments], check, g, weights, reference, cuts, sums, states)
    nonfinite = np.zeros(len(sums), np.int64)
    for segment in np.flatnonzero(~np.isfinite(sums).all(axis=1)):
        piece = slice(cuts[segment], cuts[segment + 1])
        finite = np.isfinite(weights[piece]) & np.isfinite(reference[piece]) & np.isfinite(g[piece])
        nonfinite[segment] = np.count_nonzero(~finite)
    sums[:, [name not in moments for name in MOMENTS]] = np.nan
    found = [int(state ^ _CHECKSUM_START) for state in states]
    return SegmentMoments(
        sums,
        nonfinite,
        found[0] if check & CHECK_WEIGHTS else None,
        found[1] if check & CHECK_GRADIENT else None,
    )


def _plain(values: NDArray[Any]) -> NDArray[Any]:
    """View contiguous, read-only: one compiled kernel per pair of dtypes, whatever comes in."""
    values = np.ascontiguousarray(values).view()
    values.flags.writeable = False
    return values
