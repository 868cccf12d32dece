"""Averaged weights as a stream: what is stored, and how far they are from the end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from analyze import measure_run
from capture import Average, Recorder
from capture.store import MismatchError, UsageError, open_run, verify_run


def test_a_moving_average_is_recorded_beside_the_weights(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = []
    with Recorder(
        tmp_path / "run.zarr",
        model,
        optimizer,
        every=2,
        gradients="minibatch,ema",
        sources={"ema": Average(averaged, model)},
    ) as recorder:
        for _ in range(5):
            kept.append(nn.utils.parameters_to_vector(averaged.parameters()).detach().clone())
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            averaged.update_parameters(model)
    assert recorder.complete
    kept.append(nn.utils.parameters_to_vector(averaged.parameters()).detach().clone())
    run = open_run(tmp_path / "run.zarr")
    assert run.stream("ema").steps.tolist() == [0, 2, 4, 5]
    for row, step in enumerate((0, 2, 4, 5)):
        np.testing.assert_array_equal(run.stream("ema").read(row), kept[step].numpy())
    assert verify_run(tmp_path / "run.zarr").sound
    end = run.stream("weights").read(3).astype(np.float64)
    rows = measure_run(tmp_path / "run.zarr", ["final"])["model"].to_pandas()
    found = rows[rows.stream == "ema"].set_index("step")
    for step in (0, 2, 4, 5):
        expected = np.linalg.norm(kept[step].numpy() - end)
        assert found.norm_dist[step] == pytest.approx(expected, rel=1e-12)
    assert found.cosine.isna().all()


def test_an_average_of_another_model_and_a_stream_without_a_source_are_refused(tmp_path):
    model = nn.Linear(4, 3)
    with pytest.raises(MismatchError, match="has not the parameters of the model"):
        Average(nn.Linear(4, 2), model)
    with pytest.raises(UsageError, match="no such gradient stream"):
        Recorder(tmp_path / "x.zarr", model, torch.optim.SGD(model.parameters()), gradients="ema")
