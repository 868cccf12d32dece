"""Which figures there are: each a name, a title, a caption and the columns it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from analyze.alignment import Clock
from analyze.axes import number_label, value_scale
from analyze.charts import Chart, Dash, Epochs, Line, drawn_values
from analyze.curves import Curve, distinct
from analyze.figure_kinds import KINDS, Kind
from analyze.references import end_of_path
from analyze.verdict import END_SHARE
from capture.store.layout import UPDATES

# Okabe and Ito's palette without its yellow: told apart with every common form of colour blindness.
PALETTE = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
NULL_COLOR, USED_COLOR = "#D55E00", "#000000"
# Of the streams of one run where its colour says which run it is; "--" and ":" are comparisons.
STREAM_DASHES: tuple[Dash, ...] = ("-", "-.", (0, (6, 1, 1, 1, 1, 1)))


def palette(count: int) -> list[str]:
    """Colours for so many things side by side: `PALETTE`, or more that still differ."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    return [to_hex(color) for color in colormaps["turbo"](np.linspace(0.05, 0.95, count))]


END_EFFECT = "end effect: here γ tends to its null whatever the landscape"


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
    own_ends = {c.run: ends[c.run] for c in drawn if c.run in ends}
    epochs, said = epochs_of(drawn, own_ends) if several else (None, "")
    return Chart(
        name=kind.name,
        title=kind.title,
        caption=" ".join([_caption(kind, drawn, lines, no_null), *([said] if said else [])]),
        ylabel=kind.ylabel,
        lines=tuple(lines),
        ends=tuple(distinct(own_ends.values())),
        baseline=kind.baseline,
        legend=tuple(legend),
        angle=kind.angle,
        named=several,
        epochs=epochs,
    )


def epochs_of(
    curves: Sequence[Curve], ends: Mapping[str, tuple[float, float]]
) -> tuple[Epochs | None, str]:
    """How curves of several runs are shown at equal epochs too, and a sentence about it."""
    clocks = {curve.run: Clock(curve.steps, curve.epochs, 0) for curve in _fullest(curves)}
    known = [run for run, clock in clocks.items() if np.isfinite(clock.epochs).all()]
    if not known:
        return None, "At equal steps only: the runs do not tell their epochs."
    each, *others = distinct(_updates_in_epoch(clocks[run]) for run in known)
    if each is not None and not others and len(known) == len(clocks):
        return Epochs(each), "Equal steps are equal epochs of these runs."
    said = "One panel at equal steps, one at equal epochs."
    missing = [curve.label for curve in _fullest(curves) if curve.run not in known]
    if missing:
        said += f" The second lacks {', '.join(missing)}, whose epochs are not known."
    shown = {run: ends[run] for run in known if run in ends}
    spans = [(clocks[run].epoch_at(a), clocks[run].epoch_at(b)) for run, (a, b) in shown.items()]
    return Epochs(None, tuple(distinct(spans))), said


def _updates_in_epoch(clock: Clock) -> float | None:
    """Updates in an epoch, to 6 digits; `None` where they are not one number throughout."""
    later = clock.epochs > 0
    if not later.any() or (clock.steps[~later] != 0).any():
        return None
    rates = clock.steps[later] / clock.epochs[later]
    return float(f"{rates[0]:.6g}") if np.allclose(rates, rates[0], rtol=1e-6, atol=0) else None


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
    colors = palette(len(places))
    return {
        id(curve): colors[places.index(name)] for curve, name in zip(curves, names, strict=True)
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
