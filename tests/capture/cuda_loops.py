"""A small training on a GPU, for the tests of the recorder there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy

from capture import Recorder

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the recorder's CUDA path is not tested"
)

STEPS, EVERY, CLIP = 11, 4, 0.1
EPS = 2.0**-23

Batch = tuple[torch.Tensor, torch.Tensor]
Optimizers = dict[str, Callable[[Any], optim.Optimizer]]

OPTIMIZERS: Optimizers = {
    "plain": lambda p: optim.SGD(p, lr=0.05),
    "decay": lambda p: optim.SGD(p, lr=0.05, weight_decay=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "fused momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: optim.Adam(p, lr=1e-3),
    "fused adam": lambda p: optim.Adam(p, lr=1e-3, fused=True),
}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 5)
    ).cuda()


def make_batches(count: int = STEPS) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, 20, generator=generator).cuda()
    y = torch.randint(5, (count, 16), generator=generator).cuda()
    return list(zip(x, y, strict=True))


def one_step(
    model: nn.Module,
    optimizer: optim.Optimizer,
    batch: Batch,
    recorder: Recorder | None = None,
    clip: bool = False,
) -> torch.Tensor:
    """One update of a loop; with a recorder its loss is logged, and the recorder clips."""
    optimizer.zero_grad()
    loss = cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    if recorder is not None:
        recorder.log(loss=loss)
    if clip and recorder is not None:
        recorder.clip_grad_norm_(CLIP)
    elif clip:
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.detach()


def flat(tensors: Any) -> np.ndarray:
    """All elements of some tensors, float32 ``[D]``."""
    return torch.cat([tensor.detach().reshape(-1).float().cpu() for tensor in tensors]).numpy()


def gradients_of(model: nn.Module) -> np.ndarray:
    return flat(p.grad for p in model.parameters() if p.grad is not None)
