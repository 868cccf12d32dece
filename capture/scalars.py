"""Scalars of every step that are still on a device: handed on in order, once they are there.

Reading one number from a GPU waits for all that was queued before it. So what a step tells is
packed into one tensor, copied into pinned memory behind the step's own work, and handed on when an
event says that it has arrived, usually while a later step is under way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Steps whose scalars may be under way; beyond that the oldest is waited for, long done by then.
BOUND = 64

Write = Callable[[int, dict[str, Any]], None]


class Copy(Protocol):
    """Numbers on their way to the host."""

    def arrived(self) -> bool:
        """Whether `numbers` would not wait."""

    def numbers(self) -> NDArray[np.float64]:
        """Wait for them; all elements of all tensors in order, float64 ``[n]``."""


class DeviceCopy:
    """Copies the elements of some tensors on CUDA devices to the host, as one float64 vector."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        home = tensors[0].device
        flat = [t.reshape(-1).to(home, torch.float64, non_blocking=True) for t in tensors]
        # The target of a copy that does not block is pinned by torch itself.
        self._host = torch.cat(flat).to("cpu", non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(home))

    def arrived(self) -> bool:
        """Whether the device has made the copy."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def numbers(self) -> NDArray[np.float64]:
        """Wait for the copy; float64 ``[n]``."""
        self._event.synchronize()
        return self._host.numpy().copy()


def on_device(value: Any) -> bool:
    """Whether reading this value would wait for a GPU."""
    return isinstance(value, Tensor) and value.is_cuda


@dataclass(frozen=True)
class _Step:
    """The scalars of one step: those that are there, and the shapes of those that `copy` brings."""

    number: int
    ready: dict[str, Any]
    shapes: Mapping[str, torch.Size]
    copy: Copy | None

    def values(self) -> dict[str, Any]:
        if self.copy is None:
            return self.ready
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = np.split(self.copy.numbers(), np.cumsum(sizes)[:-1])
        pairs = zip(self.shapes.items(), parts, strict=True)
        return self.ready | {name: part.reshape(shape) for (name, shape), part in pairs}


class PendingScalars:
    """Gives `write` the scalars of each step, in the order of `add`, all of them on the host.

    A value is a number, a sequence of numbers, or a tensor, which `write` gets as a numpy array of
    its shape. Where nothing is on a device and nothing is under way, `write` is called at once.
    `is_late` tells which values must be fetched, and `fetch` begins it; at most `bound` steps are
    under way.
    """

    def __init__(
        self,
        write: Write,
        *,
        is_late: Callable[[Any], bool] = on_device,
        fetch: Callable[[Sequence[Tensor]], Copy] = DeviceCopy,
        bound: int = BOUND,
    ) -> None:
        self._write = write
        self._is_late = is_late
        self._fetch = fetch
        self._bound = bound
        self._waiting: deque[_Step] = deque()

    def __len__(self) -> int:
        """Steps that are under way."""
        return len(self._waiting)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Take the scalars of one step; its tensors may change as soon as this returns."""
        late = {name: value for name, value in values.items() if self._is_late(value)}
        ready = {name: _on_host(value) for name, value in values.items() if name not in late}
        copy = self._fetch(list(late.values())) if late else None
        shapes = {name: value.shape for name, value in late.items()}
        self._waiting.append(_Step(step, ready, shapes, copy))
        self._hand_on(self._bound)

    def flush(self) -> None:
        """Wait for everything and hand it on."""
        self._hand_on(0)

    def _hand_on(self, bound: int) -> None:
        """Hand on what is there, and wait for the oldest while more than `bound` are under way."""
        while self._waiting:
            step = self._waiting[0]
            there = step.copy is None or step.copy.arrived()
            if not there and len(self._waiting) <= bound:
                return
            values = step.values()
            self._waiting.popleft()
            self._write(step.number, values)


def _on_host(value: Any) -> Any:
    """A tensor of the CPU as float64 numpy, of its own memory; numbers as they are."""
    return value.to(torch.float64, copy=True).numpy() if isinstance(value, Tensor) else value
