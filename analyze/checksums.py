"""Crc32c for the inside of the kernels: 256 bytes folded at once by carry-less multiplication.

The package `crc32c` stays the authority: it wrote the checksums, it has the last word where one
differs, and it does all the work on processors without wide carry-less multiplication. What is
gained here is that the bytes are checked in the loop that loads them for the sums.

The method is that of V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
Instruction" (Intel, 2009): 128 bits move on by d bits when their halves are multiplied with
x^(d+32) and x^(d-32) modulo the polynomial. The 256 bytes that remain go through the processor's
own crc32 instruction, so that no last reduction has to be written.

Numba keeps the compiled kernels by the age of `kernels.py` alone: after a change here, touch it.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Bytes that are folded at a time.
BLOCK_BYTES = 256

_POLYNOMIAL = 0x11EDC6F41
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


class Folding:
    """Code that folds blocks of 256 bytes, one after another, into 256 with the same checksum.

    `take` may stand in a loop, beside other work on the same bytes.
    """

    def __init__(self, builder: Any, state: Any) -> None:
        """Start from the checksum's `state`, the first vector's first word."""
        self._builder = builder
        self._vector = ir.VectorType(_INT64, _WORDS)
        self._lanes = range(0, BLOCK_BYTES, 8 * _WORDS)
        zero = ir.Constant(self._vector, [0] * _WORDS)
        first = builder.insert_element(zero, state, ir.Constant(_INT32, 0))
        self._first = _build.alloca_once_value(builder, first)
        self._sums = [_build.alloca_once_value(builder, zero) for _ in self._lanes]
        builder.store(first, self._first)
        for total in self._sums:
            builder.store(zero, total)

    def take(self, block: Any) -> None:
        """Fold the block at an address in."""
        builder = self._builder
        for offset, total in zip(self._lanes, self._sums, strict=True):
            data = builder.load(self._lane(block, offset), align=1)
            value = builder.xor(self._advance(builder.load(total)), data)
            if offset == 0:
                value = builder.xor(value, builder.load(self._first))
                builder.store(ir.Constant(self._vector, [0] * _WORDS), self._first)
            builder.store(value, total)

    def finish(self, out: Any) -> None:
        """Write the 256 bytes to an address."""
        for offset, total in zip(self._lanes, self._sums, strict=True):
            self._builder.store(self._builder.load(total), self._lane(out, offset), align=1)

    def _lane(self, base: Any, offset: int) -> Any:
        place = self._builder.add(base, ir.Constant(_INT64, offset))
        return self._builder.inttoptr(place, self._vector.as_pointer())

    def _advance(self, value: Any) -> Any:
        """Move 128-bit sums on by one block."""
        distance, vector = 8 * BLOCK_BYTES, self._vector
        factors = [_power(distance + 32), _power(distance - 32)] * (_WORDS // 2)
        name = f"llvm.x86.pclmulqdq.{64 * _WORDS}"
        multiply = _function(self._builder, name, vector, vector, vector, _INT8)
        low, high = (
            self._builder.call(
                multiply, [value, ir.Constant(vector, factors), ir.Constant(_INT8, half)]
            )
            for half in (0x00, 0x11)
        )
        return self._builder.xor(low, high)


@intrinsic
def _fold_into(typing: Any, address: Any, blocks: Any, state: Any, out: Any) -> Any:
    """Fold ``256 · blocks`` bytes into 256 bytes at `out` that have the same checksum."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, count, initial, result = arguments
        folding = Folding(builder, initial)
        with _build.for_range(builder, count) as loop:
            offset = builder.mul(loop.index, ir.Constant(_INT64, BLOCK_BYTES))
            folding.take(builder.add(start, offset))
        folding.finish(result)
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
def _folded(address: Any) -> Any:
    """The checksum's state after the 256 bytes that a `Folding` left at `address`."""
    state = types.uint64(0)
    for offset in range(0, BLOCK_BYTES, 8):
        state = _take8(state, address + types.uint64(offset))
    return state


@njit(nogil=True)
def _update(state: Any, address: Any, nbytes: Any, scratch: Any) -> Any:
    """Take `nbytes` at `address`, a multiple of 4, into the checksum's state.

    `scratch` is the address of 256 bytes that may be overwritten. A checksum starts with the state
    ``0xFFFFFFFF`` and is the state at its end with all 32 bits inverted.
    """
    blocks = nbytes // BLOCK_BYTES
    if blocks > 0:
        _fold(address, blocks, state, scratch)
        state = _folded(scratch)
    done = blocks * BLOCK_BYTES
    while done + 8 <= nbytes:
        state = _take8(state, address + types.uint64(done))
        done += 8
    if done < nbytes:
        state = _take4(state, address + types.uint64(done))
    return state


@njit(nogil=True)
def _unchanged(state: Any, address: Any, nbytes: Any, scratch: Any) -> Any:
    return state


@njit(nogil=True)
def _nothing(address: Any) -> Any:
    return types.uint64(0)


update = _update if AVAILABLE else _unchanged
folded = _folded if AVAILABLE else _nothing
