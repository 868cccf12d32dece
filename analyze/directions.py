"""The steps that a run took, as directions: what its optimizer went along for a rate of 1.

With w_{t+1} = w_t - η_t d_t for the recorded updates d = -u/η_t, whatever the optimizer; for the
minibatch gradients of plain SGD d = g + λw, with g clipped where it was clipped. The rate that
lands closest to w* is ⟨d, e⟩ / ‖d‖².

Axes: N rows of one stream.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analyze.optimizer import read_optimizer
from analyze.quantities import Values, ratio
from analyze.sums import unclipping
from capture.store.errors import RESTORE, DamagedError, InputError, UsageError
from capture.store.layout import METADATA
from capture.store.reader import Run

Integers = NDArray[np.int64]

SOURCES = ("updates", "minibatch")
_RECORD = "record the training again with --gradients minibatch,updates"


def choose_source(run: Run, source: str | None = None) -> str:
    """Return the stream that rates come from; `InputError` where the run has not what it needs.

    Minibatch gradients tell the rate of plain SGD alone: any other optimizer steps elsewhere.
    """
    if source not in (None, *SOURCES):
        raise UsageError(f"no rate comes from {source!r}", fix=f"choose from {', '.join(SOURCES)}")
    if source != "minibatch" and has_rows(run, "updates"):
        return "updates"
    if source == "updates":
        raise InputError("no updates are recorded", where=run.path, fix=_RECORD)
    has = has_rows(run, "minibatch")
    why = not_plain(run) if has else "no minibatch gradients are recorded"
    if why is None:
        return "minibatch"
    missing = "" if source else "no updates are recorded, and "
    raise InputError(
        f"{missing}minibatch gradients tell no rate here: {why}",
        where=run.path,
        fix="leave out --from minibatch" if has_rows(run, "updates") else _RECORD,
    )


def not_plain(run: Run) -> str | None:
    """Why the updates of a run are not those of plain SGD at one rate; `None` where they are."""
    facts, known = read_optimizer(run), run.scalar_names()
    if facts.kind != "sgd":
        return facts.no_null_reason or f"the optimizer is {facts.name}, not plain SGD"
    if "group_momentum" not in known:
        return "whether it had momentum is not recorded"
    if np.any(run.scalar("group_momentum") != 0):
        return "this SGD has momentum, and steps elsewhere"
    return "the parameter groups have rates of their own" if several_rates(run) else None


def several_rates(run: Run) -> bool:
    """Whether parameter groups of the run differ in their learning rate at any step."""
    if "group_lr" not in run.scalar_names():
        return False
    rates = run.scalar("group_lr")
    return bool(rates.ndim == 2 and (rates != rates[:, :1]).any())


def directions(rows: pa.Table, source: str) -> tuple[Values, Values]:
    """⟨d, e⟩ and ‖d‖² of each row of one stream, where w_{t+1} = w_t - η_t d_t.

    NaN where the rate is 0 or unknown, and for minibatch gradients that were clipped before
    weight decay was added: their columns do not tell.
    """
    if source == "updates":
        rate = rows["lr"].to_numpy()
        rate = np.where(rate > 0, rate, np.nan)
        dot, norm = -rows["dot_prod_update"].to_numpy(), rows["norm_update"].to_numpy()
        return _sound(ratio(dot, rate), ratio(norm, rate) ** 2)
    clip = 1 / unclipping(rows["clip_factor"].to_numpy())
    decayed = rows["norm_grad_wd"].to_numpy() != rows["norm_grad"].to_numpy()
    clip = np.where(decayed & (clip != 1), np.nan, clip)
    return _sound(
        rows["dot_prod_wd"].to_numpy() * clip, (rows["norm_grad_wd"].to_numpy() * clip) ** 2
    )


def first_step(run: Run) -> int:
    """Updates before the run's step 0: a branch counts from 0, its learning rate from its parent.

    `DamagedError` where the run tells something else than a number.
    """
    parent = run.attributes.get("parent")
    position = parent.get("position", 0) if isinstance(parent, dict) else 0
    if type(position) is not int or not 0 <= position < 2**53:
        raise DamagedError(
            "the run's attributes are damaged, parent", where=run.path / METADATA, fix=RESTORE
        )
    return position


def last_step(run: Run, steps: Integers) -> int:
    """T, or the last of `steps` in a run that has not finished."""
    return int(steps.max(initial=0)) if run.final_step is None else run.final_step


def rated_streams(run: Run) -> list[str]:
    """The streams of a run that tell learning rates."""
    return [name for name in SOURCES if has_rows(run, name)]


def has_rows(run: Run, stream: str) -> bool:
    """Whether a stream is there and has rows."""
    return stream in run.stream_names and len(run.stream(stream)) > 0


def _sound(dot: Values, square: Values) -> tuple[Values, Values]:
    """NaN in both where either is not finite, or the norm is 0."""
    with np.errstate(all="ignore"):
        bad = ~np.isfinite(dot) | ~np.isfinite(square) | (square == 0)
    return np.where(bad, np.nan, dot), np.where(bad, np.nan, square)
