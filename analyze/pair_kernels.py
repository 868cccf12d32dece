"""The compiled loops over rows: to float64, a tile of coordinates at a time, and multiplied there.

Axes: N pairs, B batches, n rows, c coordinates of one tile. Rows lie apart in memory, each in its
own file: they are given by the address of the first coordinate of each, uint64 ``[n]`` or
``[B, n]``, all of the dtype of the empty array `like` and `count` coordinates long. `room` is
float64 memory for the tile: rows that were a power of two apart would share a few places of the
cache, so each is longer by `LANES`.

(Numba keeps compiled kernels and looks for changes in this file alone: after a change in
`row_products.py`, touch this one.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from analyze.row_products import LANES, add_products


def _compile(function: Callable[..., Any]) -> Any:
    """Compile with leave to reorder sums and fuse products, not to assume that NaN is absent."""
    options: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "nogil": True}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep the compiled kernels in: compile them each time
        return njit(**options)(function)


# Numba has no types for these.
_numba: Any = numba
carray: Any = _numba.carray


@intrinsic
def _pointer(typing, address, like):  # type: ignore[no-untyped-def]
    """An address as a pointer to the dtype of `like`."""
    result = _numba.types.CPointer(like.dtype)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(address, like), generate


_at: Any = _pointer


@_compile
def _load_rows(addresses, like, low, width, length, out):  # type: ignore[no-untyped-def]
    """Copy `width` coordinates from `low` on to `out` ``[n, …]``; zeros beyond, to `length`."""
    skip = types.uint64(low * like.itemsize)
    for row in range(addresses.size):
        target = out[row]
        values = carray(_at(addresses[row] + skip, like), width)
        for k in range(width):
            target[k] = values[k]
        for k in range(width, length):
            target[k] = 0.0


@_compile
def _load_steps(addresses, like, low, width, length, out):  # type: ignore[no-untyped-def]
    """Write coordinates of each row less those of the row before to `out`, as `_load_rows`."""
    skip = types.uint64(low * like.itemsize)
    for row in range(addresses.size - 1):
        target = out[row]
        before = carray(_at(addresses[row] + skip, like), width)
        after = carray(_at(addresses[row + 1] + skip, like), width)
        for k in range(width):
            target[k] = types.float64(after[k]) - types.float64(before[k])
        for k in range(width, length):
            target[k] = 0.0


@_compile
def _filled(width):  # type: ignore[no-untyped-def]
    return (width + LANES - 1) // LANES * LANES


@_compile
def add_chain(weights, gradients, like, count, room, steps, along, crossed):  # type: ignore[no-untyped-def]
    """Add products of the steps d between weights and of gradients, of all rows with all.

    To `steps` ⟨d_k, d_l⟩ for k ≤ l, to `along` ``[B, …]`` ⟨d_k, g_i⟩, to `crossed` ``[B, …]``
    ⟨g_i, g_j⟩ for i ≤ j. All have n rows, filled up to a multiple of `PANEL`, of which the last for
    d and those that fill up mean nothing. `room` is ``[2, n, c + LANES]``, zeros.
    """
    tile = room.shape[2] - LANES
    d, g = room[0], room[1]
    for low in range(0, count, tile):
        width = min(tile, count - low)
        length = _filled(width)
        _load_steps(weights, like, low, width, length, d)
        add_products(d, d, length, True, steps)
        for batch in range(gradients.shape[0]):
            _load_rows(gradients[batch], like, low, width, length, g)
            add_products(d, g, length, False, along[batch])
            add_products(g, g, length, True, crossed[batch])


@_compile
def add_batches(gradients, like, count, room, crossed):  # type: ignore[no-untyped-def]
    """Add ⟨g_b, g_c⟩ of each row for b ≤ c to `crossed` ``[n, B, B]``.

    B is filled up to a multiple of `PANEL` there and in `room` ``[B, c + LANES]``, zeros.
    """
    tile = room.shape[1] - LANES
    for low in range(0, count, tile):
        width = min(tile, count - low)
        length = _filled(width)
        for row in range(gradients.shape[1]):
            _load_rows(gradients[:, row], like, low, width, length, room)
            add_products(room, room, length, True, crossed[row])


@_compile
def add_pairs(weights, gradients, like, count, room, pairs, sums):  # type: ignore[no-untyped-def]
    """Add to `sums` ``[N, B, 5]`` what `analyze.chain.SUMS` lists, of each pair and batch.

    `pairs` is int64 ``[N, 2]``; `room` is ``[1 + B, n, c + LANES]``.
    """
    tile = room.shape[2] - LANES
    for low in range(0, count, tile):
        width = min(tile, count - low)
        _load_rows(weights, like, low, width, width, room[0])
        for batch in range(gradients.shape[0]):
            _load_rows(gradients[batch], like, low, width, width, room[1 + batch])
        for pair in range(pairs.shape[0]):
            first, second = pairs[pair, 0], pairs[pair, 1]
            w_first, w_second = room[0, first], room[0, second]
            for batch in range(gradients.shape[0]):
                g_first, g_second = room[1 + batch, first], room[1 + batch, second]
                dd = gg = gd = dg = hh = 0.0
                for k in range(width):
                    d = w_first[k] - w_second[k]
                    h = g_first[k] - g_second[k]
                    dd += d * d
                    gg += g_first[k] * g_second[k]
                    gd += g_first[k] * d
                    dg -= g_second[k] * d
                    hh += h * h
                sums[pair, batch, 0] += dd
                sums[pair, batch, 1] += gg
                sums[pair, batch, 2] += gd
                sums[pair, batch, 3] += dg
                sums[pair, batch, 4] += hh


@_compile
def add_distances(weights, like, count, room, pairs, sums):  # type: ignore[no-untyped-def]
    """Add to `sums` ``[N, 1, 1]`` the squared distance of each pair; `room` as in `add_pairs`."""
    tile = room.shape[2] - LANES
    for low in range(0, count, tile):
        width = min(tile, count - low)
        _load_rows(weights, like, low, width, width, room[0])
        for pair in range(pairs.shape[0]):
            first, second = room[0, pairs[pair, 0]], room[0, pairs[pair, 1]]
            dd = 0.0
            for k in range(width):
                d = first[k] - second[k]
                dd += d * d
            sums[pair, 0, 0] += dd


@_compile
def find_finite(addresses, like, count, finite):  # type: ignore[no-untyped-def]
    """Say of each row whether all of its coordinates are finite: bool ``[n]``."""
    for row in range(addresses.size):
        values = carray(_at(addresses[row], like), count)
        finite[row] = True
        for k in range(count):
            if not np.isfinite(values[k]):
                finite[row] = False
                break
