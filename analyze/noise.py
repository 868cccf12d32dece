"""The noise of a gradient from the batches of one step: what is left of ‖∇f‖² without it.

The squared norm of a mean of B noisy gradients is too large by 1/B of their variance. Products of
different batches have no such part: their mean is unbiased for ‖∇f‖² over independent draws of the
batches. (Batches without a sample in common, as `fixed` has, are not quite independent: there it is
low by the variance of one batch over the number of such batches in the data, less one.) The ratio
of variance to it is the gradient noise scale: McCandlish, Kaplan, Amodei and the OpenAI Dota Team,
"An Empirical Model of Large-Batch Training", 2018, in the appendix on estimating it.
"""

from __future__ import annotations

import numpy as np

from analyze.quantities import Quantity, Values, evaluate, norm, ratio

SUMS = {
    "same": "Σ_b ‖g_b‖² / B",
    "cross": "Σ_{b≠b'} ⟨g_b, g_b'⟩ / (B (B - 1))",
    "mean": "‖Σ_b g_b / B‖²",
    "smallest": "min_b ‖g_b‖²",
    "largest": "max_b ‖g_b‖²",
}

NOISE_QUANTITIES: tuple[Quantity, ...] = (
    Quantity(
        "noise_corrected",
        "mean over b ≠ b' of ⟨g_b, g_b'⟩, unbiased for ‖∇f‖² over the draw of the batches; may be "
        "negative",
        "loss²/weight²",
        ("cross",),
        lambda s: s["cross"],
    ),
    Quantity(
        "square_of_mean",
        "‖mean over b of g_b‖², the plain estimate",
        "loss²/weight²",
        ("mean",),
        lambda s: s["mean"],
    ),
    Quantity(
        "mean_of_squares",
        "mean over b of ‖g_b‖²",
        "loss²/weight²",
        ("same",),
        lambda s: s["same"],
    ),
    Quantity(
        "norm_grad_min",
        "min over b of ‖g_b‖",
        "loss/weight",
        ("smallest",),
        lambda s: norm(s["smallest"]),
    ),
    Quantity(
        "norm_grad_max",
        "max over b of ‖g_b‖",
        "loss/weight",
        ("largest",),
        lambda s: norm(s["largest"]),
    ),
    Quantity(
        "noise_variance",
        "mean_of_squares - noise_corrected, unbiased for the variance E‖g_b - ∇f‖² of one batch",
        "loss²/weight²",
        ("same", "cross"),
        lambda s: s["same"] - s["cross"],
    ),
    Quantity(
        "noise_scale",
        "noise_variance / noise_corrected: batches of this size whose mean has as much noise as "
        "gradient; NaN where noise_corrected is not positive",
        "batches",
        ("same", "cross"),
        lambda s: ratio(s["same"] - s["cross"], np.where(s["cross"] > 0, s["cross"], np.nan)),
    ),
)


def batch_noise(batch_sums: Values) -> dict[str, Values]:
    """Evaluate `NOISE_QUANTITIES` from the products of batches ``[T, B, B, K]``: each ``[T, K]``.

    `batch_sums` is that of `analyze.gram.Gram`. With one batch there are no products of different
    ones, and what follows from them is NaN.
    """
    count = batch_sums.shape[1]
    squares = np.diagonal(batch_sums, axis1=1, axis2=2)  # [T, K, B]
    different = np.where(np.eye(count, dtype=bool)[..., None], 0.0, batch_sums).sum(axis=(1, 2))
    with np.errstate(all="ignore"):
        sums = {
            "same": squares.mean(axis=-1),
            "cross": different / (count * (count - 1) or np.nan),
            "mean": batch_sums.sum(axis=(1, 2)) / count**2,
            "smallest": squares.min(axis=-1),
            "largest": squares.max(axis=-1),
        }
    return evaluate(sums, NOISE_QUANTITIES)
