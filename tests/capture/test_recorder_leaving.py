"""How a recorder is left: complete, by an exception, by a model that changed, by a full disk."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn, optim

from capture import Recorder, open_run
from capture.store import UnsupportedModelError, WriteError
from capture.store.verify import verify_run

STEPS = 7


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def momentum(model: nn.Module) -> optim.SGD:
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: optim.Optimizer) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()


def test_exception_leaves_the_run_incomplete_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model()
    optimizer = momentum(model)
    recorder = Recorder(tmp_path / "run.zarr", model, optimizer, every=2)
    train(model, optimizer)
    with pytest.raises(ZeroDivisionError), recorder:
        raise ZeroDivisionError
    run = open_run(tmp_path / "run.zarr")
    assert run.status == "recording"
    assert run.stream("weights").steps.tolist() == [0, 2, 4, 6]
    assert len(run.scalar("grad_norm")) == STEPS
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "incomplete after 7 updates" in caplog.text
    # The hooks are gone and leaving again does nothing.
    train(model, optimizer)
    recorder.close()
    assert recorder.step == STEPS
    assert open_run(tmp_path / "run.zarr").status == "recording"


def test_a_step_that_failed_and_is_tried_again_leaves_one_row(tmp_path: Path) -> None:
    class Flaky(optim.SGD):
        fail = True

        def step(self, closure: object = None) -> None:
            if self.fail:
                raise OSError("once")
            super().step()

    model = small_model()
    optimizer = Flaky(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=1) as recorder:
        model(torch.randn(8, 5)).square().mean().backward()
        with pytest.raises(OSError, match="once"):
            optimizer.step()
        optimizer.fail = False
        optimizer.step()
    assert recorder.step == 1
    assert open_run(tmp_path / "run.zarr").stream("weights").steps.tolist() == [0, 1]


def test_no_step_at_all(tmp_path: Path) -> None:
    model = small_model()
    with (
        pytest.warns(UserWarning, match="made no step"),
        Recorder(tmp_path / "run.zarr", model, momentum(model)),
    ):
        pass
    run = open_run(tmp_path / "run.zarr")
    assert (run.complete, run.final_step) == (True, 0)
    assert np.array_equal(
        run.stream("weights").read(0), nn.utils.parameters_to_vector(model.parameters()).detach()
    )


def test_changed_frozen_tensors_are_noted(tmp_path: Path) -> None:
    model = small_model()
    model[0].weight.requires_grad_(False)
    optimizer = momentum(model)
    recorder = Recorder(tmp_path / "run.zarr", model, optimizer)
    train(model, optimizer)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.warns(UserWarning, match="frozen tensors changed during the run: 0.weight"):
        recorder.close()
    assert open_run(tmp_path / "run.zarr").attributes["frozen_changed"] == ["0.weight"]


def test_changed_models_are_refused_by_name_at_the_next_step(tmp_path: Path) -> None:
    def frozen(model: nn.Sequential, optimizer: optim.Optimizer) -> None:
        model[0].weight.requires_grad_(False)

    def replaced(model: nn.Sequential, optimizer: optim.Optimizer) -> None:
        model[3] = nn.Linear(4, 2)

    def added(model: nn.Sequential, optimizer: optim.Optimizer) -> None:
        model.append(nn.Linear(2, 2))

    def widened(model: nn.Sequential, optimizer: optim.Optimizer) -> None:
        model.double()

    def regrouped(model: nn.Sequential, optimizer: optim.Optimizer) -> None:
        optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})

    words = {
        frozen: "'0.weight' was frozen",
        replaced: "'3.weight' was replaced",
        added: "'4.weight' was added",
        widened: "'0.weight' has another shape or dtype",
        regrouped: "the optimizer's parameter groups",
    }
    for change, expected in words.items():
        model = small_model()
        optimizer = momentum(model)
        path = tmp_path / f"{change.__name__}.zarr"
        recorder = Recorder(path, model, optimizer)
        train(model, optimizer)
        change(model, optimizer)
        with pytest.raises(UnsupportedModelError, match=expected), recorder:
            optimizer.step()
        assert open_run(path).status == "recording"


def test_a_buffer_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    model = small_model()
    optimizer = momentum(model)
    recorder = Recorder(tmp_path / "run.zarr", model, optimizer, every=1)
    model[1].running_mean = torch.zeros(5)
    expected = r"a buffer changed .*'1.running_mean'"
    with pytest.raises(UnsupportedModelError, match=expected), recorder:
        optimizer.step()


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on the size of files stands for the full disk: the system refuses the last bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def steps_of_large_model(path: Path) -> tuple[Recorder, Iterator[int]]:
    model = nn.Linear(200, 200)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(path, model, optimizer, every=1)

    def steps() -> Iterator[int]:
        while True:
            optimizer.zero_grad()
            model(torch.ones(1, 200)).sum().backward()
            optimizer.step()
            yield recorder.step

    return recorder, steps()


def test_a_full_disk_reaches_the_loop_within_the_next_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.zarr"
    recorder, steps = steps_of_large_model(path)
    while next(steps) < 3:
        pass
    recorder.checkpoint()  # which waits until the three rows are on disk
    expected = "cannot write, the file would be larger"
    with full_disk(), pytest.raises(WriteError, match=expected), recorder:
        for _ in zip(range(1000), steps, strict=False):
            pass
    # Two staging buffers may be under way; the step after them must hear of it.
    assert 3 <= recorder.step <= 6
    assert "the run stays incomplete after" in caplog.text
    run = open_run(path)
    assert run.status == "recording"
    assert run.stream("weights").steps.tolist() == [0, 1, 2]
    assert verify_run(path).sound


def test_a_disk_that_fills_up_at_the_very_end_is_no_success(tmp_path: Path) -> None:
    recorder, steps = steps_of_large_model(tmp_path / "run.zarr")
    next(steps)
    recorder.checkpoint()
    with full_disk(), pytest.raises(WriteError, match="larger"):
        recorder.close()
    assert not recorder.complete
    assert open_run(tmp_path / "run.zarr").status == "recording"


def test_a_run_that_holds_nothing_yet_does_not_block_the_corrected_loop(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    model = small_model()
    optimizer = momentum(model)
    with pytest.raises(RuntimeError, match="shapes"), Recorder(path, model, optimizer):
        model(torch.randn(8, 6))
    assert not path.exists()
    with Recorder(path, model, optimizer):
        train(model, optimizer)
    assert open_run(path).complete
