"""The null, against paths with orthogonal gradients on which it is exact, and closed forms."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from analyze.controls import Null, OwnPath, end_step, own_path, sgd_recursion
from analyze.tables import measure_run
from capture import Recorder, open_run
from tests.analyze.recorded import OPTIMIZER, TABLE, random_run, read_rows

Values = NDArray[np.float64]

# Sums of at most a few hundred float64 terms of one sign.
EXACT = 1e-12


@dataclass(frozen=True)
class Settings:
    """Learning rate, momentum and decay of every step and group ``[S, G]``, dampening ``[G]``."""

    lr: Values
    momentum: Values
    decay: Values
    dampening: Values
    nesterov: bool

    @classmethod
    def constant(cls, total: int, lr: float, momentum: float = 0.0, nesterov: bool = False) -> Self:
        rates, betas, decay = (np.full((total, 1), value) for value in (lr, momentum, 0.0))
        return cls(rates, betas, decay, np.zeros(1), nesterov)

    def path(self, norms: Values, initial: Values, groups: NDArray[np.int64]) -> OwnPath:
        rules = (self.lr, self.momentum, self.decay, self.dampening)
        recursion = sgd_recursion(*rules, nesterov=self.nesterov)
        return OwnPath("SGD", recursion, norms, initial, groups)


def descend(settings: Settings, gradients: Values, start: Values, group: int) -> Values:
    """One tensor under torch's SGD: gradients ``[S, D]`` to weights ``[S + 1, D]``."""
    w, buffer, path = start.copy(), None, [start.copy()]
    for step, g in enumerate(gradients):
        lr, beta = settings.lr[step, group], settings.momentum[step, group]
        d = g + settings.decay[step, group] * w
        direction = d
        if beta != 0:
            damped = (1 - settings.dampening[group]) * d
            buffer = d if buffer is None else beta * buffer + damped
            direction = d + beta * buffer if settings.nesterov else buffer
        w = w - lr * direction
        path.append(w.copy())
    return np.array(path)


def draw_settings(rng: np.random.Generator, total: int, nesterov: bool, decayed: bool) -> Settings:
    """Settings that change at every step and differ by group; some steps without momentum."""
    momentum = rng.uniform(0.1, 0.95, (total, 2)) * (rng.random((total, 2)) > 0.2)
    decay = rng.uniform(0, 0.3, (total, 2)) * decayed
    dampening = np.zeros(2) if nesterov else rng.uniform(0, 0.5, 2)
    return Settings(rng.uniform(0, 0.2, (total, 2)), momentum, decay, dampening, nesterov)


@given(
    seed=st.integers(0, 2**32 - 1),
    total=st.integers(1, 25),
    end=st.integers(0, 25),
    nesterov=st.booleans(),
    decayed=st.booleans(),
)
def test_the_null_is_exact_where_gradients_are_orthogonal(
    seed: int, total: int, end: int, nesterov: bool, decayed: bool
) -> None:
    rng, end = np.random.default_rng(seed), min(end, total)
    settings = draw_settings(rng, total, nesterov, decayed)
    groups = np.array([0, 1, -1, 0])
    norms, sizes = rng.uniform(0.1, 3, (total, 4)), rng.uniform(0.1, 5, 4)
    found = settings.path(norms, sizes, groups).null(np.arange(total + 1), end)
    for tensor, group in enumerate(groups):
        # One dimension for w_0, one for each gradient.
        start = np.eye(total + 1)[0] * sizes[tensor]
        gradients = np.eye(total + 1)[1:] * norms[:, tensor, None]
        path = descend(settings, gradients, start, group) if group >= 0 else start[None]
        e = np.broadcast_to(path, (total + 1, total + 1)) - path[min(end, len(path) - 1)]
        for step in (step for step in range(total) if step != end):
            dot, dist = gradients[step] @ e[step], e[step] @ e[step]
            assert found.dot[step, tensor] == pytest.approx(dot, rel=EXACT, abs=1e-15)
            assert found.dist[step, tensor] == pytest.approx(dist, rel=EXACT, abs=1e-15)
    if end < total:
        assert np.isnan(found.dot[end]).all()
    assert np.isnan(found.dot[total]).all()


def cosine(null: Null) -> Values:
    found: Values = null.dot.sum(1) / np.sqrt(null.grad.sum(1) * null.dist.sum(1))
    return found


def literal_heavy_ball(lr: Values, beta: float, norms: Values) -> tuple[Values, Values]:
    """γ⁰ and η*⁰ as the definitions of the project write them, without weight decay."""
    a = np.zeros(len(lr) + 1)
    for t in reversed(range(len(lr))):
        a[t] = lr[t] + beta * a[t + 1]
    steps = range(len(lr))
    m2 = [sum(beta ** (2 * (t - 1 - r)) * norms[r] ** 2 for r in range(t)) for t in steps]
    tail = [sum(a[s] ** 2 * norms[s] ** 2 for s in range(t, len(lr))) for t in steps]
    null = [a[t] * norms[t] / np.sqrt(tail[t] + beta**2 * a[t] ** 2 * m2[t]) for t in steps]
    return np.array(null), a[:-1]


def literal_nesterov(lr: Values, beta: float, norms: Values) -> tuple[Values, Values]:
    a = np.zeros(len(lr) + 1)
    for t in reversed(range(len(lr))):
        a[t] = lr[t] + beta * a[t + 1]
    b, steps = lr + beta * a[:-1], range(len(lr))
    m2 = [sum(beta ** (2 * (t - 1 - r)) * norms[r] ** 2 for r in range(t)) for t in steps]
    tail = [sum(b[s] ** 2 * norms[s] ** 2 for s in range(t, len(lr))) for t in steps]
    null = [b[t] * norms[t] / np.sqrt(tail[t] + beta**4 * a[t] ** 2 * m2[t]) for t in steps]
    return np.array(null), b


@pytest.mark.parametrize("literal", [literal_heavy_ball, literal_nesterov])
def test_without_decay_it_is_the_formula_of_the_definitions(
    literal: Callable[..., tuple[Values, Values]],
) -> None:
    rng = np.random.default_rng(0)
    total, beta = 60, 0.9
    lr, norms = rng.uniform(0.01, 0.2, total), rng.uniform(0.1, 2, total)
    settings = Settings(
        lr[:, None], np.full((total, 1), beta), np.zeros((total, 1)), np.zeros(1),
        literal is literal_nesterov,
    )  # fmt: skip
    # w_0 may not enter: its norm is not even a number here.
    path = settings.path(norms[:, None], np.array([np.nan]), np.array([0]))
    found = path.null(np.arange(total), total)
    null, rate = literal(lr, beta, norms)
    assert cosine(found) == pytest.approx(null, rel=1e-13)
    assert (found.dot / found.grad)[:, 0] == pytest.approx(rate, rel=1e-13)


def test_plain_sgd_of_constant_size_has_the_null_of_a_random_walk() -> None:
    total = 500
    settings = Settings.constant(total, 0.1)
    steps = np.arange(total)
    found = settings.path(np.ones((total, 1)), np.ones(1), np.array([0])).null(steps, total)
    assert cosine(found) == pytest.approx(1 / np.sqrt(total - steps), rel=EXACT)
    assert (found.dot / found.grad)[:, 0] == pytest.approx(np.full(total, 0.1), rel=EXACT)


@pytest.mark.parametrize(("beta", "limit"), [(0.0, 1.0), (0.5, 0.75**0.5), (0.9, 0.19**0.5)])
def test_the_end_effect_of_the_last_update(beta: float, limit: float) -> None:
    # ‖m‖² tends to ‖g‖² / (1 - β²): after 400 steps 0.9^800 is below float64's resolution.
    total = 400
    settings = Settings.constant(total, 0.1, beta)
    path = settings.path(np.ones((total, 1)), np.ones(1), np.array([0]))
    assert cosine(path.null(np.array([total - 1]), total)) == pytest.approx(limit, rel=EXACT)


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
    settings = Settings(
        lr[:, None], np.full((total, 1), beta), np.zeros((total, 1)), np.zeros(1), nesterov
    )
    sizes = np.linalg.norm(gs, axis=1)[:, None]
    null = settings.path(sizes, np.ones(1), np.array([0])).null(np.arange(total), total)
    share = (null.dot / null.grad)[:, 0]
    a = np.append((share - lr) / beta, 0) if nesterov else np.append(share, 0)
    for t in range(total):
        made = sum(share[s] * gs[s] for s in range(t, total))
        made = made + (beta**2 if nesterov else beta) * a[t] * ms[t]
        # Rounding of 30 updates of weights of size 1, each 1e-16.
        assert ws[t] - ws[total] == pytest.approx(made, abs=1e-14)


def test_after_w_n_the_null_is_0() -> None:
    settings = Settings.constant(10, 0.1, 0.9)
    path = settings.path(np.ones((10, 1)), np.ones(1), np.array([0]))
    found = path.null(np.arange(11), 4)
    assert cosine(found)[5:10].tolist() == [0.0] * 5
    assert np.isnan(cosine(found)[[4, 10]]).all()


def test_more_steps_than_anybody_records_take_no_time() -> None:
    total, tensors = 100_000, 100
    settings = Settings.constant(total, 0.1, 0.9)
    norms = np.ones((total, tensors))
    path = settings.path(norms, np.ones(tensors), np.zeros(tensors, np.int64))
    path.null(np.array([0]), 1)  # compiles
    began = time.process_time()
    path.null(np.arange(0, total, 100), total)
    # 0.06 s on the machine where this was written; numpy step by step would take 2 s.
    assert time.process_time() - began < 1


# Through a recorded run.


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
    with Recorder(run, model, optimizer, every=1, clipped=False) as recorder:
        for step in range(total):
            optimizer.zero_grad()
            (model["a"][step + 1] * (1 + step) - 2 * model["b"][step + 1]).backward()
            if clipped:
                recorder.clip_grad_norm_(3.0)
            optimizer.step()
            schedule.step()
    tables = measure_run(str(run), by=["model", "tensor"])
    for table in tables.values():
        cosines, rates = (table[name].to_numpy() for name in ("cosine", "lolr"))
        assert np.isfinite(cosines).all()
        # The recorder's float64 norms and the clip factor's float32 in torch both enter.
        assert table["cosine_null"].to_numpy() == pytest.approx(cosines, rel=1e-12)
        assert table["lolr_null"].to_numpy() == pytest.approx(rates, rel=1e-12)
    if form == "sgd" and not decay:
        last = tables["tensor"].slice(2 * total - 2, 1).to_pylist()[0]
        assert last["cosine"] == pytest.approx(1.0, rel=1e-14)
        rate = 0.1 * 0.9 ** (total - 1)
        assert [last["rsi"], last["eb"]] == pytest.approx([1 / rate] * 2, rel=EXACT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "other", "name": "Adam"}, "no null: Adam has no closed form"),
        ({}, "no null: weight decay brings in ‖w_0‖"),
    ],
)
def test_where_there_is_no_null_the_reason_is_told(
    tmp_path: Path, change: dict[str, str], words: str
) -> None:
    path = random_run(
        tmp_path / "run.zarr", optimizer={**OPTIMIZER, **change}, initial_norm_by_tensor=None
    )
    reason = own_path(open_run(path))
    assert isinstance(reason, str)
    assert reason.startswith(words)


def test_a_gradient_that_was_missing_now_and_then_leaves_no_null(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr", gradient_missing={"head.weight": 2})
    reason = own_path(open_run(path))
    assert isinstance(reason, str)
    assert "'head.weight' had no gradient in 2 steps" in reason


def test_a_tensor_that_never_had_a_gradient_adds_nothing(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr", gradient_missing={"head.weight": 6})
    found = own_path(open_run(path))
    assert isinstance(found, OwnPath)
    assert found.groups.tolist() == [0, 1, -1, -1]


def test_what_the_null_reads_is_what_was_recorded(tmp_path: Path) -> None:
    path = random_run(tmp_path / "run.zarr")
    found, rows = own_path(open_run(path)), read_rows(path)
    assert isinstance(found, OwnPath)
    assert found.groups.tolist() == [0, 1, 0, -1]
    assert np.array_equal(found.grad_norms, rows.scalar("grad_norm_by_tensor"))
    first = np.split(rows["weights"][0], TABLE.offsets[1:-1])
    assert found.initial_norms == pytest.approx([np.linalg.norm(part) for part in first])
    assert "and to w_0, which weight decay brings in" in found.assumption()


def test_references_on_the_own_path(tmp_path: Path) -> None:
    run = open_run(random_run(tmp_path / "run.zarr"))
    wanted = {"final": 6, "step:4": 4, "mean:3": None, "file:w.safetensors": None, "run:b": None}
    assert {text: end_step(run, text) for text in wanted} == wanted
