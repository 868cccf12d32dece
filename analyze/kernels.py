"""The compiled loop behind `analyze.moments`: sums and checksums of bytes that are loaded once.

It is made as LLVM code from the table of moments, since the same loop must fold bytes into a
checksum and add products of their values: done one after the other, each waits for memory.
What it does, in Python, is `_add_rest`; the checksum is explained in `analyze.checksums`.
(Numba keeps compiled kernels and looks for changes in this file alone: after a change in
`checksums.py`, touch this one.)
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, product
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from analyze import checksums
from analyze.moment_table import (
    GEOMETRY,
    MOMENTS,
    NEXT_BOTH,
    NEXT_GRADIENT,
    NEXT_REFERENCE,
    WITHOUT_GRADIENT,
)

# The loops that there are: which moments are added, and whose bytes may be checked on the way.
_LOOPS = {
    MOMENTS: ("", "w", "g", "wg"),
    GEOMETRY: ("", "w", "g", "wg"),
    WITHOUT_GRADIENT: ("", "w", "g", "wg"),
    NEXT_GRADIENT: ("", "g"),
    NEXT_REFERENCE: ("",),
    NEXT_BOTH: ("",),
}
KINDS = {moments: number for number, moments in enumerate(_LOOPS)}
CHECK_WEIGHTS, CHECK_GRADIENT = 1, 2
_CHECKED = {"": 0, "w": 1, "g": 2, "wg": 3} if checksums.AVAILABLE else {"": 0}
_PLACES = {"w": 0, "g": 1}
_config: Any = numba.config
_COMPILED = not _config.DISABLE_JIT


def _compile(function: Callable[..., Any]) -> Any:
    """Compile with leave to reorder sums and fuse products, not to assume that NaN is absent."""
    options: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "nogil": True}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep the compiled kernels in: compile them each time
        return njit(**options)(function)


# The two factors of each moment; p is the product g·e.
_FACTORS = {"ge": "ge", "gg": "gg", "ee": "ee", "g2e2": "pp", "gw": "gw", "we": "we", "ww": "ww"}

# Coordinates added at once, and running sums that take turns so that none waits for the one
# before. Part of the result, since sums depend on their order: never derive them from the machine.
_LANES, _CHAINS = 8, 2

_DOUBLE, _INT32, _INT64 = ir.DoubleType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_DOUBLE, _LANES)
_build: Any = cgutils


@intrinsic
def _add_blocks(typing, kind, check, g, w, reference, blocks, sums, states, out):  # type: ignore[no-untyped-def]
    """Add the moments of whole blocks of w's bytes, and fold the bytes of w and g to `out`.

    One loop does both, on bytes just loaded: it waits for memory once, and calculates meanwhile.
    """
    names = ("kind", "check", "g", "w", "reference", "blocks", "sums", "states", "out")
    kinds = (kind, check, g, w, reference, blocks, sums, states, out)

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        given = dict(zip(names, arguments, strict=True))
        for name, array in zip(names, kinds, strict=True):
            if isinstance(array, types.Array):
                given[name] = context.make_array(array)(context, builder, given[name]).data
        for moments, number in KINDS.items():
            for checked in (checked for checked in _LOOPS[moments] if checked in _CHECKED):
                bits = _CHECKED[checked]
                wanted = builder.icmp_signed("==", given["kind"], given["kind"].type(number))
                asked = builder.icmp_signed("==", given["check"], given["check"].type(bits))
                with builder.if_then(builder.and_(wanted, asked)):
                    _emit_loop(builder, given, w.dtype.bitwidth // 8, moments, checked)
        return context.get_dummy_value()

    return types.void(*kinds), generate


_blocks: Any = _add_blocks


def _emit_loop(
    builder: Any, given: dict[str, Any], itemsize: int, moments: tuple[str, ...], checked: str
) -> None:
    zero = ir.Constant(_VECTOR, [0.0] * _LANES)
    totals = {
        name: [_build.alloca_once(builder, _VECTOR) for _ in range(_CHAINS)] for name in moments
    }
    for total in chain.from_iterable(totals.values()):
        builder.store(zero, total)
    foldings = {}
    for name in checked:
        state = builder.load(builder.gep(given["states"], [_INT64(_PLACES[name])]))
        foldings[name] = checksums.Folding(builder, state)
    length = checksums.BLOCK_BYTES // itemsize
    with _build.for_range(builder, given["blocks"]) as loop:
        first = builder.mul(loop.index, _INT64(length))
        for name, folding in foldings.items():
            folding.take(builder.ptrtoint(builder.gep(given[name], [first]), _INT64))
        for group in range(length // _LANES):
            start = builder.add(first, _INT64(group * _LANES))
            _emit_group(builder, given, start, {m: totals[m][group % _CHAINS] for m in moments})
    for name, parts in totals.items():
        place = builder.gep(given["sums"], [_INT64(MOMENTS.index(name))])
        total = builder.load(place)
        for part, lane in product(map(builder.load, parts), range(_LANES)):
            total = builder.fadd(total, builder.extract_element(part, _INT32(lane)))
        builder.store(total, place)
    for name, folding in foldings.items():
        folding.finish(builder.add(given["out"], _INT64(_PLACES[name] * checksums.BLOCK_BYTES)))


def _emit_group(builder: Any, given: dict[str, Any], start: Any, totals: dict[str, Any]) -> None:
    """Add the moments of `_LANES` coordinates to `totals`."""

    def values_of(name: str) -> Any:
        place = builder.gep(given[name], [start])
        vector = ir.VectorType(place.type.pointee, _LANES)
        values = builder.load(builder.bitcast(place, vector.as_pointer()), align=1)
        return values if vector.element == _DOUBLE else builder.fpext(values, _VECTOR)

    values = {"w": values_of("w")}
    values["e"] = builder.fsub(values["w"], values_of("reference"))
    if "ge" in totals:
        values["g"] = values_of("g")
        values["p"] = builder.fmul(values["g"], values["e"])
    for name, total in totals.items():
        left, right = (values[factor] for factor in _FACTORS[name])
        term = builder.fmul(left, right, flags=["contract"])
        builder.store(builder.fadd(builder.load(total), term, flags=["contract"]), total)


@_compile
def _add_rest(g, w, reference, sums):  # type: ignore[no-untyped-def]
    """Add all moments, one coordinate after another: for what is left after whole blocks."""
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
def add_moments(kind, check, g, w, reference, cuts, sums, states):  # type: ignore[no-untyped-def]
    """Go through a chunk, segment after segment: whole blocks, then the rest."""
    folded = np.empty(2 * checksums.BLOCK_BYTES, np.uint8)
    out = types.uint64(folded.ctypes.data)
    length = checksums.BLOCK_BYTES // w.itemsize
    for segment in range(cuts.size - 1):
        start, stop = cuts[segment], cuts[segment + 1]
        blocks = (stop - start) // length if _COMPILED else 0
        whole, total = start + blocks * length, sums[segment]
        if blocks > 0:
            piece = slice(start, whole)
            _blocks(kind, check, g[piece], w[piece], reference[piece], blocks, total, states, out)
            if check & CHECK_WEIGHTS:
                states[0] = checksums.folded(out)
            if check & CHECK_GRADIENT:
                states[1] = checksums.folded(out + types.uint64(checksums.BLOCK_BYTES))
        if whole < stop:
            piece = slice(whole, stop)
            _add_rest(g[piece], w[piece], reference[piece], total)
            skip, nbytes = types.uint64(whole * w.itemsize), (stop - whole) * w.itemsize
            if check & CHECK_WEIGHTS:
                place = types.uint64(w.ctypes.data) + skip
                states[0] = checksums.update(states[0], place, nbytes, out)
            if check & CHECK_GRADIENT:
                place = types.uint64(g.ctypes.data) + skip
                states[1] = checksums.update(states[1], place, nbytes, out)
