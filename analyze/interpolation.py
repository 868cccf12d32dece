"""Whether a run interpolates: called from losses and gradients of single batches at w_T.

A model interpolates its training data where every sample's, hence every minibatch's, gradient
vanishes at w_T, with the training loss at its least value (S. Ma, R. Bassily and M. Belkin, "The
power of interpolation", ICML 2018). A small full gradient does not show that: it vanishes at any
stationary point. Nor do RSI and EB that rise at the end: they do so whatever the landscape.

The call rests on batches of training data measured at w_0 and w_T: the stream `fixed`, and for the
loss `full` where it is there. With x the larger of mean loss at w_T / at w_0, and the largest over
batches of ‖g_b(w_T)‖ / ‖g_b(w_0)‖,

    interpolates            x ≤ threshold, by default 0.01
    does not                x ≥ √threshold, then 0.1
    cannot be told          between the two, or where something was not measured

This takes for granted a loss whose least value is 0: a cross-entropy without smoothed labels, a
squared error. The threshold is a convention; the numbers are shown beside the call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analyze.rows import select_rows, sizes_of, whole_model
from analyze.tables import read_metadata
from capture.store.errors import UsageError

Values = NDArray[np.float64]

INTERPOLATES, DOES_NOT, UNKNOWN = "interpolates", "does not", "cannot be told"
THRESHOLD = 0.01
_BATCHES, _WHOLE = "fixed", "full"


@dataclass(frozen=True)
class Interpolation:
    """The call for one run, with its evidence; NaN and 0 where something was not measured.

    `loss` and `loss_start` are mean training losses at w_T and w_0, of the stream `loss_stream`;
    `gradient` is the largest of the batches' ‖g_b(w_T)‖ / ‖g_b(w_0)‖, and `gradient_norm` the
    largest ‖g_b(w_T)‖. `reason` says in words what the call rests on or what is missing.
    """

    run: str
    verdict: str
    reason: str
    loss: float
    loss_start: float
    loss_stream: str
    gradient: float
    gradient_norm: float
    batches: int
    threshold: float


def call_interpolation(table: pa.Table, threshold: float = THRESHOLD) -> list[Interpolation]:
    """Call interpolation for every run of a table of `analyze.tables`, whole models only.

    Losses and norms do not depend on the reference: those of the first one are read.
    """
    if not 0 < threshold < 1:  # nor NaN
        raise UsageError(
            "the threshold of interpolation lies between 0 and 1",
            where=f"threshold = {threshold:g}",
            fix=f"the default is {THRESHOLD:g}",
        )
    entries = {entry["run"]: entry for entry in read_metadata(table)["runs"]}
    table = whole_model(table, sizes_of(entries.values()))
    return [
        _call(select_rows(table, run=run), run, entry.get("final_step"), threshold)
        for run, entry in entries.items()
    ]


def _call(rows: pa.Table, run: str, final_step: int | None, threshold: float) -> Interpolation:
    own, whole = (select_rows(rows, stream=stream) for stream in (_BATCHES, _WHOLE))
    gradients = _ends(own, "norm_grad", final_step)
    losses, stream = _ends(whole, "loss", final_step), _WHOLE
    if not len(losses) or not np.isfinite(losses).all():
        losses, stream = _ends(own, "loss", final_step), _BATCHES
    with np.errstate(all="ignore"):
        shares = gradients[:, 1] / np.where(gradients[:, 0] > 0, gradients[:, 0], np.nan)
    start, end = losses.mean(axis=0) if len(losses) else (math.nan, math.nan)
    gradient = float(shares.max()) if len(shares) else math.nan
    verdict, reason = _judge(
        final_step, float(start), float(end), gradient, len(gradients), threshold
    )
    return Interpolation(
        run=run,
        verdict=verdict,
        reason=reason,
        loss=float(end),
        loss_start=float(start),
        loss_stream=stream if len(losses) else "",
        gradient=gradient,
        gradient_norm=float(gradients[:, 1].max()) if len(gradients) else math.nan,
        batches=len(gradients),
        threshold=threshold,
    )


def _judge(
    final_step: int | None,
    start: float,
    end: float,
    gradient: float,
    batches: int,
    threshold: float,
) -> tuple[str, str]:
    """The call, and what it rests on, in words."""
    if final_step is None:
        return UNKNOWN, "the run has not finished: it has no w_T"
    if not batches:
        return UNKNOWN, (
            "no gradients of single training batches at w_0 and w_T; measure them with "
            "`capture probe RUN --gradients fixed:10,full`"
        )
    if not (math.isfinite(gradient) and math.isfinite(end) and 0 < start < math.inf):
        return UNKNOWN, "a loss or gradient at w_0 or w_T is 0, not finite or not recorded"
    largest, bound = max(end / start, gradient), f"{threshold:g}"
    if largest <= threshold:
        return INTERPOLATES, f"both ≤ {bound}"
    far = math.sqrt(threshold)
    which = [
        name for name, share in (("loss", end / start), ("gradients", gradient)) if share >= far
    ]
    if which:
        return DOES_NOT, f"{' and '.join(which)} ≥ {far:.3g}"
    return UNKNOWN, f"between {bound} and {far:.3g}"


def _ends(rows: pa.Table, column: str, final_step: int | None) -> Values:
    """A column at w_0 and w_T for each batch measured at both: ``[B, 2]``."""
    found: dict[int, dict[int, float]] = {}
    names = ("step", "batch", column)
    for step, batch, value in zip(*(rows[name].to_pylist() for name in names), strict=True):
        if step in (0, final_step):
            found.setdefault(-1 if batch is None else batch, {}).setdefault(step, value)
    pairs = [
        (values[0], values[final_step])
        for values in found.values()
        if final_step and values.keys() >= {0, final_step}
    ]
    return np.array(pairs, np.float64).reshape(len(pairs), 2)
