"""Notices gradients that a loop changes between the backward pass and the optimizer's step.

Clipping that the recorder did not do itself has an unknown factor. Every operation of torch that
writes into a tensor raises the tensor's version; `GradScaler.unscale_` does not, and what DDP
writes is there before the backward pass ends. So each pass notes, once all else in it is done,
which tensor each gradient is and its version; if they differ when the step begins, the loop
changed the gradient. Not seen: writing through ``grad.data``, as old loops clip, and hooks that
change a gradient within the backward pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

from torch import _C, Tensor, nn
from torch.autograd.variable import Variable

ADVICE = (
    "the loop changes gradients between the backward pass and the optimizer's step: what is "
    "recorded is the changed gradient, and its clip factor is unknown (NaN); to clip, call "
    "recorder.clip_grad_norm_(max_norm) after scaler.unscale_, and not clipped=False"
)


class GradientWatch:
    """Notes the gradients of `parameters` at the end of every backward pass; warns once.

    Costs one Python call per tensor and pass; nothing is read from a device.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._noted: list[tuple[int, int] | None] = [None] * len(parameters)
        self._pass = -1
        self._warned = False
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
            for parameter in parameters
            if parameter.is_leaf
        ]

    def note(self) -> None:
        """Take the gradients as they are now for unchanged."""
        self._noted = [_mark(parameter.grad) for parameter in self._parameters]

    def known(self, clip_factor: float | Tensor) -> float | Tensor:
        """Return `clip_factor`, or NaN, with one warning, where the loop changed a gradient."""
        if not self._changed():
            return clip_factor
        if not self._warned:
            self._warned = True
            warnings.warn(ADVICE, stacklevel=2)
        return math.nan

    def remove(self) -> None:
        """Take the hooks off the parameters; removing twice is harmless."""
        for handle in self._handles:
            handle.remove()

    def _changed(self) -> bool:
        """Whether a gradient that a backward pass left is another tensor or version now."""
        marks = [_mark(parameter.grad) for parameter in self._parameters]
        pairs = zip(self._noted, marks, strict=True)
        return any(None not in (old, new) and old != new for old, new in pairs)

    def _accumulated(self, parameter: Tensor) -> None:
        # By its number, since a pass that raised never gets to its end.
        number = _C._current_graph_task_id()
        if number != self._pass:
            self._pass = number
            _at_end(lambda: _at_end(self.note))


def _at_end(call: Callable[[], None]) -> None:
    """Run `call` at the end of this backward pass; what is queued there runs after DDP's part."""
    Variable._execution_engine.queue_callback(call)


def _mark(gradient: Tensor | None) -> tuple[int, int] | None:
    return None if gradient is None else (id(gradient), gradient._version)
