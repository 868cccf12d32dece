"""Norms by tensor, of every gradient and every update: cheap enough for every step.

A plain float32 norm of millions of numbers is off by up to 1e-3, and summing in float64 costs
several times as much as what is done here: dot products of short pieces, in the precision of the
run, are added in float64. Relative error for float64 below 1e-14; for float32 about 1e-8, and below
1e-6 where all numbers are nearly equal and rounding adds up.

On a GPU the sums are float64 throughout, and nothing is read from it.

On the CPU this is numpy, as fast as the memory, with two threads for large tensors: on a busy
machine torch's threads wait for each other, once per chunk, and take five times as long. The
pieces are also too short for BLAS to start threads of its own, which it does beyond 10,000 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.halves import in_halves
from capture.staging import copy_on_host

CHUNK_ELEMENTS = 262_144
PIECE_ELEMENTS = 1024

# Sums of float32 squares outside of these bounds may have lost some to under- or overflow.
SAFE_SQUARES = (1e-24, 1e34)


class Norms:
    """Computes Euclidean norms by tensor; `dtype` is at least the precision of the tensors."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._scratch = torch.empty(CHUNK_ELEMENTS, dtype=dtype).numpy()

    def of(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Norm of each tensor, float64 ``[P]``; 0 for `None`.

        On the first GPU of those that the tensors are on, without waiting for it; else on the CPU.
        """
        # Of a sparse gradient only the stored values count, once duplicates are added up.
        dense = [t.coalesce().values() if t is not None and t.is_sparse else t for t in tensors]
        home = next((t.device for t in dense if t is not None and t.is_cuda), None)
        if home is not None:
            return self._on_device(dense, home)
        return _vector([0.0 if tensor is None else self._of_one(tensor) for tensor in dense])

    def of_differences(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """Norm of each ``left - right``, both on the CPU, without a temporary of their size."""
        pairs = zip(left, right, strict=True)
        return _vector([self.of_sum(one, other, -1.0) for one, other in pairs])

    def of_sum(self, tensor: Tensor, other: Tensor, factor: float) -> float:
        """Norm of ``tensor + factor * other``, both on the CPU, without such a temporary."""
        return self._of_one(tensor, other, factor)

    def _of_one(self, tensor: Tensor, other: Tensor | None = None, factor: float = 0.0) -> float:
        # Any order of the elements does, as long as it is the same for both.
        same = other is None or tensor.stride() == other.stride()
        values = _flat(tensor.to(self._dtype), same)
        added = None if other is None else _flat(other, same)
        total = _sum_of_squares(values, added, factor, self._scratch)
        low, high = SAFE_SQUARES
        if not low < total < high:
            wide = np.empty(CHUNK_ELEMENTS, np.float64)
            total = _sum_of_squares(values, added, factor, wide)
        return math.sqrt(total)

    def _on_device(self, tensors: Sequence[Tensor | None], home: torch.device) -> Tensor:
        """One fused reduction for each GPU, gathered on `home`; there the sums are trees."""
        found = [torch.zeros((), dtype=torch.float64, device=home)] * len(tensors)
        rows: dict[torch.device, list[int]] = {}
        for row, tensor in enumerate(tensors):
            if tensor is not None and tensor.numel():
                rows.setdefault(tensor.device, []).append(row)
        for device, here in rows.items():
            for row, norm in zip(here, self._of_device(tensors, here, device, home), strict=True):
                found[row] = norm
        return torch.stack(found)

    def _of_device(
        self,
        tensors: Sequence[Tensor | None],
        rows: Sequence[int],
        device: torch.device,
        home: torch.device,
    ) -> Sequence[Tensor]:
        """Norms of the tensors of one device, each as a scalar on `home`."""
        here = [tensor for tensor in (tensors[row] for row in rows) if tensor is not None]
        if device.type == "cpu":
            norms = _vector([self._of_one(tensor) for tensor in here])
            return norms.to(home, non_blocking=True).unbind()
        norms_here = torch._foreach_norm(here, 2, torch.float64)
        if device == home:
            return norms_here
        return torch.stack(norms_here).to(home, non_blocking=True).unbind()


class WeightsCopy:
    """w_t as it was before update t, to tell afterwards what the update did.

    A copy on the weights' own device, in `dtype`, the precision in which the run is stored, made
    when first needed; or, where w_t was staged on the host anyway, what was staged.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._norms = Norms(dtype)
        self._dtype = dtype
        self._copies: list[Tensor] = []
        self._kept: Sequence[Tensor] = self._copies

    def allocate(self, parameters: Sequence[Tensor]) -> None:
        """Make the copies, and touch them, so that no page fault holds the first step."""
        if not self._copies:
            self._copies = [torch.zeros_like(p, dtype=self._dtype) for p in parameters]

    def keep(self, parameters: Sequence[Tensor]) -> None:
        """Copy w_t."""
        self.allocate(parameters)
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
        """Compute ``w_{t+1} - w_t`` by tensor into `out`, all of them on the CPU."""
        for new, old, change in zip(parameters, self._kept, out, strict=True):
            torch.sub(new, old, out=change)

    def take_updates(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Turn the copy of w_t into ``w_{t+1} - w_t``, in place, and return it by tensor."""
        assert self._copies, "w_t was not kept"
        # Two operations for all tensors on a GPU, where one for each would take longer to start
        # than to run; -w_t + w_{t+1} rounds as the difference does.
        torch._foreach_neg_(self._copies)
        torch._foreach_add_(self._copies, list(parameters))
        return self._copies

    def update_norms(self, parameters: Sequence[Tensor]) -> Tensor:
        """Compute ``‖w_{t+1} - w_t‖`` by tensor, float64 ``[P]``; w_t may be lost over it."""
        if any(parameter.is_cuda for parameter in parameters):
            return self._norms.of(self.take_updates(parameters))
        return self._norms.of_differences(parameters, self._kept)


def _vector(norms: Sequence[float]) -> Tensor:
    return torch.from_numpy(np.array(norms, dtype=np.float64))


def _flat(tensor: Tensor, in_memory_order: bool) -> NDArray[Any]:
    """Flatten to ``[numel]``, in the order of memory without a copy where that is allowed."""
    return tensor.detach().numpy().ravel("K" if in_memory_order else "C")


def _sum_of_squares(
    values: NDArray[Any], added: NDArray[Any] | None, factor: float, scratch: NDArray[Any]
) -> float:
    """Sum of ``(values + factor * added)**2``; within a piece in the precision of `scratch`."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if added is None and values.dtype == scratch.dtype:
            return _dot(values)
        total = 0.0
        for start in range(0, values.size, scratch.size):
            here = slice(start, start + scratch.size)
            square = scratch[: values[here].size]
            if added is None:
                np.copyto(square, values[here])
            elif factor == -1.0:
                np.subtract(values[here], added[here], out=square, dtype=scratch.dtype)
            else:
                np.multiply(added[here], factor, out=square, dtype=scratch.dtype)
                np.add(square, values[here], out=square, dtype=scratch.dtype)
            total += _dot(square)
    return total


def _dot(values: NDArray[Any]) -> float:
    """Sum of ``values**2``: the pieces in their own precision, their sum in float64."""
    return sum(in_halves(lambda half: _dot_of_half(values[half]), values.size))


def _dot_of_half(values: NDArray[Any]) -> float:
    whole = values.size - values.size % PIECE_ELEMENTS
    pieces, rest = values[:whole].reshape(-1, PIECE_ELEMENTS), values[whole:]
    # Set here too: a thread has its own.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        total = np.vecdot(pieces, pieces).sum(dtype=np.float64)
        return float(total) + float(np.dot(rest, rest))
