"""The recorder on a GPU: where nothing is saved, the loop does not wait for the device."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import optim
from torch.nn.functional import cross_entropy

from capture import Recorder, open_run
from capture.interruption import Interrupted, StopRequest
from tests.capture.cuda_loops import (
    EVERY,
    OPTIMIZERS,
    STEPS,
    make_batches,
    make_model,
    needs_cuda,
    one_step,
)

pytestmark = needs_cuda

# So many cycles, about a tenth of a second, let the device fall behind the loop.
LONG = 200_000_000


def set_mode(mode: str) -> None:
    with warnings.catch_warnings():
        # That it is a prototype which does not see every wait; those of reading a tensor it sees.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it every wait for the device that torch knows of is an error."""
    set_mode("error")
    try:
        yield
    finally:
        set_mode("default")


def test_the_check_of_waiting_can_fail() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"), no_waiting():
        x.sum().item()
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"), no_waiting():
        x.cpu()


def train_without_waiting(
    path: Path, make: Callable[[Any], optim.Optimizer], clip: bool = False
) -> None:
    """A plain loop, which must not wait after its first step, and a recorded one."""
    model = make_model()
    optimizer = make(model.parameters())
    for step, batch in enumerate(make_batches()):
        with no_waiting() if step else nullcontext():
            one_step(model, optimizer, batch, clip=clip)
    model = make_model()
    optimizer = make(model.parameters())
    losses = []
    with Recorder(path, model, optimizer, every=EVERY, gradients="minibatch,updates") as recorder:
        for step, batch in enumerate(make_batches()):
            with no_waiting() if step % EVERY else nullcontext():
                losses.append(one_step(model, optimizer, batch, recorder, clip))
    run = open_run(path)
    assert run.stream("weights").steps.tolist() == [*range(0, STEPS, EVERY), STEPS]
    assert run.scalar("loss").tolist() == [float(loss) for loss in losses]


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_saves_nothing_does_not_wait(tmp_path: Path, name: str, clip: bool) -> None:
    train_without_waiting(tmp_path / "run.zarr", OPTIMIZERS[name], clip)


def test_a_learning_rate_on_the_device_is_not_waited_for(tmp_path: Path) -> None:
    rate = torch.tensor(1e-3, device="cuda")
    train_without_waiting(
        tmp_path / "run.zarr", lambda p: optim.Adam(p, lr=rate, capturable=True, foreach=True)
    )
    run = open_run(tmp_path / "run.zarr")
    assert run.scalar("lr").tolist() == [float(rate)] * STEPS
    assert run.scalar("group_lr").tolist() == [[float(rate)]] * STEPS


def test_the_loss_of_a_closure_is_not_waited_for(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=EVERY) as _:
        for step, (x, y) in enumerate(make_batches()):

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                return loss

            with no_waiting() if step % EVERY else nullcontext():
                losses.append(optimizer.step(closure).detach())
    found = open_run(tmp_path / "run.zarr").scalar("loss")
    assert found.tolist() == [float(loss) for loss in losses]


def test_scalars_that_arrive_late_are_written_in_order(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses, late = [], 0
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=1000) as recorder:
        assert recorder._snapshots is not None
        for step, batch in enumerate(make_batches(100)):
            if step % 10 == 5:
                torch.cuda._sleep(LONG // 10)
            losses.append(one_step(model, optimizer, batch, recorder))
            late = max(late, len(recorder._snapshots.scalars))
    # The loop did run ahead of the device, or nothing was tested.
    assert late >= 3
    found = open_run(tmp_path / "run.zarr").scalar("loss")
    assert found.tolist() == [float(loss) for loss in losses]


def test_a_state_holds_every_scalar_before_it_and_an_interruption_loses_none(
    tmp_path: Path,
) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    path, losses = tmp_path / "run.zarr", []
    recorder = Recorder(path, model, optimizer, every=1000)

    def loop() -> None:
        assert recorder._snapshots is not None
        with StopRequest() as stop, recorder:
            for step, batch in enumerate(make_batches()):
                if step == 4:
                    torch.cuda._sleep(LONG)
                losses.append(one_step(model, optimizer, batch, recorder))
                if step == 7:
                    assert len(recorder._snapshots.scalars) >= 3
                    os.kill(os.getpid(), signal.SIGTERM)
                if stop.signum is not None:
                    recorder.checkpoint()
                    # The state is on disk, and so are the scalars of all updates before it.
                    assert len(open_run(path).scalar("loss")) == recorder.step
                    raise Interrupted("stopped", signum=stop.signum)

    with pytest.raises(Interrupted):
        loop()
    assert recorder.step == 8
    found = open_run(path).scalar("loss")
    assert found.tolist() == [float(loss) for loss in losses]


def test_an_error_in_the_loop_loses_no_scalar(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    recorder = Recorder(tmp_path / "run.zarr", model, optimizer, every=1000)
    one_step(model, optimizer, make_batches()[0], recorder)
    torch.cuda._sleep(LONG)
    for batch in make_batches()[1:]:
        one_step(model, optimizer, batch, recorder)
    with pytest.raises(ZeroDivisionError), recorder:
        raise ZeroDivisionError
    assert len(open_run(tmp_path / "run.zarr").scalar("loss")) == STEPS
