"""Recording with Hugging Face accelerate.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with record(accelerator, "runs/mine.zarr", model, optimizer, every=10) as recorder:
        …

Clip with `recorder.clip_grad_norm_`, where ``accelerator.sync_gradients``; under fp16 after
`accelerator.unscale_gradients`. The factor of `accelerator.clip_grad_norm_` is unknown (NaN).
Several processes record under plain DDP; a model that FSDP shards is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import distributed

from capture.recorder import Recorder
from capture.store.errors import UsageError


def record(
    accelerator: Accelerator,
    path: str | os.PathLike[str],
    model: Any,
    optimizer: Any,
    *,
    state: Mapping[str, Any] | None = None,
    **options: Any,
) -> Recorder:
    """Return a `Recorder` of what `accelerator` prepared; only its main process writes.

    `optimizer`, and the schedulers in `state`, may be the wrapped or the bare ones; `options` are
    those of `Recorder`. Raises `UsageError` where several processes share no `torch.distributed`.
    """
    ranks = _ranks()
    if accelerator.num_processes != ranks:
        raise UsageError(
            f"{accelerator.num_processes} processes, of which torch.distributed has {ranks}",
            where=str(accelerator.distributed_type),
            fix="train with plain DDP or on one device",
        )
    bare = {name: _bare(value) for name, value in (state or {}).items()}
    return Recorder(path, accelerator.unwrap_model(model), _bare(optimizer), state=bare, **options)


def _ranks() -> int:
    """How many processes `torch.distributed` has; 1 where it is not in use."""
    in_use = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if in_use else 1


def _bare(value: Any) -> Any:
    """What `accelerator.prepare` was given for an optimizer or a scheduler."""
    if isinstance(value, AcceleratedOptimizer):
        return value.optimizer
    return value.scheduler if isinstance(value, AcceleratedScheduler) else value
