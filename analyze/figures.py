"""Which figures there are: each a name, a title, a caption and the columns it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analyze.axes import number_label, value_scale
from analyze.charts import Chart, Dash, Line, drawn_values
from analyze.curves import Curve, distinct
from analyze.references import end_of_path
from analyze.verdict import END_SHARE
from capture.store.layout import UPDATES

# Okabe and Ito's palette without its yellow: told apart with every common form of colour blindness.
PALETTE = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
NULL_COLOR, USED_COLOR = "#D55E00", "#000000"
# Of the streams of one run where its colour says which run it is; "--" and ":" are comparisons.
STREAM_DASHES: tuple[Dash, ...] = ("-", "-.", (0, (6, 1, 1, 1, 1, 1)))

END_EFFECT = "end effect: here γ tends to its null whatever the landscape"


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
    ),
    Kind(
        "eb",
        "Upper error bound EB⁺",
        "eb",
        "EB⁺",
        "EB⁺",
        "EB⁺ = ‖g‖ / ‖e‖. On a well-behaved path it stays below some L. "
        "A rise at the end is no evidence by itself: the end effect makes one too.",
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
    ),
)


def build_figures(
    curves: Sequence[Curve], ends: Mapping[str, tuple[float, float]], no_null: str | None = None
) -> list[Chart]:
    """Build each figure for which the curves hold a defined value.

    `ends` are the (first, last) steps of the end effect by run; `no_null` says why there is none.
    """
    charts = (_build(kind, curves, ends, no_null) for kind in KINDS)
    return [chart for chart in charts if chart is not None]


def end_of(last_step: float, reference: str) -> tuple[float, float] | None:
    """The first and last step of the end effect, where w* lies on the run's own path."""
    end = end_of_path(reference, int(last_step))
    return ((1 - END_SHARE) * end, float(end)) if end else None


def _build(
    kind: Kind,
    curves: Sequence[Curve],
    ends: Mapping[str, tuple[float, float]],
    no_null: str | None,
) -> Chart | None:
    drawn = [curve for curve in curves if _defined(curve, kind.column)]
    if kind.per_run:
        drawn = _fullest(drawn)
    elif kind.column == "loss":
        # An update has the loss of its minibatch.
        drawn = [curve for curve in drawn if curve.stream != UPDATES] or _fullest(drawn)
    if not drawn:
        return None
    several = len({curve.run for curve in curves}) > 1
    colors = _colors(curves, several)
    streams = distinct(curve.stream for curve in drawn)
    lines = [
        _line(
            curve,
            kind.column,
            _label(kind, curve, drawn, several),
            colors[id(curve)],
            STREAM_DASHES[streams.index(curve.stream) % len(STREAM_DASHES)] if several else "-",
        )
        for curve in drawn
    ]
    legend: list[tuple[str, Dash]] = []
    if kind.null is not None:
        column, label, _ = kind.null
        with_null = [curve for curve in drawn if _defined(curve, column)]
        lines += _beside(with_null, drawn, column, label, NULL_COLOR, "--", colors, legend)
    if kind.used:
        used = [curve for curve in _fullest(drawn) if _defined(curve, "lr")]
        lines += _beside(used, drawn, "lr", "rate used", USED_COLOR, ":", colors, legend)
    return Chart(
        name=kind.name,
        title=kind.title,
        caption=_caption(kind, drawn, lines, no_null),
        ylabel=kind.ylabel,
        lines=tuple(lines),
        ends=tuple(distinct(ends[c.run] for c in drawn if c.run in ends)),
        baseline=kind.baseline,
        legend=tuple(legend),
        angle=kind.angle,
        named=several,
    )


def _defined(curve: Curve, column: str) -> bool:
    return bool(np.isfinite(curve.values[column]).any())


def _fullest(curves: Sequence[Curve]) -> list[Curve]:
    """Of each run the curve with the most steps."""
    by_run = {run: [c for c in curves if c.run == run] for run in distinct(c.run for c in curves)}
    return [max(own, key=lambda curve: curve.steps.size) for own in by_run.values()]


def _colors(curves: Sequence[Curve], several_runs: bool) -> dict[int, str]:
    """The colour of each curve by its id: one for each run, or of a single run for each stream."""
    names = [curve.run if several_runs else curve.stream for curve in curves]
    places = distinct(names)
    return {
        id(curve): PALETTE[places.index(name) % len(PALETTE)]
        for curve, name in zip(curves, names, strict=True)
    }


def _label(kind: Kind, curve: Curve, drawn: Sequence[Curve], several_runs: bool) -> str:
    parts = [curve.label] if several_runs else []
    if not kind.per_run and (len({c.stream for c in drawn}) > 1 or not parts):
        parts.append(curve.stream)
    return " ".join([kind.symbol, *parts])


def _line(curve: Curve, column: str, label: str, color: str, dash: Dash) -> Line:
    x, y, epochs = curve.steps, curve.values[column], curve.epochs
    return Line(label, x, y, epochs, color, dash, curve.low.get(column), curve.high.get(column))


def _beside(
    curves: Sequence[Curve],
    drawn: Sequence[Curve],
    column: str,
    label: str,
    color: str,
    dash: Dash,
    colors: Mapping[int, str],
    legend: list[tuple[str, Dash]],
) -> list[Line]:
    """Comparison lines: in their own colour beside a single curve, else in that of their curve."""
    single = len(drawn) == 1
    if curves and not single:
        legend.append((label, dash))
    return [
        Line(
            label if single else f"{label} {curve.label} {curve.stream}",
            curve.steps,
            curve.values[column],
            curve.epochs,
            color if single else colors[id(curve)],
            dash,
            in_legend=single,
        )
        for curve in curves
    ]


def _caption(kind: Kind, drawn: Sequence[Curve], lines: Sequence[Line], no_null: str | None) -> str:
    notes = [kind.caption]
    if kind.null is not None:
        known = any(_defined(curve, kind.null[0]) for curve in drawn)
        notes.append(kind.null[2] if known else f"No null: {no_null or 'see above'}.")
    many = [curve for curve in drawn if curve.batches > 1 and not kind.per_run]
    if many:
        names = ", ".join(distinct(f"{c.stream} ({c.batches} a step)" for c in many))
        notes.append(f"Line and band: median, 10 % and 90 % quantile over the batches of {names}.")
    undefined = sum(int((~np.isfinite(c.values[kind.column])).sum()) for c in drawn)
    if undefined:
        total = sum(c.steps.size for c in drawn)
        notes.append(f"{undefined} of {total} values are undefined (NaN) and not drawn.")
    kept = max(curve.kept for curve in drawn)
    if kept > 1:
        notes.append(f"One row in {kept} is drawn.")
    scale, threshold = value_scale(drawn_values(lines))
    zeros = sum(int((line.y == 0).sum()) for line in lines) if scale == "log" else 0
    if zeros:
        notes.append(f"{zeros} values are 0, which a logarithmic scale cannot show.")
    if scale == "symlog":
        notes.append(f"The scale is linear within ±{number_label(threshold)}, logarithmic beyond.")
    return " ".join(notes)
