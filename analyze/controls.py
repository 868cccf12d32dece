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

Sums go tensor by tensor. A tensor that the optimizer does not update adds nothing to e. Exact where
the momentum buffers were empty at w_0 and every updated tensor had a gradient in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


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
        start = np.isfinite(self.initial_norms[self._decayed()]).all()
        sound = np.isfinite(self.grad_norms).all(axis=1)
        for part in self.recursion:
            sound &= np.isfinite(part).all(axis=1)
        return 0 if not start else None if sound.all() else int(np.argmin(sound))

    def _decayed(self) -> NDArray[np.bool_]:
        """Which tensors weight decay reaches, ``[P]``."""
        by_group = np.append(self.recursion.shrink.any(axis=0), False)
        return np.asarray(by_group[self.groups], bool)

    def null(self, steps: Integers, end: int) -> Null:
        """Compute the null at `steps`, in ascending order, with w* = w_`end`.

        NaN at the step `end` itself, where e = 0, and at steps from which no update was taken.
        """
        shape = (len(steps), len(self.groups))
        dot, grad, dist, along, square = (np.full(shape, np.nan) for _ in Null._fields)
        inside = steps < len(self.grad_norms)
        grad[inside] = self.grad_norms[steps[inside]] ** 2
        # Without decay w_0 has no part in e; it is left out, not cancelled.
        start = np.where(self._decayed(), self.initial_norms, 0.0)
        shares = _own_shares(self.recursion, end)
        _ahead(shares[0], self.grad_norms, self.groups, steps, end, dot, dist)
        found = (dist, along, square)
        _behind(self.recursion, shares, self.grad_norms, start, self.groups, steps, end, *found)
        dot[inside & (steps > end)] = 0.0
        along[steps == end] = np.nan
        return Null(dot, grad, *found)


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


def _compile(function: Callable[..., Any]) -> Any:
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # no folder to keep compiled functions in: compile them each time
        return numba.njit(function)


@_compile
def _own_shares(recursion: Recursion, end: int) -> tuple[Floats, Floats, Floats]:
    """Run q backwards from `end`: a_s ``[N, G]`` and the two entries of r_t ``[N + 1, G]``."""
    groups = recursion.push.shape[1]
    share = np.zeros((end, groups))
    weight, buffer = np.zeros((end + 1, groups)), np.zeros((end + 1, groups))
    for step in range(end - 1, -1, -1):
        for group in range(groups):
            after_w, after_m = weight[step + 1, group], buffer[step + 1, group]
            shrink, gain = recursion.shrink[step, group], recursion.gain[step, group]
            share[step, group] = (1 - after_w) * recursion.push[step, group] + after_m * gain
            weight[step, group] = (
                shrink + after_w * (1 - shrink) + after_m * recursion.feed[step, group]
            )
            buffer[step, group] = (1 - after_w) * recursion.carry[step, group] + (
                after_m * recursion.keep[step, group]
            )
    return share, weight, buffer


@_compile
def _ahead(
    share: Floats,
    grad_norms: Floats,
    groups: Integers,
    steps: Integers,
    end: int,
    dot: Floats,
    dist: Floats,
) -> None:
    """Before `end`: set ⟨g_t, e_t⟩₀, and ‖e_t‖²₀ to the part of the gradients from t on."""
    tail = np.zeros(len(groups))
    row = len(steps) - 1
    while row >= 0 and steps[row] >= end:
        row -= 1
    for step in range(end - 1, -1, -1):
        for tensor in range(len(groups)):
            if groups[tensor] >= 0:
                tail[tensor] += (share[step, groups[tensor]] * grad_norms[step, tensor]) ** 2
        if row >= 0 and steps[row] == step:
            for tensor in range(len(groups)):
                own = share[step, groups[tensor]] if groups[tensor] >= 0 else 0.0
                dot[row, tensor] = own * grad_norms[step, tensor] ** 2
                dist[row, tensor] = tail[tensor]
            row -= 1


@_compile
def _behind(
    recursion: Recursion,
    shares: tuple[Floats, Floats, Floats],
    grad_norms: Floats,
    start: Floats,
    groups: Integers,
    steps: Integers,
    end: int,
    dist: Floats,
    along: Floats,
    update_square: Floats,
) -> None:
    """Before `end`: add the part of the state x_t to ‖e_t‖²₀; after it, set ‖w_t - w_N‖²₀.

    Set ⟨u_t, e_t⟩₀ and ‖u_t‖²₀ of every update. All follow from the inner products of w, m and
    e = w - w_N (0 before N), carried forward.
    """
    shrink, carry, feed, keep, push, gain = recursion
    count = len(groups)
    ww, wm, mm = start**2, np.zeros(count), np.zeros(count)
    ee, ew, em = np.zeros(count), np.zeros(count), np.zeros(count)
    row = 0
    for s in range(len(grad_norms)):
        if row == len(steps):
            return
        wanted = steps[row] == s
        if wanted:
            for p in range(count):
                if s > end:
                    dist[row, p] = ee[p]
                elif s < end and groups[p] >= 0:
                    r_w, r_m = shares[1][s, groups[p]], shares[2][s, groups[p]]
                    dist[row, p] += r_w**2 * ww[p] + 2 * r_w * r_m * wm[p] + r_m**2 * mm[p]
                along[row, p] = update_square[row, p] = 0.0
        for p in range(count):
            k = groups[p]
            if k < 0:
                continue
            a, b, f, h = shrink[s, k], carry[s, k], feed[s, k], keep[s, k]
            square = grad_norms[s, p] ** 2
            # Products of the step v = w_{s+1} - w_s = -(a w + b m + push g) with w, m, v and e.
            vw, vm = -(a * ww[p] + b * wm[p]), -(a * wm[p] + b * mm[p])
            vv = push[s, k] ** 2 * square - a * vw - b * vm
            ve = -(a * ew[p] + b * em[p])
            if wanted:
                update_square[row, p] = vv
                along[row, p] = ve
                if s < end:
                    own = push[s, k] * shares[0][s, k] * square
                    along[row, p] = shares[1][s, k] * vw + shares[2][s, k] * vm - own
            if s >= end:
                em[p] = f * (ew[p] + vw) + h * (em[p] + vm) - push[s, k] * gain[s, k] * square
                ew[p] += ve + vw + vv
                ee[p] += 2 * ve + vv
            next_m = f * vw + h * vm - push[s, k] * gain[s, k] * square
            next_m += f * ww[p] + h * wm[p]
            mm[p] = f * f * ww[p] + 2 * f * h * wm[p] + h * h * mm[p] + gain[s, k] ** 2 * square
            wm[p] = next_m
            ww[p] += 2 * vw + vv
        row += wanted
