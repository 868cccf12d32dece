"""One pass over gradient, weights and reference: the sums that every quantity follows from.

Axes: T saved steps, B batches, D coordinates, P tensors, R references. S segments are the pieces
into which the borders of tensors cut a run of coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from analyze import checksums
from capture.store.errors import UsageError

# ⟨g,e⟩ ‖g‖² ‖e‖² Σg²e² ⟨g,w⟩ ⟨w,e⟩ ‖w‖², with e = w - w*.
MOMENTS = ("ge", "gg", "ee", "g2e2", "gw", "we", "ww")
GEOMETRY = ("ge", "gg", "ee")
WITHOUT_GRADIENT = ("ee", "we", "ww")

# Coordinates that are checked and summed before going on: three such pieces fit the second-level
# cache. Part of the result, since sums depend on their order: never derive it from the machine.
TILE = 32_768

_ALL, _GEOMETRY, _WITHOUT_GRADIENT = 0, 1, 2
_KINDS = {MOMENTS: _ALL, GEOMETRY: _GEOMETRY, WITHOUT_GRADIENT: _WITHOUT_GRADIENT}
_CHECK_WEIGHTS, _CHECK_GRADIENT = 1, 2
_CHECKSUM_START = np.uint64(0xFFFFFFFF)


def _compile(function: Callable[..., Any]) -> Any:
    """Compile with leave to reorder sums and fuse products, not to assume that NaN is absent."""
    options: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "nogil": True}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep the compiled kernels in: compile them each time
        return njit(**options)(function)


@_compile
def _add_geometry(g, w, reference, sums):  # type: ignore[no-untyped-def]
    ge = gg = ee = 0.0
    for i in range(w.size):
        gradient = np.float64(g[i])
        error = np.float64(w[i]) - np.float64(reference[i])
        ge += gradient * error
        gg += gradient * gradient
        ee += error * error
    sums[0] += ge
    sums[1] += gg
    sums[2] += ee


@_compile
def _add_all(g, w, reference, sums):  # type: ignore[no-untyped-def]
    ge = gg = ee = g2e2 = gw = we = ww = 0.0
    for i in range(w.size):
        gradient = np.float64(g[i])
        weight = np.float64(w[i])
        error = weight - np.float64(reference[i])
        product = gradient * error
        ge += product
        gg += gradient * gradient
        ee += error * error
        g2e2 += product * product
        gw += gradient * weight
        we += weight * error
        ww += weight * weight
    sums[0] += ge
    sums[1] += gg
    sums[2] += ee
    sums[3] += g2e2
    sums[4] += gw
    sums[5] += we
    sums[6] += ww


@_compile
def _add_without_gradient(w, reference, sums):  # type: ignore[no-untyped-def]
    ee = we = ww = 0.0
    for i in range(w.size):
        weight = np.float64(w[i])
        error = weight - np.float64(reference[i])
        ee += error * error
        we += weight * error
        ww += weight * weight
    sums[2] += ee
    sums[5] += we
    sums[6] += ww


@_compile
def _pass(kind, check, g, w, reference, cuts, sums, states):  # type: ignore[no-untyped-def]
    """Go through a chunk tile by tile: checksums first, then the sums of every segment in it."""
    scratch = np.empty(32, np.uint64)
    place = types.uint64(scratch.ctypes.data)
    weights_at, gradient_at = types.uint64(w.ctypes.data), types.uint64(g.ctypes.data)
    segment = 0
    for start in range(0, w.size, TILE):
        stop = min(start + TILE, w.size)
        skip, nbytes = types.uint64(start * w.itemsize), (stop - start) * w.itemsize
        if check & _CHECK_WEIGHTS:
            states[0] = checksums.update(states[0], weights_at + skip, nbytes, place)
        if check & _CHECK_GRADIENT:
            states[1] = checksums.update(states[1], gradient_at + skip, nbytes, place)
        position = start
        while position < stop:
            while cuts[segment + 1] <= position:
                segment += 1
            end = min(stop, cuts[segment + 1])
            piece, total = slice(position, end), sums[segment]
            if kind == _GEOMETRY:
                _add_geometry(g[piece], w[piece], reference[piece], total)
            elif kind == _ALL:
                _add_all(g[piece], w[piece], reference[piece], total)
            else:
                _add_without_gradient(w[piece], reference[piece], total)
            position = end


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
    one dtype; `cuts` is int64 ``[S + 1]`` from 0 to N, not decreasing. Without a gradient the
    moments are those of `WITHOUT_GRADIENT`. The result depends on the values and on `cuts` alone:
    sums run over tiles of `TILE` coordinates from the first one on.
    """
    if gradient is None:
        moments = WITHOUT_GRADIENT
    weights, reference = _plain(weights), _plain(reference)
    g = weights if gradient is None else _plain(gradient)
    check_gradient = check_gradient and gradient is not None
    sums = np.zeros((len(cuts) - 1, len(MOMENTS)))
    states = np.full(2, _CHECKSUM_START)
    check = _CHECK_WEIGHTS * check_weights | _CHECK_GRADIENT * check_gradient
    check = check if checksums.AVAILABLE else 0
    _pass(_KINDS[moments], check, g, weights, reference, cuts, sums, states)
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
        found[0] if check & _CHECK_WEIGHTS else None,
        found[1] if check & _CHECK_GRADIENT else None,
    )


def _plain(values: NDArray[Any]) -> NDArray[Any]:
    """View contiguous, read-only: one compiled kernel per pair of dtypes, whatever comes in."""
    values = np.ascontiguousarray(values).view()
    values.flags.writeable = False
    return values
