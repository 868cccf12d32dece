"""Trainings of two processes in loops of others: recorded right, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from capture import open_run
from capture.store import Run
from tests.capture import ranked_loops
from tests.capture.rank_processes import RANKS, run_ranks
from tests.capture.ranked_loops import (
    ACCUMULATED,
    CLIP,
    FSDP,
    STEPS,
    all_inputs,
    inputs_of,
    mean_gradient,
)

# Starting takes most of it: two processes that import torch and the libraries.
pytestmark = pytest.mark.timeout(180)


def recorded(loop: str, path: Path) -> Run:
    ended = run_ranks(ranked_loops.__file__, loop, path)
    assert [each.returncode for each in ended] == [0, 0], [each.stderr for each in ended]
    run = open_run(path)
    assert run.complete
    return run


def test_zero_redundancy_optimizer(tmp_path: Path) -> None:
    run = recorded("zero", tmp_path / "run.zarr")
    weights = run.stream("weights")
    for row in range(STEPS):
        both = torch.cat([inputs_of(rank, row) for rank in range(RANKS)])
        expected = mean_gradient(weights.read(row), both)
        # float32 against float64, of values below 1.
        assert run.stream("minibatch").read(row) == pytest.approx(expected, abs=3e-7)
        update = weights.read(row + 1) - weights.read(row)
        assert np.array_equal(run.stream("updates").read(row), update)


def test_what_is_sharded_is_refused_on_every_rank(tmp_path: Path) -> None:
    """Pieces that are parameters by their looks would be recorded as if they were the model."""
    ended = run_ranks(ranked_loops.__file__, "fsdp", tmp_path / "run.zarr")
    for each in ended:
        assert each.returncode == 0, each.stderr
        told = dict(line.split(": ", 1) for line in each.stdout.splitlines())
        assert told.keys() == FSDP.keys()
        for words in told.values():
            assert words.startswith("UnsupportedModelError: a ")
            assert "shard" in words
            assert "cannot be recorded" in words
            assert words.endswith("plain DDP")
    assert not list(tmp_path.iterdir())


def test_accelerate_with_accumulation_and_clipping(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs straightway[accelerate]")
    run = recorded("accelerate", tmp_path / "run.zarr")
    per_update = len(all_inputs()) * ACCUMULATED // STEPS
    factors = run.scalar("clip_factor")
    assert (factors < 0.9).all()
    for row in range(STEPS // ACCUMULATED):
        x = all_inputs()[row * per_update : (row + 1) * per_update]
        expected = mean_gradient(run.stream("weights").read(row), x)
        assert factors[row] == pytest.approx(CLIP / np.linalg.norm(expected), rel=1e-4)
        stored = run.stream("minibatch").read(row)
        assert stored == pytest.approx(expected * factors[row], abs=3e-7)


def test_lightning_on_two_devices(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch", reason="needs straightway[lightning]")
    run = recorded("lightning", tmp_path / "run.zarr")
    assert run.table.names[0] == "net.0.weight"
    assert run.scalar("clip_factor").tolist() == [1.0] * STEPS
    for row in range(STEPS):
        both = torch.cat([inputs_of(rank, row) for rank in range(RANKS)])
        expected = mean_gradient(run.stream("weights").read(row), both)
        assert run.stream("minibatch").read(row) == pytest.approx(expected, abs=3e-7)
