"""The null, against paths with orthogonal gradients on which it is exact, and closed forms."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from analyze.controls import Null, OwnPath, sgd_recursion

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
            u = path[step + 1] - path[step] if group >= 0 else np.zeros(total + 1)
            # A difference of weights of up to 5 keeps 16 digits of these, not of itself.
            near = {"rel": EXACT, "abs": 1e-13}
            assert found.update_dot[step, tensor] == pytest.approx(u @ e[step], **near)
            assert found.update_square[step, tensor] == pytest.approx(u @ u, **near)
    if end < total:
        assert np.isnan(found.dot[end]).all()
        assert np.isnan(found.update_dot[end]).all()
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
    if literal is literal_heavy_ball:
        # The update of heavy ball has the same null rate: it goes on in its momentum.
        update = -lr * (found.update_dot / found.update_square)[:, 0]
        assert update == pytest.approx(rate, rel=EXACT)


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


def test_what_decay_forgets_keeps_its_digits() -> None:
    """Plain SGD with decay: a_s = η (1 - ηλ)^(N - 1 - s), here down to e^-30."""
    total, lr, decay = 30_000, 0.1, 0.01
    constant = Settings.constant(total, lr)
    settings = replace(constant, decay=np.full((total, 1), decay))
    steps = np.arange(0, total, 999)
    found = settings.path(np.ones((total, 1)), np.ones(1), np.array([0])).null(steps, total)
    # A power of N is off by N times the rounding of its base.
    expected = lr * (1 - lr * decay) ** (total - 1.0 - steps)
    assert found.dot[:, 0] == pytest.approx(expected, rel=total * 1e-15)


def test_after_w_n_the_null_is_0() -> None:
    settings = Settings.constant(10, 0.1, 0.9)
    path = settings.path(np.ones((10, 1)), np.ones(1), np.array([0]))
    found = path.null(np.arange(11), 4)
    assert cosine(found)[5:10].tolist() == [0.0] * 5
    assert np.isnan(cosine(found)[[4, 10]]).all()


@pytest.mark.parametrize("every", [1, 3, 7])
@pytest.mark.parametrize("end", [0, 20, 40])
def test_a_step_has_the_same_null_whatever_other_steps_are_asked_for(every: int, end: int) -> None:
    rng = np.random.default_rng(3)
    settings = draw_settings(rng, 40, False, True)
    norms, sizes = rng.uniform(0.1, 3, (40, 3)), rng.uniform(0.1, 5, 3)
    path = settings.path(norms, sizes, np.array([0, 1, 0]))
    steps = np.arange(2, 40, every)
    for found, all_of_them in zip(
        path.null(steps, end), path.null(np.arange(40), end), strict=True
    ):
        expected = all_of_them[steps]
        assert found == pytest.approx(expected, rel=EXACT, abs=1e-15, nan_ok=True)


@pytest.mark.parametrize("what", ["norm", "lr"])
def test_nothing_comes_back_from_a_step_that_is_not_finite(what: str) -> None:
    """Before the step, towards a w* before it, the null is that of the path up to there."""
    rng = np.random.default_rng(4)
    norms, groups = rng.uniform(0.1, 3, (30, 2)), np.array([0, 0])
    settings = Settings.constant(30, 0.1, 0.9)
    whole = settings.path(norms.copy(), np.ones(2), groups).null(np.arange(31), 12)
    (norms if what == "norm" else settings.lr)[12] = np.nan
    path = settings.path(norms, np.ones(2), groups)
    assert path.unsound() == 12
    for found, expected in zip(path.null(np.arange(31), 12), whole, strict=True):
        assert found[:12] == pytest.approx(expected[:12], rel=EXACT)
        assert np.isnan(found[12:]).all()
    assert all(np.isnan(part).all() for part in path.null(np.arange(31), 13))


def test_more_steps_than_anybody_records_take_no_time() -> None:
    total, tensors = 100_000, 100
    settings = Settings.constant(total, 0.1, 0.9)
    norms = np.ones((total, tensors))
    path = settings.path(norms, np.ones(tensors), np.zeros(tensors, np.int64))
    began = time.process_time()
    path.null(np.arange(0, total, 100), total)
    # 0.3 s on the machine where this was written; step by step numpy would take 4 s.
    assert time.process_time() - began < 2
