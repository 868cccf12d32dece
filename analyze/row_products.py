"""The compiled loop that multiplies rows with rows: dot products of float64, a panel at a time.

A panel is a few rows times a few others: as many products as the registers hold sums for, so that
each number is used several times once it is loaded. The rows are taken as they lie, where BLAS
first copies them into an order of its own: with few rows and many coordinates that costs as much as
the products.

Each product has `LANES` running sums, of every `LANES`-th coordinate, which are added by halves at
the end. That is so in panels of any size: the bytes of a product depend neither on the processor's
registers nor on the other rows.

Axes: n and m rows, c coordinates.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Part of the result: never derive it from the machine.
LANES = 8

_build: Any = cgutils
_DOUBLE, _INT32, _INT64 = ir.DoubleType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_DOUBLE, LANES)


def _panel_rows() -> int:
    """Rows of a panel: its sums and operands fill 32 registers of 512 bits, or 16 of 256."""
    config: Any = numba.config
    other_processor = config.CPU_NAME or config.CPU_FEATURES
    return 5 if not other_processor and llvm.get_host_cpu_features().get("avx512f") else 2


PANEL = _panel_rows()


@intrinsic
def _add_panel_at(typing, left, right, stride, steps, out, across):  # type: ignore[no-untyped-def]
    """Add to `out` the products of `PANEL` rows at the address `left` with those at `right`.

    `stride` is bytes between rows, each of `steps` times `LANES` coordinates; `across` is bytes
    between rows of `out`.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        left, right, stride, steps, out, across = arguments
        places = range(PANEL)
        totals = [[_build.alloca_once(builder, _VECTOR) for _ in places] for _ in places]
        for total in (total for row in totals for total in row):
            builder.store(ir.Constant(_VECTOR, [0.0] * LANES), total)
        with _build.for_range(builder, steps) as loop:
            offset = builder.mul(loop.index, _INT64(8 * LANES))
            kept = [_row_values(builder, left, stride, row, offset) for row in places]
            for column in places:
                other = _row_values(builder, right, stride, column, offset)
                for row in places:
                    term = builder.fmul(kept[row], other, flags=["contract"])
                    total = totals[row][column]
                    added = builder.fadd(builder.load(total), term, flags=["contract"])
                    builder.store(added, total)
        for row in places:
            start = builder.add(out, builder.mul(across, _INT64(row)))
            for column in places:
                found = _sum_halves(builder, builder.load(totals[row][column]))
                place = builder.add(start, _INT64(8 * column))
                pointer = builder.inttoptr(place, _DOUBLE.as_pointer())
                builder.store(builder.fadd(builder.load(pointer), found), pointer)
        return context.get_dummy_value()

    return types.void(left, right, stride, steps, out, across), generate


def _row_values(builder: Any, base: Any, stride: Any, row: int, offset: Any) -> Any:
    place = builder.add(builder.add(base, builder.mul(stride, _INT64(row))), offset)
    return builder.load(builder.inttoptr(place, _VECTOR.as_pointer()), align=8)


def _sum_halves(builder: Any, vector: Any) -> Any:
    """Add the upper half of a vector to the lower one, until one number is left."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = (
            builder.shuffle_vector(
                vector,
                vector,
                ir.Constant(ir.VectorType(_INT32, width), list(range(start, start + width))),
            )
            for start in (0, width)
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, _INT32(0))


_add_panel: Any = _add_panel_at


@numba.njit(nogil=True)
def add_products(left, right, length, upper, out):  # type: ignore[no-untyped-def]
    """Add ⟨row i of `left`, row j of `right`⟩ to `out` ``[n, m]``, of `upper` at least for i ≤ j.

    `left` and `right` are float64 ``[n, …]`` and ``[m, …]`` of one stride, of which the first
    `length` coordinates count. n and m are multiples of `PANEL`, `length` is one of `LANES`.
    """
    stride, across = types.int64(left.strides[0]), types.int64(out.strides[0])
    steps = types.int64(length // LANES)
    from_left, from_right = types.int64(left.ctypes.data), types.int64(right.ctypes.data)
    to = types.int64(out.ctypes.data)
    for row in range(0, left.shape[0], PANEL):
        for column in range(row if upper else 0, right.shape[0], PANEL):
            _add_panel(
                from_left + row * stride,
                from_right + column * stride,
                stride,
                steps,
                to + row * across + 8 * column,
                across,
            )
