"""Runs that descend a bowl under an optimizer of torch, or walk a line from place to place."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from capture import Recorder
from tests.analyze.recorded import write_run

CURVATURE = 2.0


def record(
    path: Path,
    total: int,
    rate: Callable[[int], float],
    *,
    gradients: Sequence[str] = ("minibatch", "updates"),
    clip: float | None = None,
    noise: float = 1.0,
    round_bowl: bool = False,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    every: int = 1,
    **settings: Any,
) -> Path:
    """A noisy quadratic of 14 coordinates in float64, descended by an optimizer of torch."""
    rng = np.random.default_rng(5)
    model = nn.ParameterDict(
        {name: nn.Parameter(torch.tensor(rng.standard_normal(7))) for name in ("a", "b")}
    )
    h = np.full(7, CURVATURE) if round_bowl else np.geomspace(0.3, 3, 7)
    optimizer = make(model.parameters(), lr=rate(0), **settings)
    with Recorder(path, model, optimizer, every=every, gradients=gradients) as recorder:
        for step in range(total):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.zero_grad()
            for weight in model.values():
                pull = torch.tensor(noise * rng.standard_normal(7))
                loss = (torch.tensor(h) * weight.square() / 2 + pull * weight).sum()
                (-loss if settings.get("maximize") else loss).backward()  # type: ignore[no-untyped-call]
            if clip is not None:
                recorder.clip_grad_norm_(clip)
            optimizer.step()
    return path


def rates(step: int) -> float:
    """A warm-up with a drop: no two neighbours in one window need agree."""
    return 0.02 * (step + 1) if step < 10 else 0.05


def line(path: Path, positions: Sequence[float], rates: Sequence[float], **options: Any) -> Path:
    """A run in 25 coordinates along the first of them, from step to step."""
    weights = np.zeros((len(positions), 25), "f4")
    weights[:, 0] = positions
    scalars = {"loss": np.zeros(len(rates)), "lr": np.array(rates, np.float64)}
    streams = {"weights": weights, "updates": np.diff(weights, axis=0)}
    return write_run(path, streams, scalars=scalars, **options)
