"""Figures of lines over steps and epochs, lags or components, as values.

What is drawn is decided in `analyze.figures` and its like; how a figure becomes a file, in
`analyze.drawing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analyze.axes import (
    GREY,
    Values,
    add_angle_axis,
    add_epoch_axis,
    mark_ends,
    scale_places,
    scale_steps,
    scale_values,
)
from analyze.drawing import Panel, Trace, is_wide

# A name, or an offset and the lengths of strokes and gaps.
Dash = Literal["-", "--", ":", "-."] | tuple[int, tuple[float, ...]]
Spans = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Line:
    """One line: places `x`, values `y`, float64 [N]; `low` and `high` bound its band.

    A place is a step, of which `epoch` tells more, or what the chart says.
    """

    label: str
    x: Values
    y: Values
    epoch: Values | None
    color: str
    dash: Dash = "-"
    low: Values | None = None
    high: Values | None = None
    in_legend: bool = True


@dataclass(frozen=True)
class Epochs:
    """How the epochs of a chart over steps are shown.

    Where all lines have `each` updates in an epoch, as a second scale: equal steps are equal epochs
    there. Else in a panel of its own, in which the end effects are `ends`.
    """

    each: float | None = None
    ends: Spans = ()


@dataclass(frozen=True)
class Chart:
    """A figure of lines over steps, or other `places` (see `analyze.axes.PLACES`).

    `ends` are the (first, last) steps of the end effect, `baseline` is a value to compare with,
    `legend` holds further entries as (label, dash), `angle` adds degrees on the right; `named`
    asks for a legend even of one line. `log` scales are logarithmic where no line is below 0,
    whatever its band. `epochs` is `None` where steps are all that is shown.
    """

    name: str
    title: str
    caption: str
    ylabel: str
    lines: tuple[Line, ...]
    ends: Spans = ()
    baseline: float | None = None
    legend: tuple[tuple[str, Dash], ...] = ()
    angle: bool = False
    named: bool = False
    epochs: Epochs | None = None
    places: str = "step"
    log: bool = False

    def draw(self, figure: Figure) -> list[Panel]:
        """Draw one panel, or two: at equal steps and at equal epochs."""
        both = self.epochs is not None and self.epochs.each is None
        wide = is_wide(figure)
        figure.set_figheight(2.6 if wide else 3.7 if both else 2.1)
        shape = (1, 2 if both else 1) if wide else (2 if both else 1, 1)
        panels = figure.subplots(*shape, sharey=True, squeeze=False).ravel().tolist()
        _draw_lines(panels[0], self)
        found = [Panel(panels[0], [_trace(line) for line in self.lines], self.places)]
        if self.epochs is not None and self.epochs.each is not None:
            figure.set_figheight(figure.get_figheight() + 0.4)
            add_epoch_axis(panels[0], self.epochs.each)
        if both and self.epochs is not None:
            _draw_lines(panels[1], self, self.epochs)
            told = [_trace(line, "epoch") for line in self.lines if _finite(line.epoch)]
            found.append(Panel(panels[1], told, "epoch"))
            if wide:
                panels[1].set_ylabel("")
        if self.angle:
            for axes in panels[-1:] if wide else panels:
                add_angle_axis(axes)
        _draw_legend(figure, self)
        return found


def drawn_values(lines: Iterable[Line]) -> list[Values]:
    """Every array of values that lines and their bands draw: what the scale must show."""
    bounds = [bound for line in lines for bound in (line.y, line.low, line.high)]
    return [bound for bound in bounds if bound is not None]


def _draw_lines(axes: Axes, chart: Chart, epochs: Epochs | None = None) -> None:
    found = [(line, line.x if epochs is None else line.epoch) for line in chart.lines]
    lines = [(line, x) for line, x in found if x is not None and (epochs is None or _finite(x))]
    for line, x in lines:
        axes.plot(x, line.y, ls=line.dash, color=line.color, marker=_marker(line, chart), ms=2)
        if line.low is not None and line.high is not None:
            axes.fill_between(x, line.low, line.high, color=line.color, alpha=0.18, lw=0)
    values = [line.y for line in chart.lines] if chart.log else drawn_values(chart.lines)
    scale_values(axes, values, log=chart.log)
    if chart.baseline is not None:
        axes.axhline(chart.baseline, color="black", lw=0.9, ls=":")
    ends = chart.ends if epochs is None else epochs.ends
    shown = np.concatenate([*(x for _, x in lines), *([last] for _, last in ends)])
    shown = shown[np.isfinite(shown)]
    if chart.places == "step":
        scale_steps(axes, shown, "epoch" if epochs is not None else "step")
    else:
        scale_places(axes, shown, chart.places)
    mark_ends(axes, ends)
    axes.set_ylabel(chart.ylabel)


def _finite(values: Values | None) -> bool:
    return values is not None and bool(np.isfinite(values).all())


def _trace(line: Line, place: str = "step") -> Trace:
    bounds = {"low": line.low, "high": line.high}
    if place == "epoch" and line.epoch is not None:
        return Trace(line.label, line.color, line.epoch, line.y, line.epoch, line.y, **bounds)
    return Trace(line.label, line.color, line.x, line.y, line.x, line.y, **bounds, epoch=line.epoch)


def _marker(line: Line, chart: Chart) -> str | None:
    """Mark the points where a line would hide them: a few, or some between undefined ones."""
    good = np.isfinite(line.y)
    lonely = good & ~np.r_[False, good[:-1]] & ~np.r_[good[1:], False]
    few = good.sum() < 4 or (chart.places != "step" and line.dash != ":" and good.sum() < 25)
    return "o" if few or lonely.any() else None


def _draw_legend(figure: Figure, chart: Chart) -> None:
    entries = [(line.label, line.dash, line.color) for line in chart.lines if line.in_legend]
    entries += [(label, dash, GREY) for label, dash in chart.legend]
    if len(entries) >= 2 or chart.named:
        add_legend(figure, entries)


def add_legend(figure: Figure, entries: Sequence[tuple[str, Dash, str]]) -> None:
    """Put a legend of labels, dashes and colours above, with as many columns as there is room."""
    # In points: about 4 a letter, and 27 for the line before it and the space behind it.
    columns = int(figure.get_figwidth() * 72 / (4 * max(len(e[0]) for e in entries) + 27)) or 1
    figure.set_figheight(figure.get_figheight() + 0.14 * -(-len(entries) // columns))
    handles = [Line2D([], [], ls=dash, color=color) for _, dash, color in entries]
    figure.legend(handles, [entry[0] for entry in entries], loc="outside upper left", ncols=columns)
