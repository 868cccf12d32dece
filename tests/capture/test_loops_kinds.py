"""The recorder with the kinds of training that differ in what a step is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from capture import Recorder, open_run
from capture.store import Run, UnsupportedModelError

INPUTS = [torch.randn(8, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


def gradient_at(weights: np.ndarray, x: torch.Tensor, bf16: bool = False) -> np.ndarray:
    """The gradient at stored weights, by autograd on a model of its own."""
    model = make_model()
    nn.utils.vector_to_parameters(torch.from_numpy(weights), model.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = loss_of(model, x)
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.reshape(-1) for gradient in found]).numpy()


def train(
    path: Path, optimizer: optim.Optimizer, model: nn.Module, bf16: bool = False
) -> tuple[Run, np.ndarray, np.ndarray, np.ndarray]:
    """Record every step; the run, its weights ``[T+1, D]``, gradients and updates ``[T, D]``."""
    with Recorder(path, model, optimizer, every=1, gradients="minibatch,updates") as _:
        for x in INPUTS:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
    run = open_run(path)
    weights = np.stack([run.stream("weights").read(row) for row in range(len(INPUTS) + 1)])
    rows = range(len(INPUTS))
    gradients = np.stack([run.stream("minibatch").read(row) for row in rows])
    updates = np.stack([run.stream("updates").read(row) for row in rows])
    assert np.array_equal(updates, np.diff(weights, axis=0))
    for row, x in enumerate(INPUTS):
        assert np.array_equal(gradients[row], gradient_at(weights[row], x, bf16))
    return run, weights, gradients, updates


def test_autocast_keeps_float32_weights_and_gradients(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    run, weights, gradients, _ = train(tmp_path / "run.zarr", optimizer, model, bf16=True)
    assert {tensor.dtype for tensor in run.table.parameters} == {"F32"}
    # The passes did run in bfloat16: its rounding shows.
    assert not np.array_equal(gradients[0], gradient_at(weights[0], INPUTS[0]))


def two_groups(model: nn.Sequential) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Decay the matrices and not the norms and biases; the groups, and the decay by coordinate."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": 0.5},
        {"params": others, "weight_decay": 0.0, "lr": 0.02},
    ]
    by_tensor = [np.full(p.numel(), 0.5 if p.ndim > 1 else 0.0) for p in model.parameters()]
    return groups, np.concatenate(by_tensor)


def test_groups_with_their_own_decay_and_rate(tmp_path: Path) -> None:
    model = make_model()
    groups, decay = two_groups(model)
    optimizer = optim.SGD(groups, lr=0.1)
    run, weights, gradients, updates = train(tmp_path / "run.zarr", optimizer, model)
    assert [tensor.group for tensor in run.table.parameters] == [0, 1, 1, 1, 0, 1]
    assert run.scalar("group_weight_decay").tolist() == [[0.5, 0.0]] * 4
    assert run.scalar("group_lr").tolist() == [[0.1, 0.02]] * 4
    assert run.attributes["optimizer"]["weight_decay"] == "coupled"
    rate = np.where(decay > 0, 0.1, 0.02)
    # The decay is in the update and not in the gradient; float32 rounding of weights below 2.
    expected = -rate * (gradients + decay * weights[:-1])
    assert updates == pytest.approx(expected, abs=5e-7)


def test_adamw_decays_beside_the_gradient(tmp_path: Path) -> None:
    model = make_model()
    groups, decay = two_groups(model)
    optimizer = optim.AdamW(groups, lr=0.1, betas=(0.0, 0.0), eps=1e-3)
    run, weights, gradients, updates = train(tmp_path / "run.zarr", optimizer, model)
    assert run.attributes["optimizer"]["weight_decay"] == "decoupled"
    rate = np.where(decay > 0, 0.1, 0.02)
    # Without memory Adam's direction is g / (|g| + eps), and the decay stands beside it.
    wide = gradients.astype(float)
    expected = -rate * (wide / (np.abs(wide) + 1e-3) + decay * weights[:-1])
    assert updates == pytest.approx(expected, abs=2e-6)


class Signs(optim.Optimizer):
    """Steps by the sign of the gradient, and spoils the gradient over it."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad.sign_(), alpha=group["lr"])


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    model = make_model()
    optimizer = Signs(model.parameters(), lr=0.25)
    run, _, gradients, updates = train(tmp_path / "run.zarr", optimizer, model)
    facts = run.attributes["optimizer"]
    assert (facts["name"], facts["kind"], facts["weight_decay"]) == ("Signs", "other", "unknown")
    assert run.scalar("group_momentum").tolist() == [[0.0]] * 4
    assert run.scalar("group_weight_decay").tolist() == [[0.0]] * 4
    assert updates == pytest.approx(-0.25 * np.sign(gradients), abs=2e-7)


def test_a_compiled_model(tmp_path: Path) -> None:
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    run, *_ = train(tmp_path / "run.zarr", optim.SGD(compiled.parameters(), lr=0.1), compiled)
    assert run.table.names == tuple(name for name, _ in model.named_parameters())


def test_a_module_compiled_in_place(tmp_path: Path) -> None:
    model = make_model()
    model.compile(backend="eager")
    run, *_ = train(tmp_path / "run.zarr", optim.SGD(model.parameters(), lr=0.1), model)
    assert run.table.names == tuple(name for name, _ in model.named_parameters())


def test_fused_adam_with_a_scale_of_ones_own(tmp_path: Path) -> None:
    model = make_model()
    optimizer = optim.Adam(model.parameters(), lr=0.01, fused=True)
    scale = torch.tensor(64.0)
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=1) as recorder:
        for step, x in enumerate(INPUTS):
            optimizer.zero_grad()
            (scale * loss_of(model, x)).backward()
            # As GradScaler hands them to an optimizer that unscales by itself.
            optimizer.grad_scale, optimizer.found_inf = scale, torch.tensor(float(step == 1))
            optimizer.step()
    assert recorder.step == 3
    run = open_run(tmp_path / "run.zarr")
    for row, step in enumerate([0, 2, 3]):
        expected = gradient_at(run.stream("weights").read(row), INPUTS[step])
        # Multiplying by a power of two is exact.
        assert np.array_equal(run.stream("minibatch").read(row), expected)


def test_meta_parameters_are_refused_by_name(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match=r"meta device.*'0.weight'.*materialise"):
        Recorder(tmp_path / "run.zarr", model, optim.SGD(model.parameters(), lr=0.1))
    assert not (tmp_path / "run.zarr").exists()


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    store = torch.distributed.FileStore(str(tmp_path / "ranks"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sharded_parameters_are_refused_by_name(tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh))
    words = r"sharded tensor \(DTensor\).*'0.weight'.*plain DDP"
    with pytest.raises(UnsupportedModelError, match=words):
        Recorder(tmp_path / "run.zarr", model, optim.SGD(model.parameters(), lr=0.1))
    assert not (tmp_path / "run.zarr").exists()


@pytest.mark.usefixtures("one_rank")
def test_fully_sharded_models_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(UnsupportedModelError, match=r"sharded tensor \(DTensor\).*'0.weight'"):
        Recorder(tmp_path / "run.zarr", model, optim.SGD(model.parameters(), lr=0.1))
