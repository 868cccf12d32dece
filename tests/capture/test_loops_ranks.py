"""Two ranks of DDP on this machine: rank 0 alone writes, and what both did is what it recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn, optim

from capture import Recorder, open_run
from tests.capture.rank_processes import RANKS, run_ranks

STEPS, DIES_AT = 4, 2


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def inputs_of(rank: int, step: int) -> torch.Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(100 * rank + step))


def train(path: Path, dies: bool) -> None:
    """What each process runs; rank 1 may die without a word before its third pass."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
    rank = distributed.get_rank()
    model = nn.parallel.DistributedDataParallel(make_model())
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Recorder(path, model, optimizer, every=1, clipped=False) as recorder:
        for step in range(STEPS):
            if dies and rank == 1 and step == DIES_AT:
                os._exit(3)
            optimizer.zero_grad()
            loss = model(inputs_of(rank, step)).square().mean()
            loss.backward()
            recorder.log(loss=loss)
            optimizer.step()
    assert recorder.step == STEPS
    assert recorder.complete == (rank == 0)
    assert (recorder.bytes_written > 0) == (rank == 0)
    distributed.destroy_process_group()


def start(path: Path, dies: bool) -> list[subprocess.CompletedProcess[str]]:
    """Run both ranks to their ends; what came out is by rank."""
    return run_ranks(__file__, path, *["dies"] * dies, options=["-W", "error::UserWarning"])


def mean_gradient(weights: np.ndarray, step: int) -> np.ndarray:
    """In one process, in float64: the mean over the ranks of the gradients of their batches."""
    model = make_model().double()
    nn.utils.vector_to_parameters(torch.from_numpy(weights).double(), model.parameters())
    both = torch.cat([inputs_of(rank, step) for rank in range(RANKS)]).double()
    found = torch.autograd.grad(model(both).square().mean(), list(model.parameters()))
    return torch.cat([gradient.reshape(-1) for gradient in found]).numpy()


def assert_rows(path: Path, steps: int) -> None:
    run = open_run(path)
    assert run.stream("minibatch").steps.tolist() == list(range(steps))
    assert run.table.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    for row in range(steps):
        expected = mean_gradient(run.stream("weights").read(row), row)
        # float32 against float64, of values below 1.
        assert run.stream("minibatch").read(row) == pytest.approx(expected, abs=3e-7)


def test_rank_0_records_the_mean_over_the_ranks(tmp_path: Path) -> None:
    ended = start(tmp_path / "run.zarr", dies=False)
    assert [each.returncode for each in ended] == [0, 0], [each.stderr for each in ended]
    assert_rows(tmp_path / "run.zarr", STEPS)
    run = open_run(tmp_path / "run.zarr")
    assert run.complete
    # What DDP writes into the gradients is not taken for clipping.
    assert run.scalar("clip_factor").tolist() == [1.0] * STEPS
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run.zarr"]


def test_a_rank_that_dies_leaves_an_incomplete_run(tmp_path: Path) -> None:
    survivor, dead = start(tmp_path / "run.zarr", dies=True)
    assert dead.returncode == 3
    # It ends by torch's own error, and not by ours.
    assert survivor.returncode == 1, survivor.stderr
    assert "RuntimeError" in survivor.stderr
    assert f"the run stays incomplete after {DIES_AT} updates" in survivor.stderr
    assert not open_run(tmp_path / "run.zarr").complete
    assert_rows(tmp_path / "run.zarr", DIES_AT)


if __name__ == "__main__":
    train(Path(sys.argv[1]), "dies" in sys.argv)
