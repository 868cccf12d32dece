"""Which process of a distributed training this is."""

from __future__ import annotations

import torch

from capture.store.errors import UsageError


def require_rank(resume: bool) -> bool:
    """Tell whether this is the process that writes; `UsageError` for several ranks that resume."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    if resume and ranks > 1:
        # Each rank has random numbers of its own, and only rank 0 keeps states.
        raise UsageError(
            "a recorder cannot resume a training of several ranks",
            where=f"torch.distributed, rank {rank} of {ranks}",
            fix="load a checkpoint of your own on every rank, and record into another path",
        )
    return rank == 0
