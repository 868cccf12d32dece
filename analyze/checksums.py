"""Crc32c for the inside of the kernels: 256 bytes folded at once by carry-less multiplication.

The package `crc32c` stays the authority: it wrote the checksums, it has the last word where one
differs, and it does all the work on processors without wide carry-less multiplication. What is
gained here is that the bytes are checked while they are in the nearest caches.

The method is that of V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
Instruction" (Intel, 2009): 128 bits move on by d bits when their halves are multiplied with
x^(d+32) and x^(d-32) modulo the polynomial. The 256 bytes that remain go through the processor's
own crc32 instruction, so that no last reduction has to be written.

Numba keeps the compiled kernels by the age of `moments.py` alone: after a change here, touch it.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_POLYNOMIAL = 0x11EDC6F41
_BLOCK_BYTES = 256
_build: Any = cgutils
_INT8, _INT32, _INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _words_per_vector() -> int:
    """64-bit words that this processor multiplies at once: 8, 4, or 0 where it cannot."""
    config: Any = numba.config
    if config.CPU_NAME or config.CPU_FEATURES or config.DISABLE_JIT:
        return 0  # compiled for another processor than this one, or not at all
    features = llvm.get_host_cpu_features()
    if not (features.get("vpclmulqdq") and features.get("sse4.2") and features.get("avx2")):
        return 0
    return 8 if features.get("avx512f") else 4


_WORDS = _words_per_vector()

# Whether `update` works here; where not, it returns its state unchanged.
AVAILABLE = _WORDS > 0


def _power(exponent: int) -> int:
    """``x^exponent`` modulo the polynomial, bits reflected, shifted as the multiplication asks."""
    value = 1
    for _ in range(exponent):
        value <<= 1
        value ^= _POLYNOMIAL if value >> 32 else 0
    return int(f"{value:032b}"[::-1], 2) << 1


def _function(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, arguments)
    return _build.get_or_insert_function(builder.module, kind, name)


@intrinsic
def _fold_into(typing: Any, address: Any, blocks: Any, state: Any, out: Any) -> Any:
    """Fold ``256 · blocks`` bytes into 256 bytes at `out` that have the same checksum."""
    vector = ir.VectorType(_INT64, _WORDS)
    lane_bytes = 8 * _WORDS
    lanes = range(0, _BLOCK_BYTES, lane_bytes)
    distance = 8 * _BLOCK_BYTES
    factors = [_power(distance + 32), _power(distance - 32)] * (_WORDS // 2)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, count, initial, result = arguments
        multiply = _function(
            builder, f"llvm.x86.pclmulqdq.{64 * _WORDS}", vector, vector, vector, _INT8
        )

        def lane_at(base: Any, offset: int) -> Any:
            place = builder.add(base, ir.Constant(_INT64, offset))
            return builder.inttoptr(place, vector.as_pointer())

        def advance(value: Any) -> Any:
            factor = ir.Constant(vector, factors)
            low, high = (
                builder.call(multiply, [value, factor, ir.Constant(_INT8, half)])
                for half in (0x00, 0x11)
            )
            return builder.xor(low, high)

        first = ir.Constant(vector, [0] * _WORDS)
        first = builder.insert_element(first, initial, ir.Constant(_INT32, 0))
        sums = [_build.alloca_once_value(builder, first) for _ in lanes]
        for offset, total in zip(lanes, sums, strict=True):
            value = builder.load(lane_at(start, offset), align=1)
            builder.store(builder.xor(value, first) if offset == 0 else value, total)
        with _build.for_range(builder, builder.sub(count, ir.Constant(_INT64, 1))) as loop:
            done = builder.add(loop.index, ir.Constant(_INT64, 1))
            block = builder.add(start, builder.mul(done, ir.Constant(_INT64, _BLOCK_BYTES)))
            for offset, total in zip(lanes, sums, strict=True):
                data = builder.load(lane_at(block, offset), align=1)
                builder.store(builder.xor(advance(builder.load(total)), data), total)
        for offset, total in zip(lanes, sums, strict=True):
            builder.store(builder.load(total), lane_at(result, offset), align=1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.int64, types.uint64, types.uint64), generate


_fold: Any = _fold_into


def _instruction(bits: int) -> Any:
    """Make the processor's crc32 instruction for 64 or 32 bits at an address callable."""
    word, state_type = ir.IntType(bits), ir.IntType(bits)

    @intrinsic
    def take(typing: Any, state: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            state, place = arguments
            name = f"llvm.x86.sse42.crc32.{bits}.{bits}"
            crc = _function(builder, name, state_type, state_type, word)
            data = builder.load(builder.inttoptr(place, word.as_pointer()), align=1)
            if bits == 64:
                return builder.call(crc, [state, data])
            return builder.zext(builder.call(crc, [builder.trunc(state, word), data]), _INT64)

        return types.uint64(types.uint64, types.uint64), generate

    return take


_take8, _take4 = _instruction(64), _instruction(32)


@njit(nogil=True)
def _update(state: Any, address: Any, nbytes: Any, scratch: Any) -> Any:
    """Take `nbytes` at `address`, a multiple of 4, into the checksum's state.

    `scratch` is the address of 256 bytes that may be overwritten. A checksum starts with the state
    ``0xFFFFFFFF`` and is the state at its end with all 32 bits inverted.
    """
    blocks = nbytes // _BLOCK_BYTES
    if blocks > 0:
        _fold(address, blocks, state, scratch)
        state = types.uint64(0)
        for offset in range(0, _BLOCK_BYTES, 8):
            state = _take8(state, scratch + types.uint64(offset))
    done = blocks * _BLOCK_BYTES
    while done + 8 <= nbytes:
        state = _take8(state, address + types.uint64(done))
        done += 8
    if done < nbytes:
        state = _take4(state, address + types.uint64(done))
    return state


@njit(nogil=True)
def _unchanged(state: Any, address: Any, nbytes: Any, scratch: Any) -> Any:
    return state


update = _update if AVAILABLE else _unchanged
