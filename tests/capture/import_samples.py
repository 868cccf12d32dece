"""A small training by hand, whose checkpoints the tests of the import write to files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from capture.store import Run, open_run
from capture.store.export import read_state

STEPS = (0, 5, 10, 20)

State = dict[str, torch.Tensor]


class Net(nn.Module):
    """Parameters, BatchNorm's buffers, one tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def states(
    save: Callable[[nn.Module, torch.optim.Optimizer, int], object],
    model: nn.Module | None = None,
) -> dict[int, State]:
    """Train, calling `save` at each of `STEPS`; return what every state_dict held then."""
    torch.manual_seed(3)
    model = model or Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    kept: dict[int, State] = {}
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            kept[step] = {name: value.clone() for name, value in model.state_dict().items()}
            save(model, optimizer, step)
        optimizer.zero_grad()
        dtype = next(model.parameters()).dtype
        model(torch.randn(8, 6, dtype=dtype)).square().mean().backward()
        optimizer.step()
    return kept


def assert_holds(path: Path, expected: dict[int, State], rename: str = "") -> Run:
    """Every number of the run is that of the state_dicts; names lose the prefix `rename`."""
    run = open_run(path)
    assert run.complete
    assert run.final_step == max(expected)
    weights = run.stream("weights")
    assert weights.steps.tolist() == sorted(expected)
    table = run.table
    named = (*table.parameters, *table.buffers, *table.frozen)
    for step, state in expected.items():
        bare = {name.removeprefix(rename): value for name, value in state.items()}
        assert {t.name for t in named} | {*table.aliases} == bare.keys()
        assert all(torch.equal(bare[alias], bare[name]) for alias, name in table.aliases.items())
        row = weights.read(weights.row_of(step))
        wide = [bare[name].double().reshape(-1) for name in table.names]
        np.testing.assert_array_equal(row.astype(np.float64), torch.cat(wide).numpy())
        held = read_state(run, step)
        for tensor in named:
            value = bare[tensor.name]
            assert tensor.shape == tuple(value.shape)
            raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert held[tensor.name] == raw, tensor.name
    return run


def half_frozen() -> Net:
    """Make a model that does not train its BatchNorm."""
    model = Net()
    model.norm.requires_grad_(False)
    return model


def save_all(folder: Path) -> dict[int, State]:
    """Write a file of torch for each of `STEPS`."""
    folder.mkdir(exist_ok=True)
    return states(lambda model, _, step: torch.save(model.state_dict(), folder / f"step_{step}.pt"))


class Wrapped(nn.Module):
    """A model all of whose names begin like those of DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
