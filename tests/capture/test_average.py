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
    # It goes a way of its own, and nobody took a loss there.
    assert found[["path_length", "straightness", "loss"]].isna().all(axis=None)
    assert rows[rows.stream == "minibatch"].path_length.notna().all()


@pytest.mark.parametrize("named", [False, True])
def test_a_resumed_average_goes_on_from_where_it_was(tmp_path, named):
    whole, parts = tmp_path / "whole.zarr", tmp_path / "parts.zarr"
    averaging(whole, 0, 20, named=named)
    with pytest.raises(KeyboardInterrupt):
        averaging(parts, 0, 15, named=named, stop=True)
    averaging(parts, None, 20, named=named)
    for name in ("weights", "ema"):
        one, other = open_run(whole).stream(name), open_run(parts).stream(name)
        assert one.steps.tolist() == other.steps.tolist()
        for row in range(len(one.steps)):
            np.testing.assert_array_equal(one.read(row), other.read(row))


def averaging(path, begin, end, *, named, stop=False):
    """A loop with an average; `begin` None resumes. Its batches follow from the step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(
        path,
        model,
        optimizer,
        every=5,
        gradients="minibatch,ema",
        sources={"ema": Average(averaged, model)},
        state={"average": averaged} if named else None,
        checkpoint_every=10,
        resume=begin is None,
    ) as recorder:
        while recorder.step < end:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(recorder.step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            averaged.update_parameters(model)
        if stop:
            raise KeyboardInterrupt


def test_an_average_of_another_model_and_a_stream_without_a_source_are_refused(tmp_path):
    model = nn.Linear(4, 3)
    with pytest.raises(MismatchError, match="has not the parameters of the model"):
        Average(nn.Linear(4, 2), model)
    with pytest.raises(UsageError, match="no such gradient stream"):
        Recorder(tmp_path / "x.zarr", model, torch.optim.SGD(model.parameters()), gradients="ema")
