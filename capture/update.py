"""One update: what the loop tells of it beforehand, and what is known of it between the hooks."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from capture.clipping import Limit
from capture.store import UsageError
from capture.store.layout import METADATA

MAX_NAME = 100

# Every-step scalars that are written here; a loop may log `loss` and any other name.
OWN_SCALARS = (
    *("epoch", "lr", "clip_factor", "grad_norm", "update_norm", "grad_norm_by_tensor"),
    *("update_norm_by_tensor", "group_lr", "group_momentum", "group_weight_decay"),
)


@dataclass
class Told:
    """What a loop tells of the coming update.

    `logged` are scalars by name, `clip_factor` and `limit` what `Recorder.clip_grad_norm_` did.
    """

    logged: dict[str, float | Tensor] = field(default_factory=dict)
    clip_factor: float | Tensor | None = None
    limit: Limit | None = None

    def log(self, name: str, value: float | Tensor) -> None:
        """Keep a scalar; raises what `require_scalar` raises."""
        require_scalar(name, value)
        # A tensor may be reused before the step. One on a GPU is not waited for.
        kept = value.detach().clone().reshape(()) if isinstance(value, Tensor) else float(value)
        self.logged[name] = kept

    def clipped(self, max_norm: float, norm_type: float, total: Tensor) -> None:
        """Keep how the gradients, of the norm `total`, were clipped."""
        self.limit = Limit(float(max_norm), float(norm_type))
        self.clip_factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)


@dataclass
class Update:
    """What is known of update t between the hooks before and after it.

    `scale` is what a `GradScaler` multiplied the gradients with, for a fused optimizer; `changed`
    is whether the loop itself changed gradients after the backward pass; `told` is whether the
    optimizer's own state tells the norm of the update, so that w_t need not be kept.
    """

    step: int
    epoch: float | None
    clip_factor: float | Tensor
    scale: float | None = None
    changed: bool = False
    told: bool = False
    streams: list[str] = field(default_factory=list)
    scalars: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def require_scalar(name: str, value: Any) -> None:
    """Raise `UsageError` for a name that is taken or bad, and for what is no real number."""
    if name in OWN_SCALARS:
        raise UsageError("the recorder itself logs this scalar", where=name, fix="rename it")
    sound = name.isprintable() and "/" not in name and not name.startswith(".")
    if not sound or not 0 < len(name) <= MAX_NAME or name == METADATA:
        raise UsageError(
            "not a name for a scalar",
            where=repr(name[: MAX_NAME + 1]),
            fix=f"use letters, digits and _, at most {MAX_NAME}",
        )
    if isinstance(value, Tensor):
        number = value.numel() == 1 and not value.is_complex()
    else:
        number = isinstance(value, Real)
    if not number:
        raise UsageError("not a scalar that a loop can log", where=name, fix="log one real number")
