"""Record once, analyze afterwards: the same numbers as the paper's protocol and as closed forms."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.linalg import norm
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import nn

from analyze.tables import measure_run
from capture import Recorder

Values = NDArray[np.float64]

STEPS, DECAY, MOMENTUM = 25, 1e-2, 0.9


def training() -> tuple[nn.Module, torch.optim.Optimizer, Iterator[None]]:
    """A small BatchNorm network in float32; advancing the iterator computes a gradient.

    Weight decay reaches the weights and not the biases and scales, as is usual.
    """
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    inputs, labels = torch.randn(80, 12), torch.randint(3, (80,))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": DECAY},
        {"params": rest},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=MOMENTUM)

    def gradients() -> Iterator[None]:
        order = torch.Generator().manual_seed(4)
        for _ in range(STEPS):
            batch = torch.randperm(80, generator=order)[:16]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            yield

    return model, optimizer, gradients()


def flat(model: nn.Module, read: Callable[[nn.Parameter], torch.Tensor]) -> NDArray[np.float32]:
    return np.concatenate([read(p).detach().numpy().ravel() for p in model.parameters()]).copy()


def weights(model: nn.Module) -> NDArray[np.float32]:
    return flat(model, lambda parameter: parameter)


def gradient(model: nn.Module) -> NDArray[np.float32]:
    return flat(model, lambda parameter: parameter.grad)  # type: ignore[arg-type, return-value]


def train_twice() -> list[dict[str, float]]:
    """The paper's protocol: learn w*, then train again and measure in every step."""
    model, optimizer, steps = training()
    for _ in steps:
        optimizer.step()
    reference = weights(model).astype(np.float64)

    model, optimizer, steps = training()
    decay = np.concatenate([np.full(p.numel(), DECAY * (p.ndim > 1)) for p in model.parameters()])
    rows = []
    for _ in steps:
        before, g = weights(model), gradient(model).astype(np.float64)
        optimizer.step()
        # In float32, as both protocols see it: what the subtraction rounds is no matter of theirs.
        u = (weights(model) - before).astype(np.float64)
        w = before.astype(np.float64)
        rows.append(measured(w - reference, g, g + decay * w, u))
    return rows


def measured(e: Values, g: Values, h: Values, u: Values) -> dict[str, float]:
    return {
        "norm_dist": norm(e),
        "norm_grad": norm(g),
        "dot_prod": g @ e,
        "rsi": g @ e / norm(e) ** 2,
        "eb": norm(g) / norm(e),
        "cosine": g @ e / norm(g) / norm(e),
        "lolr": g @ e / norm(g) ** 2,
        "norm_grad_wd": norm(h),
        "dot_prod_wd": h @ e,
        "rsi_wd": h @ e / norm(e) ** 2,
        "eb_wd": norm(h) / norm(e),
        "cosine_wd": h @ e / norm(h) / norm(e),
        "lolr_wd": h @ e / norm(h) ** 2,
        "norm_update": norm(u),
        "dot_prod_update": u @ e,
        "cosine_update": u @ e / norm(u) / norm(e),
        "lolr_update": -(u @ e) / norm(u) ** 2,
    }


def test_one_recorded_training_gives_what_two_trainings_measured(tmp_path: Path) -> None:
    model, optimizer, steps = training()
    streams = ("minibatch", "updates")
    with Recorder(tmp_path / "run.zarr", model, optimizer, every=1, gradients=streams):
        for _ in steps:
            optimizer.step()
    rows = measure_run(str(tmp_path / "run.zarr"))["model"].to_pylist()
    by_stream = {name: [row for row in rows if row["stream"] == name] for name in streams}
    expected = train_twice()
    assert len(expected) == STEPS
    for step, wanted in enumerate(expected):
        for name, value in wanted.items():
            row = by_stream["updates" if name.endswith("_update") else "minibatch"][step]
            assert row["step"] == step
            # Equal float32 bits go in; what remains is the order of sums in float64.
            assert row[name] == pytest.approx(value, rel=1e-9)
    # This run has a null, and early on it is not what was measured: the way is no random walk.
    found = ([row[name] for row in by_stream["minibatch"]] for name in ("cosine", "cosine_null"))
    cosine, null = map(np.array, found)
    assert ((null > 0) & (null < 1)).all()
    assert np.median(cosine[:8] / null[:8]) > 1.2


def descend_quadratic(path: Path, h: Values, start: Values, lr: float, total: int) -> Path:
    """Plain gradient descent on ½ Σ h_i w_i², recorded in float64: w_t = (1 - η h)^t w_0."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor(start))})
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with Recorder(path, model, optimizer, every=1):
        for _ in range(total):
            optimizer.zero_grad()
            (torch.tensor(h) * model["w"].square()).sum().mul(0.5).backward()
            optimizer.step()
    return path


def column(path: Path, reference: str = "final") -> Callable[[str], Values]:
    table: Any = measure_run(str(path), [reference], streams=["minibatch"])["model"]
    return lambda name: table[name].to_numpy()


def test_on_a_round_bowl_all_quantities_are_known(tmp_path: Path) -> None:
    curvature, lr, total = 2.0, 0.05, 20
    start = np.array([1.0, -2.0, 0.5])
    path = descend_quadratic(tmp_path / "run.zarr", np.full(3, curvature), start, lr, total)
    found, steps = column(path), np.arange(total)
    factor = 1 - lr * curvature
    # e_t = (1 - q^(T - t)) w_t and g_t = c w_t, both along w_t.
    rest = 1 - factor ** (total - steps)
    size = norm(start) * factor**steps
    expected = {
        "norm_dist": rest * size,
        "norm_grad": curvature * size,
        "cosine": np.ones(total),
        "rsi": curvature / rest,
        "eb": curvature / rest,
        "lolr": rest / curvature,
    }
    for name, values in expected.items():
        # 20 steps of rounding, and 1 - q^(T - t) loses one digit at the end.
        assert found(name) == pytest.approx(values, rel=1e-13)
    # The end effect, whatever the curvature: RSI and EB are 1/η in the last step.
    assert found("rsi")[-1] == pytest.approx(1 / lr, rel=1e-13)


def test_on_a_long_valley_bounds_hold_against_the_minimum(tmp_path: Path) -> None:
    h, start, lr, total = np.array([0.5, 4.0]), np.array([1.0, 1.0]), 0.1, 30
    path = descend_quadratic(tmp_path / "run.zarr", h, start, lr, total)
    save_file({"w": np.zeros(2)}, tmp_path / "minimum.safetensors")
    found = column(path, f"file:{tmp_path / 'minimum.safetensors'}")
    w = (1 - lr * h) ** np.arange(total)[:, None] * start
    assert found("rsi") == pytest.approx((h * w * w).sum(1) / (w * w).sum(1), rel=1e-13)
    assert found("eb") == pytest.approx(norm(h * w, axis=1) / norm(w, axis=1), rel=1e-13)
    assert (found("rsi") >= 0.5).all()
    assert (found("eb") <= 4.0).all()
    # A plain step changes the squared distance by 1 - γ² [1 - (1 - η/η*)²] exactly.
    gain = 1 - found("cosine") ** 2 * (1 - (1 - lr / found("lolr")) ** 2)
    dist = found("norm_dist")
    assert dist[1:] ** 2 == pytest.approx(dist[:-1] ** 2 * gain[:-1], rel=1e-13)


def test_a_diagonal_quadratic_against_its_own_end(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    h, start, lr, total = rng.uniform(0.1, 5, 40), rng.standard_normal(40), 0.1, 15
    path = descend_quadratic(tmp_path / "run.zarr", h, start, lr, total)
    found = column(path)
    powers = (1 - lr * h) ** np.arange(total + 1)[:, None] * start
    e, g = powers[:-1] - powers[-1], h * powers[:-1]
    dot = (g * e).sum(1)
    assert found("cosine") == pytest.approx(dot / norm(g, axis=1) / norm(e, axis=1), rel=1e-12)
    assert found("lolr") == pytest.approx(dot / (g * g).sum(1), rel=1e-12)
    assert found("z") == pytest.approx(dot / norm(g * e, axis=1), rel=1e-12)
