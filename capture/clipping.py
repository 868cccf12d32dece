"""Notices gradients that a loop changes between the backward pass and the optimizer's step, and
keeps count of that and of the clipping that the recorder did itself.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import _C, Tensor, nn
from torch.autograd.variable import Variable

ADVICE = (
    "the loop changes gradients between the backward pass and the optimizer's step: what is "
    "recorded is the changed gradient, and its clip factor is unknown (NaN); to clip, call "
    "recorder.clip_grad_norm_(max_norm) after scaler.unscale_, and not clipped=False"
)


class Limit(NamedTuple):
    """What `Recorder.clip_grad_norm_` was called with; `max_norm` is infinite for no clipping."""

    max_norm: float
    norm_type: float


@dataclass
class Clipping:
    """What a run saw of clipping, counted in updates: its attribute `clipping`.

    `by_recorder` counts those for which `Recorder.clip_grad_norm_` was called with a finite norm,
    `max_norms` are the smallest and the largest of these norms, `norm_types` their kinds.
    `by_loop` counts those for which the loop itself changed gradients, the first at `first_step`.
    """

    by_recorder: int = 0
    max_norms: list[float] = field(default_factory=list)
    norm_types: list[float] = field(default_factory=list)
    by_loop: int = 0
    first_step: int | None = None

    def count(self, step: int, limit: Limit | None, changed: bool) -> None:
        """Take in update `step`: how the recorder clipped, and whether the loop changed it."""
        if limit is not None and math.isfinite(limit.max_norm):
            self.by_recorder += 1
            norms = (*self.max_norms, limit.max_norm)
            self.max_norms = [min(norms), max(norms)]
            self.norm_types = sorted({*self.norm_types, limit.norm_type})
        if changed:
            self.by_loop += 1
            self.first_step = step if self.first_step is None else self.first_step

    def to_json(self) -> dict[str, Any]:
        """The attribute; empty where nothing was seen. An infinite kind of norm is ``"inf"``."""
        found: dict[str, Any] = {}
        if self.by_recorder:
            kinds = [kind if math.isfinite(kind) else str(kind) for kind in self.norm_types]
            counted = {"updates": self.by_recorder, "max_norm": self.max_norms}
            found["recorder"] = {**counted, "norm_type": kinds}
        if self.by_loop:
            found["loop"] = {"updates": self.by_loop, "first_step": self.first_step}
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Clipping:
        """What `to_json` gave."""
        own, loop = found.get("recorder", {}), found.get("loop", {})
        return cls(
            own.get("updates", 0),
            list(own.get("max_norm", ())),
            [float(kind) for kind in own.get("norm_type", ())],
            loop.get("updates", 0),
            loop.get("first_step"),
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

    def changed(self) -> bool:
        """Whether the loop changed a gradient that a backward pass left; one warning says so."""
        marks = [_mark(parameter.grad) for parameter in self._parameters]
        pairs = zip(self._noted, marks, strict=True)
        changed = any(None not in (old, new) and old != new for old, new in pairs)
        if changed and not self._warned:
            self._warned = True
            warnings.warn(ADVICE, stacklevel=2)
        return changed

    def remove(self) -> None:
        """Take the hooks off the parameters; removing twice is harmless."""
        for handle in self._handles:
            handle.remove()

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
