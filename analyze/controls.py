"""The null: what cosine and learning rate the run would show if its gradients were orthogonal.

The end of a run is made of the run's own gradients, so γ > 0 needs no geometry. For SGD in
torch's form the state x_s = (w_s, m_{s-1}) of a tensor is linear in its gradients,

    x_{s+1} = F_s x_s + G_s g_s,      d_s = g_s + λ_s w_s,      m_s = β_s m_{s-1} + ρ_s d_s,
    w_{s+1} = w_s - η_s m_s,          or, for Nesterov,         w_{s+1} = w_s - η_s (d_s + β_s m_s)

with ρ_s = 1 - dampening, but ρ_s = 1 in the first step with momentum, where torch starts the
buffer with d; a step with β_s = 0 goes along d and leaves the buffer alone. g_s is the gradient
as it entered the step: clipped if clipped, negated if the optimizer maximizes. With w* = w_N and
q_t = (1, 0) F_{N-1} … F_t follows exactly, whatever the gradients are,

    e_t = w_t - w_N = r_t x_t + Σ_{t≤s<N} a_s g_s,      r_t = (1, 0) - q_t,      a_s = -q_{s+1} G_s.

If all gradients of a tensor were orthogonal to each other, and to w_0 where λ > 0, then

    ⟨g_t, e_t⟩₀ = a_t ‖g_t‖²,     ‖e_t‖²₀ = r_t S_t r_tᵀ + Σ_{t≤s<N} a_s² ‖g_s‖²,
    S_{s+1} = F_s S_s F_sᵀ + ‖g_s‖² G_s G_sᵀ,     S_0 = diag(‖w_0‖², 0),

and of the update u_t = (1, 0) ((F_t - 1) x_t + G_t g_t) = v_t x_t - push_t g_t

    ⟨u_t, e_t⟩₀ = v_t S_t r_tᵀ - push_t a_t ‖g_t‖²,     ‖u_t‖²₀ = v_t S_t v_tᵀ + push_t² ‖g_t‖².

Without decay the first entry of r_t is exactly 0, so w_0 does not enter, and for heavy ball
a_t = η_t + β a_{t+1} and r_t = (0, β a_t); with Nesterov's form a_t is b_t = η_t + β c_t and
r_t = (0, β² c_t) where c_t = η_t + β c_{t+1}. For heavy ball -η_t ⟨u_t, e_t⟩₀ / ‖u_t‖²₀ is a_t
too: an update that orthogonal gradients made goes on in its momentum. For t > N the path from w_N
to w_t does not contain g_t, and ⟨g_t, e_t⟩₀ = 0. The derivation is our own.

After w* the gradients since then are orthogonal to x_N: with R_t = F_{t-1} … F_N, and S' that
starts with S'_N = 0,

    ‖e_t‖²₀ = r_t S_N r_tᵀ + S'_t[0, 0],        r_t = (1, 0) R_t - (1, 0) = Σ_{N≤s<t} v_s R_s,
    ⟨u_t, e_t⟩₀ = v_t R_t S_N r_tᵀ + v_t S'_t[:, 0].

F, G and all products of them are those of a parameter group. The norms of the tensors enter in sums
Σ z_s² ‖g_s‖² alone, each over the steps between two that are asked for.

Sums go tensor by tensor. A tensor that the optimizer does not update adds nothing to e. Exact where
the momentum buffers were empty at w_0 and every updated tensor had a gradient in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analyze.recurrences import solve

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Numbers that are multiplied at a time.
_AT_ONCE = 2**18


class Recursion(NamedTuple):
    """F and G of every step and parameter group, each float64 ``[S, G]``.

    F = [[1 - shrink, -carry], [feed, keep]] and G = [-push, gain].
    """

    shrink: Floats
    carry: Floats
    feed: Floats
    keep: Floats
    push: Floats
    gain: Floats


class Null(NamedTuple):
    """The null of each tensor at some steps, each float64 ``[T, P]``.

    ⟨g, e⟩₀, ‖g‖² and ‖e‖²₀ of the gradient as it entered the step; ⟨u, e⟩₀ and ‖u‖²₀ of the update.
    """

    dot: Floats
    grad: Floats
    dist: Floats
    update_dot: Floats
    update_square: Floats


@dataclass(frozen=True)
class OwnPath:
    """What the null needs to know of a run: its every-step scalars and its optimizer.

    `grad_norms` is ‖g_s‖ ``[S, P]``, `initial_norms` is ‖w_0‖ ``[P]``, `groups` is the parameter
    group of each tensor ``[P]``, -1 where the optimizer does not update it, `method` a name.
    """

    method: str
    recursion: Recursion
    grad_norms: Floats
    initial_norms: Floats
    groups: Integers

    def assumption(self) -> str:
        """Say in words what the null rests on."""
        also = ", and to w_0, which weight decay brings in" if self.recursion.shrink.any() else ""
        return f"exact for {self.method} if its gradients were orthogonal to each other{also}"

    def unsound(self) -> int | None:
        """First step whose norms or settings are not finite, 0 for ‖w_0‖; `None` if there is none.

        Nothing on a path that passes through it has a null.
        """
        return None if self._sound == len(self.grad_norms) else self._sound

    @cached_property
    def _sound(self) -> int:
        """How many steps there are before anything is not finite."""
        if not np.isfinite(self.initial_norms[self._decayed()]).all():
            return 0
        parts = (self.grad_norms, *self.recursion)
        sound = np.all([np.isfinite(part).all(axis=1) for part in parts], axis=0)
        return int(np.argmin(np.append(sound, False)))

    def _decayed(self) -> NDArray[np.bool_]:
        """Which tensors weight decay reaches, ``[P]``."""
        by_group = np.append(self.recursion.shrink.any(axis=0), False)
        return np.asarray(by_group[self.groups], bool)

    def null(self, steps: Integers, end: int) -> Null:
        """Compute the null at `steps`, in ascending order, with w* = w_`end`.

        NaN at the step `end` itself, where e = 0, at steps from which no update was taken, and
        where the path is unsound.
        """
        found = Null(*(np.full((len(steps), len(self.groups)), np.nan) for _ in Null._fields))
        if end > self._sound:
            return found
        inside = int(np.searchsorted(steps, self._sound))
        # Without decay w_0 has no part in e; it is left out, not cancelled.
        start = np.where(self._decayed(), self.initial_norms, 0.0)
        for group in np.unique(self.groups):
            mine = np.flatnonzero(self.groups == group)
            for here in np.array_split(mine, -(-mine.size * len(steps) // _AT_ONCE) or 1):
                way = _Way(self._rules(group), self.grad_norms[:, here], start[here])
                for values, own in zip(found, way.null(steps[:inside], end), strict=True):
                    values[:inside, here] = own
        return found

    def _rules(self, group: int) -> Recursion:
        """F and G of a group, each ``[S]``; without a group nothing moves."""
        if group >= 0:
            return Recursion(*(part[:, group] for part in self.recursion))
        zero = np.zeros(len(self.grad_norms))
        return Recursion(zero, zero, zero, zero + 1, zero, zero)


def sgd_recursion(
    lr: Floats, momentum: Floats, decay: Floats, dampening: Floats, *, nesterov: bool = False
) -> Recursion:
    """Derive F and G from the settings of torch's SGD ``[S, G]``; `dampening` is ``[G]``."""
    active = momentum != 0
    first = active & (np.cumsum(active, axis=0) == 1)
    gain = np.where(active, np.where(first, 1.0, 1.0 - dampening), 0.0)
    # w_{s+1} = w_s - η (along · d + back · m_{s-1})
    if nesterov:
        along, back = 1.0 + momentum * gain, momentum * momentum
    else:
        along, back = np.where(active, gain, 1.0), momentum
    keep = np.where(active, momentum, 1.0)
    parts = (lr * along * decay, lr * back, gain * decay, keep, lr * along, gain)
    return Recursion(*(np.ascontiguousarray(part, dtype=np.float64) for part in parts))


class _Way:
    """The way of P tensors of one group: `rules` ``[S]``, ‖g_s‖ ``[S, P]`` and ‖w_0‖ ``[P]``.

    S is kept as its entries (0, 0), (0, 1) and (1, 1): ``[3, T, P]`` at T steps.
    """

    def __init__(self, rules: Recursion, norms: Floats, start: Floats) -> None:
        shrink, carry, feed, keep, push, gain = rules
        self._f = np.array([[1 - shrink, -carry], [feed, keep]])
        self._g = np.array([-push, gain])
        self._v = np.array([-shrink, -carry])
        self._norms = norms
        self._start = np.array([start**2, 0 * start, 0 * start])

    def null(self, steps: Integers, end: int) -> Null:
        """Compute the null at steps from which an update was taken."""
        grad, push, v = self._norms[steps] ** 2, -self._g[0, steps, None], self._v[:, steps]
        states = self._states(steps, 0, self._start)
        null = Null(*(np.full_like(grad, np.nan) for _ in Null._fields))
        null.grad[:] = grad
        null.update_square[:] = _product(v, states, v) + push**2 * grad
        own, rest = self._shares(end)
        here = np.flatnonzero(steps < end)
        r = rest[:, steps[here]]
        null.dot[here] = own[steps[here], None] * grad[here]
        ahead = _between(own[None] ** 2, self._norms, np.append(steps[here], end))[0]
        null.dist[here] = _product(r, states[:, here], r) + np.cumsum(ahead[::-1], axis=0)[::-1]
        null.update_dot[here] = _product(v[:, here], states[:, here], r)
        null.update_dot[here] -= push[here] * null.dot[here]
        here = np.flatnonzero(steps > end)
        null.dot[here] = 0.0
        null.dist[here], null.update_dot[here] = self._after(steps[here], end)
        return null

    def _after(self, steps: Integers, end: int) -> tuple[Floats, Floats]:
        """‖e‖²₀ and ⟨u, e⟩₀ at steps after `end`, each ``[T, P]``."""
        last = int(steps.max(initial=end))
        f, v = self._f[..., end:last], self._v[:, steps]
        since = solve(f, np.zeros((2, last - end, 2)), np.eye(2))
        moved = np.einsum("is,isj->js", self._v[:, end:last], since[:, :-1])
        rest = np.pad(np.cumsum(moved, axis=1), ((0, 0), (1, 0)))[:, steps - end]
        at_end = self._states(np.array([end]), 0, self._start)
        states = self._states(steps, end, np.zeros_like(self._start))
        along = np.einsum("is,isj->js", v, since[:, steps - end])
        dist = _product(rest, at_end, rest) + states[0]
        return dist, _product(along, at_end, rest) + v[0, :, None] * states[0] + (
            v[1, :, None] * states[1]
        )

    def _shares(self, end: int) -> tuple[Floats, Floats]:
        """a_s ``[N]`` and r_t ``[2, N + 1]`` of w* = w_N, from r_t = r_{t+1} F_t - v_t.

        q_t = q_{t+1} F_t goes along with r_t: of 1 - q, as of 1 - r, digits would be lost.
        """
        back, terms = self._f[..., :end].swapaxes(0, 1), np.zeros((2, end, 2))
        terms[..., 0] = -self._v[:, :end]
        found = solve(back[..., ::-1], terms[:, ::-1], np.array([[0.0, 1.0], [0.0, 0.0]]))
        rest, q = np.moveaxis(found[:, ::-1], -1, 0)
        return -(q[:, 1:] * self._g[:, :end]).sum(axis=0), rest

    def _states(self, steps: Integers, first: int, start: Floats) -> Floats:
        """S at ascending `steps` from the step `first` on, where it is `start` ``[3, P]``."""
        bounds = np.append(first, steps) - first
        f, g = (part[..., first : first + bounds[-1]] for part in (self._f, self._g))
        over, rest = _products(f, bounds)
        z = np.einsum("ijs,js->is", rest, g)
        made = _between(np.array([z[0] ** 2, z[0] * z[1], z[1] ** 2]), self._norms[first:], bounds)
        ((a, b), (c, d)) = over
        square = np.array(
            [
                [a * a, 2 * a * b, b * b],
                [a * c, a * d + b * c, b * d],
                [c * c, 2 * c * d, d * d],
            ]
        )
        return solve(square, made, start)[:, 1:]


def _products(f: Floats, bounds: Integers) -> tuple[Floats, Floats]:
    """F_{t-1} … F_s for s each of the T `bounds` but the last, t the next: ``[2, 2, T - 1]``.

    And F_{t-1} … F_{s+1} for each of the n steps s, t the next bound: ``[2, 2, n]``.
    """
    last = np.zeros(f.shape[-1], bool)
    last[bounds[bounds > 0] - 1] = True
    factors = np.where(last, 0.0, f.swapaxes(0, 1))
    terms = np.where(last[:, None], f.transpose(1, 2, 0), 0.0)
    found = solve(factors[..., ::-1], terms[:, ::-1], np.zeros((2, 2)))[:, ::-1].transpose(2, 0, 1)
    one = np.eye(2)[..., None]
    over = np.where(bounds[1:] > bounds[:-1], found[..., bounds[:-1]], one)
    return over, np.where(last, one, found[..., 1:])


def _between(weights: Floats, norms: Floats, bounds: Integers) -> Floats:
    """Σ weight_s ‖g_s‖² from each bound to the next, of weights ``[K, S]``: ``[K, T - 1, P]``."""
    lengths, width = np.diff(bounds), norms.shape[1]
    found = np.empty((len(weights), len(lengths), width))
    # Those of one length together, but not more than lie well in memory.
    for length in np.unique(lengths):
        those = np.flatnonzero(lengths == length)
        for some in np.array_split(those, -(-len(those) * length * width // _AT_ONCE) or 1):
            steps = bounds[some, None] + np.arange(length)
            # Not by BLAS: a sum that it shares out among threads depends on how many there are.
            found[:, some] = np.einsum("ktl,tlp->ktp", weights[:, steps], norms[steps] ** 2)
    return found


def _product(left: Floats, states: Floats, right: Floats) -> Floats:
    """l S rᵀ for l and r ``[2, T]`` and S ``[3, T, P]``: ``[T, P]``."""
    l_0, l_1, r_0, r_1 = (part[:, None] for part in (*left, *right))
    ww, wm, mm = states
    return np.asarray(l_0 * r_0 * ww + (l_0 * r_1 + l_1 * r_0) * wm + l_1 * r_1 * mm)
