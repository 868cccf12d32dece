"""Sources of a user's own: recorded as they are, and refused by name where they do not fit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from capture import Recorder
from capture.store import UsageError, open_run


class Source:
    """Gives what it was given, for each of two batches."""

    batches = 2

    def __init__(self, gradient, loss=1.5):
        self.gradient, self.loss = gradient, loss

    def measure(self, batch):
        return SimpleNamespace(gradient=self.gradient, loss=self.loss)

    def describe(self):
        return {"kind": "own"}


def record(path, sources, gradients="minibatch,own"):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(path, model, optimizer, every=2, gradients=gradients, sources=sources):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()


def test_a_source_is_recorded_at_every_saved_step_and_at_the_end(tmp_path):
    source = Source([torch.full((2, 3), 7.0), None])
    record(tmp_path / "run.zarr", {"own": source})
    stream = open_run(tmp_path / "run.zarr").stream("own")
    assert stream.steps.tolist() == [0, 2, 3]
    assert stream.batches == 2
    np.testing.assert_array_equal(stream.read(1, 1), [7.0] * 6 + [0.0] * 2)
    assert stream.losses.tolist() == [[1.5, 1.5]] * 3


@pytest.mark.parametrize(
    ("gradient", "words"),
    [
        ([torch.ones(1, 3), None], r"'weight' must have shape \[2, 3\], found \[1, 3\]"),
        ([torch.ones(2, 3)], "2 tensors are expected, found 1"),
        ([np.ones((2, 3)), None], "'weight' must be a tensor or None, found a ndarray"),
        (None, "2 tensors are expected, found no sequence"),
    ],
)
def test_what_does_not_fit_is_refused_by_stream_and_tensor(tmp_path, gradient, words):
    with pytest.raises(UsageError, match=words) as caught:
        record(tmp_path / "run.zarr", {"own": Source(gradient)})
    assert "sources['own']" in str(caught.value)


def test_what_is_no_source_or_has_no_stream_is_refused(tmp_path):
    good = Source([None, None])
    for sources, gradients, words in (
        ({"own": object()}, "minibatch,own", "a object is no source"),
        ({"own": good}, "minibatch", "a source whose stream is not asked for"),
        ({"minibatch": good}, "minibatch", "the training itself gives this stream"),
        (None, "minibatch,own", "no such gradient stream"),
        ({"own": Source([None, None], "much")}, "own", "the loss must be a number or None"),
    ):
        with pytest.raises(UsageError, match=words):
            record(tmp_path / "run.zarr", sources, gradients)
        path = tmp_path / "run.zarr"
        if path.exists():
            path.rename(tmp_path / f"{len(list(tmp_path.iterdir()))}.zarr")
