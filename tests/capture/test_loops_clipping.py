"""Clipping behind the recorder's back is noticed, and nothing else is taken for it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from capture import Recorder, open_run

INPUTS = [torch.randn(8, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)]
NOTICE = "changes gradients between the backward pass.*clip_grad_norm_"


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def replace(model: nn.Module) -> None:
    model[0].weight.grad = model[0].weight.grad * 0.5


def scale_in_place(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad.mul_(0.5)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "norm": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    "value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-4),
    "in place": scale_in_place,
    "one": lambda model: model[2].bias.grad.add_(1.0),
    "replaced": replace,
}


def train(
    path: Path, change: Callable[[nn.Module], Any], **options: Any
) -> tuple[np.ndarray, list[str]]:
    """Train with `change` after every second backward pass; factors and warnings."""
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with (
        warnings.catch_warnings(record=True) as caught,
        Recorder(path, model, optimizer, every=1, **options) as _,
    ):
        warnings.simplefilter("always")
        for step, x in enumerate(INPUTS):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            if step % 2:
                change(model)
            optimizer.step()
    return open_run(path).scalar("clip_factor"), [str(each.message) for each in caught]


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_broken_promise_is_unknown_and_said_once(
    tmp_path: Path, change: Callable[[nn.Module], Any]
) -> None:
    factors, messages = train(tmp_path / "run.zarr", change, clipped=False)
    assert np.array_equal(factors, [1.0, math.nan, 1.0, math.nan], equal_nan=True)
    assert len(messages) == 1
    assert "recorder.clip_grad_norm_(max_norm)" in messages[0]


def test_without_a_promise_clipping_is_said_once_too(tmp_path: Path) -> None:
    factors, messages = train(tmp_path / "run.zarr", CHANGES["norm"])
    assert np.isnan(factors).all()
    assert len(messages) == 1


def test_the_warning_as_an_error_leaves_the_run_incomplete(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(tmp_path / "run.zarr", model, optimizer)
    loss_of(model, INPUTS[0]).backward()
    scale_in_place(model)
    with pytest.raises(UserWarning, match=NOTICE), recorder:
        optimizer.step()
    assert not recorder.complete


def test_a_change_after_the_recorders_own_clipping_is_noticed(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer) as recorder:
        loss_of(model, INPUTS[0]).backward()
        recorder.clip_grad_norm_(1e-3)
        scale_in_place(model)
        with pytest.warns(UserWarning, match=NOTICE):
            optimizer.step()
    assert np.isnan(open_run(tmp_path / "run.zarr").scalar("clip_factor")).all()


# In all that follows a warning would be an error, as everywhere in the tests.


def test_the_recorders_own_clipping_is_known(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with Recorder(tmp_path / "run.zarr", model, optimizer, clipped=False) as recorder:
        for x in INPUTS:
            optimizer.zero_grad()
            scaler.scale(loss_of(model, x)).backward()
            scaler.unscale_(optimizer)
            recorder.clip_grad_norm_(1e-3)
            scaler.step(optimizer)
            scaler.update()
    factors = open_run(tmp_path / "run.zarr").scalar("clip_factor")
    assert ((factors > 0) & (factors < 1)).all()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_unscaling_and_accumulation_are_no_clipping(
    tmp_path: Path, set_to_none: bool, fused: bool
) -> None:
    model = make_model()
    optimizer = optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with Recorder(tmp_path / "run.zarr", model, optimizer, clipped=False) as _:
        for step in range(6):
            optimizer.zero_grad(set_to_none=set_to_none)
            for x in INPUTS[:3]:
                scaler.scale(loss_of(model, x)).backward()
            if step % 2 and not fused:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert open_run(tmp_path / "run.zarr").scalar("clip_factor").tolist() == [1.0] * 6


def test_a_tensor_without_its_part_in_the_last_pass_is_no_clipping(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, clipped=False) as _:
        for x in INPUTS:
            loss_of(model, x).backward()
            optimizer.step()
            # Zeroed in place, and the second layer alone has a gradient in the next pass.
            optimizer.zero_grad(set_to_none=False)
            loss_of(model[2], x[:, :4]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert open_run(tmp_path / "run.zarr").scalar("clip_factor").tolist() == [1.0] * 8


def test_a_backward_pass_that_raised_is_no_clipping(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    def fail(gradient: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    with Recorder(tmp_path / "run.zarr", model, optimizer, clipped=False) as _:
        handle = model[0].weight.register_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            loss_of(model, INPUTS[0]).backward()
        handle.remove()
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, INPUTS[0]).backward()
        optimizer.step()
    assert open_run(tmp_path / "run.zarr").scalar("clip_factor").tolist() == [1.0]


def test_reentrant_checkpointing_is_no_clipping(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, clipped=False) as _:
        for x in INPUTS:
            optimizer.zero_grad()
            x = x.clone().requires_grad_()
            hidden = torch.utils.checkpoint.checkpoint(model[0], x, use_reentrant=True)
            loss_of(model[1:], hidden).backward()
            optimizer.step()
    assert open_run(tmp_path / "run.zarr").scalar("clip_factor").tolist() == [1.0] * 4


def test_no_hook_is_left_behind_nor_copied(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer) as _:
        assert all(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
        average = copy.deepcopy(model)
        assert not any(p._post_accumulate_grad_hooks for p in average.parameters())
        loss_of(model, INPUTS[0]).backward()
        optimizer.step()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
