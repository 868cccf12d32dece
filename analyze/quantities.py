"""Every quantity as a value: its name, formula, unit, the sums it needs, and the arithmetic.

Notation, with everything summed over the coordinates of one group of tensors:

    w  the weights w_t           w*  the reference          e = w - w*
    g  the gradient at w_t of the mean loss that the optimizer minimises, unscaled, and unclipped
       where the clip factor is known; the store keeps what entered the step
    h = g + λ w                  u = w_{t+1} - w_t, the update that was taken
    M = diag(√v̂ + ε) of Adam, see `analyze.second_moments`: ‖e‖²_M = Σ Mᵢ eᵢ², ‖g‖²_{M⁻¹} = Σ gᵢ²/Mᵢ
    ‖·‖₀, ⟨·,·⟩₀                 what orthogonal gradients alone would give (`analyze.controls`)

A ratio whose denominator is 0 is NaN, never 0. Formulas: Guille-Escuret, Naganuma, Fatras and
Mitliagkas, "No Wrong Turns", ICML 2024; the aiming condition: Liu, Drusvyatskiy, Belkin, Davis and
Ma, "Aiming towards the minimizers", NeurIPS 2023; the nulls and z are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Sums = Mapping[str, Values]

# What a sum is called, and what it is.
SUMS = {
    "ee": "‖e‖²",
    "gg": "‖g‖²",
    "ge": "⟨g, e⟩",
    "g2e2": "Σᵢ gᵢ² eᵢ²",
    # From ‖g‖², ⟨g, w⟩ and ‖w‖²: where g nearly cancels λw, so do the digits.
    "hh": "‖g + λw‖²",
    "he": "⟨g + λw, e⟩",
    "uu": "‖u‖²",
    "ue": "⟨u, e⟩",
    "ww": "‖w‖²",
    "we": "⟨w, e⟩",
    "gw": "⟨g, w⟩",
    "path": "Σ ‖u_s‖ over the updates between w and w*",
    "gap": "f(w) - f(w*), of the batch whose gradient g is",
    "adam_ee": "‖e‖²_M, of the tensors with second moments",
    "adam_gg": "‖g‖²_{M⁻¹}, of the tensors with second moments",
    "adam_ge": "⟨g, e⟩, of the tensors with second moments",
    "null_gg": "‖g‖², from the every-step scalars",
    "null_ee": "‖e‖²₀",
    "null_ge": "⟨g, e⟩₀",
    "null_uu": "‖u‖²₀",
    "null_ue": "⟨u, e⟩₀",
}

_UNCLIPPED = "; g unclipped where the clip factor is known, the store keeps what entered the step"

SIGN = "γ > 0: a step along -g starts out towards w*."


@dataclass(frozen=True)
class Quantity:
    """One column of the table: `function` maps the sums named in `needs` to float64 values."""

    name: str
    formula: str
    unit: str
    needs: tuple[str, ...]
    function: Callable[[Sums], Values]


def ratio(numerator: Values, *denominators: Values) -> Values:
    """Divide, NaN where a denominator is 0; overflow gives no warning."""
    with np.errstate(all="ignore"):
        for denominator in denominators:
            numerator = numerator / np.where(denominator == 0, np.nan, denominator)
    return numerator


def norm(square: Values) -> Values:
    """Square root; NaN where rounding left a sum of squares below 0."""
    with np.errstate(invalid="ignore"):
        return np.sqrt(square)


def angle(cosine: Values) -> Values:
    """Angle in degrees; a cosine that rounding took beyond ±1 counts as ±1."""
    return np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))


def _direction(dot: str, square: str, symbol: str, suffix: str, about: str) -> list[Quantity]:
    """List the seven quantities of one direction: the gradient, or the gradient with decay."""

    def cosine(sums: Sums) -> Values:
        return ratio(sums[dot], norm(sums[square]), norm(sums["ee"]))

    table: list[tuple[str, str, str, tuple[str, ...], Callable[[Sums], Values]]] = [
        (
            "norm_grad",
            f"‖{symbol}‖",
            "loss/weight",
            (square,),
            lambda s: norm(s[square]),
        ),
        ("dot_prod", f"⟨{symbol}, e⟩", "loss", (dot,), lambda s: s[dot]),
        (
            "rsi",
            f"⟨{symbol}, e⟩ / ‖e‖²",
            "loss/weight²",
            (dot, "ee"),
            lambda s: ratio(s[dot], s["ee"]),
        ),
        (
            "eb",
            f"‖{symbol}‖ / ‖e‖",
            "loss/weight²",
            (square, "ee"),
            lambda s: ratio(norm(s[square]), norm(s["ee"])),
        ),
        ("cosine", f"⟨{symbol}, e⟩ / (‖{symbol}‖ ‖e‖)", "1", (dot, square, "ee"), cosine),
        (
            "angle_deg",
            f"arccos(⟨{symbol}, e⟩ / (‖{symbol}‖ ‖e‖))",
            "degrees",
            (dot, square, "ee"),
            lambda s: angle(cosine(s)),
        ),
        (
            "lolr",
            f"⟨{symbol}, e⟩ / ‖{symbol}‖²",
            "weight²/loss",
            (dot, square),
            lambda s: ratio(s[dot], s[square]),
        ),
    ]
    return [
        Quantity(
            name + suffix,
            # Cosine and angle are the same of a clipped gradient, but for a decay beside it.
            formula + about + (_UNCLIPPED if suffix or name not in ("cosine", "angle_deg") else ""),
            unit,
            needs,
            function,
        )
        for name, formula, unit, needs, function in table
    ]


_NULL = [
    Quantity(
        "cosine_null",
        "⟨g, e⟩₀ / (‖g‖ ‖e‖₀), the cosine if all gradients of the path were orthogonal; "
        "of the minibatch gradients only, which made the path",
        "1",
        ("null_ge", "null_gg", "null_ee"),
        lambda s: ratio(s["null_ge"], norm(s["null_gg"]), norm(s["null_ee"])),
    ),
    Quantity(
        "lolr_null",
        "⟨g, e⟩₀ / ‖g‖², the locally optimal learning rate if all gradients were orthogonal; "
        "of the minibatch gradients only",
        "weight²/loss",
        ("null_ge", "null_gg"),
        lambda s: ratio(s["null_ge"], s["null_gg"]),
    ),
    Quantity(
        "z",
        "⟨g, e⟩ / √(Σᵢ gᵢ² eᵢ²), against random signs of the coordinates",
        "1",
        ("ge", "g2e2"),
        lambda s: ratio(s["ge"], norm(s["g2e2"])),
    ),
]

_UPDATE = [
    Quantity("norm_update", "‖u‖", "weight", ("uu",), lambda s: norm(s["uu"])),
    Quantity("dot_prod_update", "⟨u, e⟩", "weight²", ("ue",), lambda s: s["ue"]),
    Quantity(
        "cosine_update",
        "⟨u, e⟩ / (‖u‖ ‖e‖), negative where the update starts out towards w*",
        "1",
        ("ue", "uu", "ee"),
        lambda s: ratio(s["ue"], norm(s["uu"]), norm(s["ee"])),
    ),
    Quantity(
        "lolr_update",
        "-⟨u, e⟩ / ‖u‖², the factor by which the update should have been longer",
        "1",
        ("ue", "uu"),
        lambda s: ratio(-s["ue"], s["uu"]),
    ),
    Quantity(
        "cosine_update_null",
        "⟨u, e⟩₀ / (‖u‖₀ ‖e‖₀), cosine_update if all gradients of the path were orthogonal",
        "1",
        ("null_ue", "null_uu", "null_ee"),
        lambda s: ratio(s["null_ue"], norm(s["null_uu"]), norm(s["null_ee"])),
    ),
    Quantity(
        "lolr_update_null",
        "-⟨u, e⟩₀ / ‖u‖²₀, lolr_update if all gradients of the path were orthogonal: times the "
        "learning rate it is a_t of the update",
        "1",
        ("null_ue", "null_uu"),
        lambda s: ratio(-s["null_ue"], s["null_uu"]),
    ),
]

# Where w lies: on its sphere around 0, and on the path to w*. In scale-invariant layers g ⊥ w.
_POSITION = [
    Quantity("norm_weight", "‖w‖", "weight", ("ww",), lambda s: norm(s["ww"])),
    Quantity(
        "cosine_reference",
        "⟨w, w*⟩ / (‖w‖ ‖w*‖)",
        "1",
        ("ee", "we", "ww"),
        lambda s: ratio(s["ww"] - s["we"], norm(s["ww"]), norm(s["ww"] - 2 * s["we"] + s["ee"])),
    ),
    Quantity(
        "dist_radial",
        "⟨w, e⟩ / ‖w‖, the part of e along w",
        "weight",
        ("we", "ww"),
        lambda s: ratio(s["we"], norm(s["ww"])),
    ),
    Quantity(
        "dist_tangential",
        "√(‖e‖² - dist_radial²), the part of e at right angles to w",
        "weight",
        ("ee", "we", "ww"),
        lambda s: norm(np.maximum(s["ee"] - ratio(s["we"] ** 2, s["ww"]), 0.0)),
    ),
    Quantity(
        "cosine_radial",
        "⟨g, w⟩ ⟨w, e⟩ / (‖w‖² ‖g‖ ‖e‖), what the parts along w give to the cosine",
        "1",
        ("gw", "we", "ww", "gg", "ee"),
        lambda s: ratio(s["gw"] * s["we"], s["ww"], norm(s["gg"]), norm(s["ee"])),
    ),
    Quantity(
        "cosine_tangential",
        "cosine - cosine_radial, what the parts at right angles to w give to it",
        "1",
        ("gw", "we", "ww", "ge", "gg", "ee"),
        lambda s: ratio(s["ge"] - ratio(s["gw"] * s["we"], s["ww"]), norm(s["gg"]), norm(s["ee"])),
    ),
    Quantity(
        "path_length",
        "Σ ‖u_s‖ over the updates between w and w*, from the every-step scalars",
        "weight",
        ("path",),
        lambda s: s["path"],
    ),
    Quantity(
        "straightness",
        "‖e‖ / path_length, 1 on a straight line",
        "1",
        ("ee", "path"),
        lambda s: ratio(norm(s["ee"]), s["path"]),
    ),
]

_SHARE = Quantity(
    "own_share",
    "a_t ‖g‖² / ⟨g, e⟩ = lolr_null / lolr: arithmetic, how much of ⟨g, e⟩ the steps along g itself "
    "account for; can exceed 1, and is no evidence about the landscape",
    "1",
    ("null_ge", "ge"),
    lambda s: ratio(s["null_ge"], s["ge"]),
)

# Of the whole model only: f is no sum over tensors.
_LOSSES = [
    Quantity(
        "loss_gap",
        "f(w) - f(w*), f the mean loss of the row's own batch; negated where it is maximized",
        "loss",
        ("gap",),
        lambda s: s["gap"],
    ),
    Quantity(
        "star_convexity",
        "⟨g, e⟩ - (f(w) - f(w*)), at least 0 where f is star-convex towards w*, seen from w",
        "loss",
        ("ge", "gap"),
        lambda s: s["ge"] - s["gap"],
    ),
    Quantity(
        "aiming",
        "⟨g, e⟩ / (f(w) - f(w*)), θ of the aiming condition ⟨g, e⟩ ≥ θ (f(w) - f(w*)); read it "
        "where the loss gap is positive",
        "1",
        ("ge", "gap"),
        lambda s: ratio(s["ge"], s["gap"]),
    ),
]

_SECOND_MOMENTS = "; M = diag(√v̂ + ε) of Adam before step t, where a state was kept"

# Of the step along -M⁻¹ g, as the plain ones are of that along -g.
_ADAM = [
    Quantity(
        "norm_dist_adam",
        f"‖e‖_M = √(Σᵢ Mᵢ eᵢ²){_SECOND_MOMENTS}",
        "√(loss·weight)",
        ("adam_ee",),
        lambda s: norm(s["adam_ee"]),
    ),
    Quantity(
        "norm_grad_adam",
        f"‖g‖_{{M⁻¹}} = √(Σᵢ gᵢ²/Mᵢ){_SECOND_MOMENTS}",
        "√(loss/weight)",
        ("adam_gg",),
        lambda s: norm(s["adam_gg"]),
    ),
    Quantity(
        "cosine_adam",
        f"⟨g, e⟩ / (‖g‖_{{M⁻¹}} ‖e‖_M), the cosine in Adam's metric{_SECOND_MOMENTS}",
        "1",
        ("adam_ge", "adam_gg", "adam_ee"),
        lambda s: ratio(s["adam_ge"], norm(s["adam_gg"]), norm(s["adam_ee"])),
    ),
    Quantity(
        "lolr_adam",
        "⟨g, e⟩ / ‖g‖²_{M⁻¹}, the learning rate of the step along -M⁻¹ g that lands closest to w* "
        f"in the norm ‖·‖_M{_SECOND_MOMENTS}",
        "weight",
        ("adam_ge", "adam_gg"),
        lambda s: ratio(s["adam_ge"], s["adam_gg"]),
    ),
]

# In the order of the table's columns.
QUANTITIES: tuple[Quantity, ...] = (
    Quantity("norm_dist", "‖e‖", "weight", ("ee",), lambda s: norm(s["ee"])),
    *_direction("ge", "gg", "g", "", ""),
    *_NULL,
    *_direction("he", "hh", "h", "_wd", " with h = g + λw, λ of coupled weight decay"),
    *_UPDATE,
    _SHARE,
    *_POSITION,
    *_LOSSES,
    *_ADAM,
)


def evaluate(sums: Sums, quantities: Sequence[Quantity] = QUANTITIES) -> dict[str, Values]:
    """Evaluate the quantities whose sums are there, float64 of the sums' common shape.

    What would follow from an infinite or NaN sum is NaN.
    """
    sound = {name: _finite(value) for name, value in sums.items()}
    with np.errstate(all="ignore"):
        return {
            quantity.name: _finite(quantity.function(sound))
            for quantity in quantities
            if sound.keys() >= set(quantity.needs)
        }


def _finite(values: Values) -> Values:
    return np.where(np.isfinite(values), values, np.nan)
