"""The norm of SGD's updates without a difference, against the difference of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from capture import Recorder, open_run
from capture.norms import Norms
from capture.update_norms import SgdUpdateNorms

STEPS = 4
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}

TOLD: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "momentum, decay": {"momentum": 0.9, "weight_decay": 0.1},
    "dampening": {"momentum": 0.9, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "maximize": {"maximize": True},
    "maximize, decay": {"maximize": True, "weight_decay": 0.1},
    "maximize, momentum, decay": {"maximize": True, "momentum": 0.9, "weight_decay": 0.1},
    "maximize, nesterov": {"maximize": True, "momentum": 0.9, "nesterov": True},
}
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "tensor rate": {"lr": torch.tensor(0.05), "foreach": False},
}


class Subclass(optim.SGD):
    """May do anything, for all we know."""


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    # A matrix whose memory is not in the order of its elements, and sizes beyond one chunk.
    values = [torch.randn(shape, generator=generator) for shape in ((40, 60), 300_003, 7, 3)]
    values[0] = values[0].t()
    return [nn.Parameter(value.to(dtype)) for value in values]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    """Gradients; that of the last tensor is sometimes missing, that of the one before always."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        # In the order of memory of the weights, as autograd makes them.
        parameter.grad = torch.empty_like(parameter.detach()).normal_(generator=generator)
    parameters[2].grad = None
    if step == 2:
        parameters[3].grad = None


def told(
    optimizer: optim.Optimizer, parameters: list[nn.Parameter]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step: the norms that are told, those of the difference in float64, and of w_{t+1}."""
    tensors: list[torch.Tensor] = list(parameters)
    norms = Norms(parameters[0].dtype)
    sgd = SgdUpdateNorms(optimizer, tensors, norms)
    with torch.no_grad():
        gradients = [parameter.grad for parameter in parameters]
        before = [parameter.detach().double().clone() for parameter in parameters]
        assert sgd.begin(gradients, norms.of(gradients), None)
        optimizer.step()
        found = sgd.end().numpy()
        after = [parameter.detach().double() for parameter in parameters]
    differences = [float((a - b).norm()) for a, b in zip(after, before, strict=True)]
    return found, np.array(differences), np.array([float(a.norm()) for a in after])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", TOLD)
def test_agrees_with_the_difference(settings: str, form: str, dtype: torch.dtype) -> None:
    parameters = make_parameters(dtype)
    options = {"lr": 0.01, **TOLD[settings], **FORMS[form]}
    optimizer = optim.SGD(parameters, **options)
    for step in range(STEPS):
        set_gradients(parameters, step)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] / 2  # as a schedule does
        found, difference, weights = told(optimizer, parameters)
        # Rounding w_{t+1} moves each element by at most eps / 2 of it, so the norm by at most as
        # much; the rest is rounding within the step: of lr to the precision of the weights, of the
        # direction, whose parts may cancel, and of the sums of squares.
        allowed = EPS[dtype] * (weights + 20 * difference)
        assert (np.abs(found - difference) <= allowed).all()
        assert found[2] == 0.0


def test_one_group_of_several_and_a_tensor_without_group() -> None:
    parameters = make_parameters()
    groups = [
        {"params": parameters[:1], "lr": 0.1, "momentum": 0.9},
        {"params": parameters[1:2], "weight_decay": 0.1},
    ]
    optimizer = optim.SGD(groups, lr=0.01)
    for step in range(STEPS):
        set_gradients(parameters, step)
        found, difference, weights = told(optimizer, parameters)
        assert (np.abs(found - difference) <= EPS[torch.float32] * (weights + 20)).all()
        assert found[2:].tolist() == [0.0, 0.0]
    # Asking left the optimizer's state as it was.
    assert parameters[3] not in optimizer.state


def hooked(parameters: list[nn.Parameter]) -> optim.Optimizer:
    optimizer = optim.SGD(parameters, lr=0.1)
    for _ in range(3):
        optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def half(parameters: list[nn.Parameter]) -> optim.Optimizer:
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
        parameter.grad = None
    return optim.SGD(parameters, lr=0.1)


def turned(parameters: list[nn.Parameter]) -> optim.Optimizer:
    grad = parameters[0].grad
    assert grad is not None
    parameters[0].grad = grad.contiguous()
    return optim.SGD(parameters, lr=0.1, weight_decay=0.1)


def sparse(parameters: list[nn.Parameter]) -> optim.Optimizer:
    grad = parameters[0].grad
    assert grad is not None
    parameters[0].grad = grad.to_sparse()
    return optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: optim.SGD(p, lr=0.1, differentiable=True),
        lambda p: optim.Adam(p, lr=0.1),
        lambda p: Subclass(p, lr=0.1),
        hooked,
        half,
        turned,
        sparse,
    ],
)
def test_what_is_not_told(make: Any) -> None:
    parameters = make_parameters()
    set_gradients(parameters, 0)
    optimizer = make(parameters)
    gradients = [parameter.grad for parameter in parameters]
    norms = Norms(torch.float32)
    sgd = SgdUpdateNorms(optimizer, list(parameters), norms)
    assert not sgd.begin(gradients, norms.of(gradients), None)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fused_under_a_scaler(tmp_path: Path, momentum: float) -> None:
    """The kernel divides by the scale, and leaves out a step with an infinite gradient."""
    model = nn.Linear(300, 20)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=momentum, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = []
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=2) as recorder:
        for step in range(STEPS):
            before = model.weight.detach().clone()
            optimizer.zero_grad()
            loss = model(torch.randn(8, 300)).square().mean()
            scaler.scale(loss).backward()
            if step == 1:
                assert model.weight.grad is not None
                model.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            if step != 1:
                expected.append(float((model.weight.detach() - before).double().norm()))
    assert recorder.step == STEPS - 1
    found = open_run(tmp_path / "run.zarr").scalar("update_norm_by_tensor")[:, 0]
    # As above: rounding relative to weights of norm 2.6 beside updates of at least 0.01.
    assert found == pytest.approx(expected, rel=1e-5)


def test_sgd_needs_no_copy_of_the_weights(tmp_path: Path) -> None:
    kept = {}
    for name, maker in (("sgd", optim.SGD), ("adam", optim.Adam)):
        model = nn.Linear(30, 20)
        optimizer = maker(model.parameters(), lr=0.1)  # type: ignore[operator]
        with Recorder(tmp_path / f"{name}.zarr", model, optimizer, every=2) as recorder:
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(8, 30)).square().mean().backward()
                optimizer.step()
            assert recorder._snapshots is not None
            kept[name] = len(recorder._snapshots._weights._copies)
    assert kept == {"sgd": 0, "adam": 2}
