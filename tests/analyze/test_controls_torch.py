"""The null against torch's own SGD: the identity it rests on, and recorded runs that show it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from analyze.controls import OwnPath, sgd_recursion
from analyze.tables import measure_run
from capture import Recorder


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_identity_of_the_path_holds_for_any_gradients(nesterov: bool) -> None:
    """e_t = Σ a_s g_s + β a_t m_{t-1}, with β² a_t in Nesterov's form, on gradients of a loss."""
    total, beta = 30, 0.9
    rng = np.random.default_rng(1)
    target = torch.tensor(rng.standard_normal((20, 5)))
    inputs = torch.tensor(rng.standard_normal((20, 7)))
    weight = torch.tensor(rng.standard_normal((5, 7)), requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=beta, nesterov=nesterov)
    lr, ws, gs, ms = rng.uniform(0.01, 0.05, total), [], [], [np.zeros(35)]
    for step in range(total):
        optimizer.param_groups[0]["lr"] = lr[step]
        optimizer.zero_grad()
        loss = ((inputs @ weight.T).tanh() - target).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        ws.append(weight.detach().numpy().ravel().copy())
        gs.append(weight.grad.numpy().ravel().copy())
        optimizer.step()
        ms.append(optimizer.state[weight]["momentum_buffer"].numpy().ravel().copy())
    ws.append(weight.detach().numpy().ravel().copy())
    settings = (lr[:, None], np.full((total, 1), beta), np.zeros((total, 1)), np.zeros(1))
    recursion = sgd_recursion(*settings, nesterov=nesterov)
    sizes = np.linalg.norm(gs, axis=1)[:, None]
    path = OwnPath("SGD", recursion, sizes, np.ones(1), np.array([0]))
    null = path.null(np.arange(total), total)
    share = (null.dot / null.grad)[:, 0]
    a = np.append((share - lr) / beta, 0) if nesterov else np.append(share, 0)
    for t in range(total):
        made = sum(share[s] * gs[s] for s in range(t, total))
        made = made + (beta**2 if nesterov else beta) * a[t] * ms[t]
        # Rounding of 30 updates of weights of size 1, each 1e-16.
        assert ws[t] - ws[total] == pytest.approx(made, abs=1e-14)


@pytest.mark.parametrize("form", ["sgd", "momentum", "nesterov", "maximize", "dampening"])
@pytest.mark.parametrize(("decay", "clipped"), [(0.0, False), (0.1, True)])
def test_a_recorded_run_with_orthogonal_gradients_shows_its_null(
    tmp_path: Path, form: str, decay: float, clipped: bool
) -> None:
    """A linear loss: torch's own SGD in float64, two groups, one of them with its own rate."""
    total = 12
    model = torch.nn.ParameterDict(
        {name: torch.zeros(total + 1, dtype=torch.float64) for name in ("a", "b")}
    )
    with torch.no_grad():
        model["a"][0], model["b"][0] = 1.5, -2.0
    extra: dict[str, Any] = {
        "sgd": {},
        "momentum": {"momentum": 0.9},
        "nesterov": {"momentum": 0.9, "nesterov": True},
        "maximize": {"momentum": 0.9, "maximize": True},
        "dampening": {"momentum": 0.9, "dampening": 0.3},
    }[form]
    groups: list[dict[str, Any]] = [
        {"params": [model["a"]]},
        {"params": [model["b"]], "lr": 0.3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=decay, **extra)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    run = tmp_path / "run.zarr"
    streams = "minibatch,updates"
    with Recorder(run, model, optimizer, every=1, gradients=streams, clipped=False) as recorder:
        for step in range(total):
            optimizer.zero_grad()
            (model["a"][step + 1] * (1 + step) - 2 * model["b"][step + 1]).backward()
            if clipped:
                recorder.clip_grad_norm_(3.0)
            optimizer.step()
            schedule.step()
    tables = measure_run(str(run), by=["model", "tensor"])
    for both in tables.values():
        table, updates = (both.filter(pc.field("stream") == name) for name in streams.split(","))
        # An update is what is left of two neighbouring weights.
        near = {"rel": 1e-9, "abs": 1e-12}
        for name in ("cosine_update", "lolr_update"):
            assert updates[f"{name}_null"].to_numpy() == pytest.approx(
                updates[name].to_numpy(), **near
            )
        cosines, rates = (table[name].to_numpy() for name in ("cosine", "lolr"))
        assert np.isfinite(cosines).all()
        # The recorder's float64 norms and the clip factor's float32 in torch both enter.
        assert table["cosine_null"].to_numpy() == pytest.approx(cosines, rel=1e-12)
        assert table["lolr_null"].to_numpy() == pytest.approx(rates, rel=1e-12)
    if form == "sgd" and not decay:
        own = tables["tensor"].filter(pc.field("stream") == "minibatch")
        last = own.slice(2 * total - 2, 1).to_pylist()[0]
        assert last["cosine"] == pytest.approx(1.0, rel=1e-14)
        rate = 0.1 * 0.9 ** (total - 1)
        assert [last["rsi"], last["eb"]] == pytest.approx([1 / rate] * 2, rel=1e-12)
