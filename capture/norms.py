"""Norms by tensor, of every gradient and every update: cheap enough for every step.

A plain float32 norm of millions of numbers is off by up to 1e-3, and summing in float64 costs twice
as much as what is done here: chunks that stay in cache are squared and summed pairwise in the
precision of the run, and the chunks are added in float64. Relative error for float64 below 1e-14;
for float32 about 1e-8, and below 1e-6 where all numbers are nearly equal and rounding adds up.

On the CPU this is numpy in the calling thread: on a busy machine torch's threads wait for each
other, once per chunk, and take five times as long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.staging import copy_on_host

CHUNK_ELEMENTS = 262_144

# Sums of float32 squares outside of these bounds may have lost some to under- or overflow.
SAFE_SQUARES = (1e-24, 1e34)


class Norms:
    """Computes Euclidean norms by tensor; `dtype` is at least the precision of the tensors."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._scratch = torch.empty(CHUNK_ELEMENTS, dtype=dtype).numpy()

    def of(self, tensors: Sequence[Tensor | None]) -> NDArray[np.float64]:
        """Norm of each tensor, float64 ``[P]``; 0 for `None`."""
        # Of a sparse gradient only the stored values count, once duplicates are added up.
        dense = [t.coalesce().values() if t is not None and t.is_sparse else t for t in tensors]
        if any(tensor is not None and tensor.is_cuda for tensor in dense):
            return self._on_device(dense)
        return np.array([0.0 if tensor is None else self._of_one(tensor) for tensor in dense])

    def of_differences(
        self, left: Sequence[Tensor], right: Sequence[Tensor]
    ) -> NDArray[np.float64]:
        """Norm of each ``left - right``, both on the CPU, without a temporary of their size."""
        pairs = zip(left, right, strict=True)
        return np.array([self._of_one(one, other) for one, other in pairs])

    def _of_one(self, tensor: Tensor, minus: Tensor | None = None) -> float:
        # Any order of the elements does, as long as it is the same for both.
        same = minus is None or tensor.stride() == minus.stride()
        values = _flat(tensor.to(self._dtype), same)
        other = None if minus is None else _flat(minus, same)
        total = _sum_of_squares(values, other, self._scratch)
        low, high = SAFE_SQUARES
        if not low < total < high:
            wide = np.empty(CHUNK_ELEMENTS, np.float64)
            total = _sum_of_squares(values, other, wide)
        return math.sqrt(total)

    def _on_device(self, tensors: Sequence[Tensor | None]) -> NDArray[np.float64]:
        """One fused reduction per device and one transfer each; there the sums are trees."""
        values = np.zeros(len(tensors))
        present = [(row, tensor) for row, tensor in enumerate(tensors) if tensor is not None]
        for device in {tensor.device for _, tensor in present}:
            here = [(row, tensor) for row, tensor in present if tensor.device == device]
            found = torch._foreach_norm([tensor for _, tensor in here], 2, self._dtype)
            values[[row for row, _ in here]] = torch.stack(found).double().cpu().numpy()
        return values


class WeightsCopy:
    """w_t as it was before update t, to tell afterwards what the update did.

    A copy on the weights' own device, in `dtype`, the precision in which the run is stored; or,
    where w_t was staged on the host anyway, what was staged.
    """

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._norms = Norms(dtype)
        # Touched now, so that no page fault holds the first step.
        self._copies = [torch.zeros_like(parameter, dtype=dtype) for parameter in parameters]
        self._kept: Sequence[Tensor] = self._copies

    def keep(self, parameters: Sequence[Tensor]) -> None:
        """Copy w_t."""
        self._kept = self._copies
        if any(parameter.is_cuda for parameter in parameters):
            torch._foreach_copy_(self._copies, list(parameters))
            return
        for copy, parameter in zip(self._copies, parameters, strict=True):
            copy_on_host(copy, parameter)

    def borrow(self, staged: Sequence[Tensor]) -> None:
        """Take w_t from where it was staged; it must stay there until the update was measured."""
        self._kept = staged

    def updates(self, parameters: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Compute ``w_{t+1} - w_t`` by tensor into `out`, on the weights' own device."""
        for new, old, change in zip(parameters, self._kept, out, strict=True):
            torch.sub(new, old, out=change)

    def take_updates(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Turn the copy of w_t into ``w_{t+1} - w_t``, in place, and return it by tensor."""
        self.updates(parameters, self._copies)
        return self._copies

    def update_norms(self, parameters: Sequence[Tensor]) -> NDArray[np.float64]:
        """Compute ``‖w_{t+1} - w_t‖`` by tensor, float64 ``[P]``; w_t may be lost over it."""
        if any(parameter.is_cuda for parameter in parameters):
            return self._norms.of(self.take_updates(parameters))
        return self._norms.of_differences(parameters, self._kept)


def _flat(tensor: Tensor, in_memory_order: bool) -> NDArray[Any]:
    """Flatten to ``[numel]``, in the order of memory without a copy where that is allowed."""
    return tensor.detach().numpy().ravel("K" if in_memory_order else "C")


def _sum_of_squares(
    values: NDArray[Any], minus: NDArray[Any] | None, scratch: NDArray[Any]
) -> float:
    """Sum of ``(values - minus)**2``; within a chunk in the precision of `scratch`."""
    total = 0.0
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start in range(0, values.size, scratch.size):
            piece = values[start : start + scratch.size]
            square = scratch[: piece.size]
            if minus is not None:
                other = minus[start : start + scratch.size]
                piece = np.subtract(piece, other, out=square, dtype=scratch.dtype)
            np.multiply(piece, piece, out=square, dtype=scratch.dtype)
            total += float(square.sum())
    return total
