"""One pass over gradient, weights and reference: the sums that every quantity follows from.

Axes: T saved steps, B batches, D coordinates, P tensors, R references. S segments are the pieces
into which the borders of tensors cut a run of coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from analyze import checksums
from capture.store.errors import UsageError

# ⟨g,e⟩ ‖g‖² ‖e‖² Σg²e² ⟨g,w⟩ ⟨w,e⟩ ‖w‖², with e = w - w*.
MOMENTS = ("ge", "gg", "ee", "g2e2", "gw", "we", "ww")
GEOMETRY = ("ge", "gg", "ee")
WITHOUT_GRADIENT = ("ee", "we", "ww")

_ALL, _GEOMETRY, _WITHOUT_GRADIENT = 0, 1, 2
_KINDS = {MOMENTS: _ALL, GEOMETRY: _GEOMETRY, WITHOUT_GRADIENT: _WITHOUT_GRADIENT}
_CHECK_WEIGHTS, _CHECK_GRADIENT = 1, 2
_CHECKED = {"": 0, "w": 1, "g": 2, "wg": 3} if checksums.AVAILABLE else {"": 0}
_PLACES = {"w": 0, "g": 1}
_CHECKSUM_START = np.uint64(0xFFFFFFFF)
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
        for moments, number in _KINDS.items():
            for checked, bits in _CHECKED.items():
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
    if "gg" in totals:
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
def _pass(kind, check, g, w, reference, cuts, sums, states):  # type: ignore[no-untyped-def]
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
            if check & _CHECK_WEIGHTS:
                states[0] = checksums.folded(out)
            if check & _CHECK_GRADIENT:
                states[1] = checksums.folded(out + types.uint64(checksums.BLOCK_BYTES))
        if whole < stop:
            piece = slice(whole, stop)
            _add_rest(g[piece], w[piece], reference[piece], total)
            skip, nbytes = types.uint64(whole * w.itemsize), (stop - whole) * w.itemsize
            if check & _CHECK_WEIGHTS:
                place = types.uint64(w.ctypes.data) + skip
                states[0] = checksums.update(states[0], place, nbytes, out)
            if check & _CHECK_GRADIENT:
                place = types.uint64(g.ctypes.data) + skip
                states[1] = checksums.update(states[1], place, nbytes, out)


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
    every segment is summed in the same order from its first coordinate on.
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
