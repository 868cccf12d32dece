"""The compiled loops under tiles: rows to float64, steps between them, and single pairs of rows.

Axes: N pairs, B batches, n rows, c coordinates of one tile. Rows lie apart in memory, each in its
own file: they are given by the addresses of the tile's first coordinate, uint64 ``[n]``, all of
the dtype of the empty array `like`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba import njit, types
from numba.extending import intrinsic


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
def load_rows(addresses, like, out):  # type: ignore[no-untyped-def]
    """Copy the coordinates at each address to `out`, float64 ``[n, c]``."""
    for row in range(addresses.size):
        target = out[row]
        values = carray(_at(addresses[row], like), target.size)
        for k in range(target.size):
            target[k] = values[k]


@_compile
def load_steps(addresses, like, out):  # type: ignore[no-untyped-def]
    """Write coordinates at each address less those at the one before to `out` ``[n - 1, c]``."""
    for row in range(addresses.size - 1):
        target = out[row]
        before = carray(_at(addresses[row], like), target.size)
        after = carray(_at(addresses[row + 1], like), target.size)
        for k in range(target.size):
            target[k] = types.float64(after[k]) - types.float64(before[k])


@_compile
def add_pairs(w, g, pairs, sums):  # type: ignore[no-untyped-def]
    """Add to `sums` ``[N, B, 5]`` what `analyze.gram.SUMS` lists, of each pair and batch.

    `w` is float64 ``[n, c]``, `g` ``[B, n, c]``, both contiguous; `pairs` int64 ``[N, 2]``.
    """
    for pair in range(pairs.shape[0]):
        first, second = pairs[pair, 0], pairs[pair, 1]
        w_first, w_second = w[first], w[second]
        for batch in range(g.shape[0]):
            g_first, g_second = g[batch, first], g[batch, second]
            dd = gg = gd = dg = hh = 0.0
            for k in range(w.shape[1]):
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
def add_distances(w, pairs, sums):  # type: ignore[no-untyped-def]
    """Add to `sums` ``[N, 1, 1]`` the squared distance of each pair of rows of `w` ``[n, c]``."""
    for pair in range(pairs.shape[0]):
        first, second = w[pairs[pair, 0]], w[pairs[pair, 1]]
        dd = 0.0
        for k in range(w.shape[1]):
            d = first[k] - second[k]
            dd += d * d
        sums[pair, 0, 0] += dd
