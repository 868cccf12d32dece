"""The figures of the rows of a run: what each draws, and what has to be known to read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A figure of every report: `column` is drawn, with its `null` and the `lr` used where named.

    `null` is a column, its label and what to say of it. `symbol` stands before the names in the
    legend; `per_run` means that streams cannot differ.
    """

    name: str
    title: str
    column: str
    symbol: str
    ylabel: str
    caption: str
    null: tuple[str, str, str] | None = None
    used: bool = False
    baseline: float | None = None
    per_run: bool = False
    angle: bool = False


KINDS = (
    Kind(
        "cosine",
        "Cosine γ, its null and the angle",
        "cosine",
        "γ",
        "cosine γ",
        "γ = ⟨g,e⟩ / (‖g‖ ‖e‖). On the right, the angle between g and e.",
        null=(
            "cosine_null",
            "null γ⁰",
            "The null γ⁰ (dashed) is what orthogonal gradients of the same sizes would give, with "
            "no geometry at all: read γ against it, not against 0.",
        ),
        angle=True,
    ),
    Kind(
        "cosine-ratio",
        "Cosine over its null, γ/γ⁰",
        "cosine_ratio",
        "γ/γ⁰",
        "γ / γ⁰",
        "1 (dotted) is what orthogonal gradients alone would give. Only a distance from 1 can say "
        "something about the landscape.",
        baseline=1.0,
    ),
    Kind(
        "lolr",
        "Locally optimal learning rate η*",
        "lolr",
        "η*",
        "learning rate",
        "η* = ⟨g,e⟩ / ‖g‖² is the step along −g that lands closest to w*; beside it the learning "
        "rate used (dotted). One plain SGD step with η* contracts the squared distance to a fixed "
        "w* by exactly 1 − γ².",
        null=("lolr_null", "null aₜ", "The null aₜ (dashed) has the shape of the schedule."),
        used=True,
    ),
    Kind(
        "lolr-ratio",
        "Locally optimal learning rate over its null, η*/aₜ",
        "lolr_ratio",
        "η*/aₜ",
        "η* / aₜ",
        "1 (dotted) is what orthogonal gradients alone would give.",
        baseline=1.0,
    ),
    Kind(
        "rsi",
        "Lower restricted secant inequality RSI⁻",
        "rsi",
        "RSI⁻",
        "RSI⁻",
        "RSI⁻ = ⟨g,e⟩ / ‖e‖². On a well-behaved path it stays above some μ > 0. "
        "A rise at the end is no evidence by itself: the end effect makes one too.",
        null=("rsi_null", "null RSI⁰", "The null (dashed), γ⁰²/aₜ, rises at the end by itself."),
    ),
    Kind(
        "eb",
        "Upper error bound EB⁺",
        "eb",
        "EB⁺",
        "EB⁺",
        "EB⁺ = ‖g‖ / ‖e‖. On a well-behaved path it stays below some L. "
        "A rise at the end is no evidence by itself: the end effect makes one too.",
        null=("eb_null", "null EB⁰", "The null (dashed), γ⁰/aₜ, rises at the end by itself."),
    ),
    Kind(
        "distance",
        "Distance to w*",
        "norm_dist",
        "‖e‖",
        "‖wₜ − w*‖",
        "The Euclidean distance over all trainable parameters: how far there is still to go.",
        per_run=True,
    ),
    Kind(
        "loss",
        "Loss",
        "loss",
        "loss",
        "loss",
        "The mean loss of each stream's own batch at the weights before the update.",
    ),
    Kind(
        "grad-norm",
        "Gradient norm",
        "norm_grad",
        "‖g‖",
        "‖gₜ‖",
        "The norm of the gradient of the mean minibatch loss; "
        "before clipping wherever the clip factor is known.",
    ),
    Kind(
        "update-cosine",
        "The step really taken",
        "descent_update",
        "−cos(u,e)",
        "−cos(u, e)",
        "u = wₜ₊₁ − wₜ, with momentum, decay, clipping and preconditioning. Drawn with a minus "
        "sign (the column cosine_update without), so that above 0 the step starts out towards "
        "w*; for plain SGD it is γ.",
        null=(
            "descent_update_null",
            "null",
            "The null (dashed) is that of the update if the gradients were orthogonal.",
        ),
    ),
    Kind(
        "update-cosine-ratio",
        "The step really taken, over its null",
        "descent_update_ratio",
        "γ/γ⁰",
        "−cos(u, e) / null",
        "1 (dotted) is what an update made of orthogonal gradients would give.",
        baseline=1.0,
    ),
    Kind(
        "update-lolr-ratio",
        "Locally optimal learning rate of the step really taken, over its null",
        "lolr_update_ratio",
        "η*/aₜ",
        "η* / aₜ",
        "η* = η·(−⟨u,e⟩ / ‖u‖²) is the rate at which the update, in its own direction, would have "
        "landed closest to w*. 1 (dotted) is what orthogonal gradients alone would give.",
        baseline=1.0,
    ),
)
