"""Numbers of groups of runs with intervals and bands: one panel per quantity and alignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from analyze.axes import Values, scale_values
from analyze.charts import add_legend
from analyze.drawing import Panel, Trace

# Between the outermost groups of a part, as a share of the way to the next part.
_SPREAD = 0.6


@dataclass(frozen=True)
class Estimates:
    """The numbers of one group in each part, NaN where there is none; arrays ``[parts]``.

    `low` and `high` are the interval, `q10` and `q90` the band of the rows.
    """

    label: str
    color: str
    value: Values
    low: Values
    high: Values
    q10: Values
    q90: Values


@dataclass(frozen=True)
class Measured:
    """One quantity: how it is written, what it is compared with, its estimates by alignment."""

    symbol: str
    baseline: float | None
    estimates: Mapping[str, tuple[Estimates, ...]]


@dataclass(frozen=True)
class Intervals:
    """A figure of `quantities` below each other, and their `alignments` beside each other."""

    name: str
    title: str
    caption: str
    parts: tuple[str, ...]
    alignments: tuple[str, ...]
    quantities: tuple[Measured, ...]

    def draw(self, figure: Figure) -> list[Panel]:
        """Draw dots with intervals over pale bands, the groups of a part beside each other."""
        rows, columns = len(self.quantities), len(self.alignments)
        figure.set_figheight(0.5 + 1.15 * rows)
        grid = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
        panels = []
        for row, quantity in zip(grid, self.quantities, strict=True):
            for axes, alignment in zip(row, self.alignments, strict=True):
                found = quantity.estimates[alignment]
                traces = _draw(axes, found, quantity, self.parts)
                panels.append(Panel(axes, traces, "part"))
            row[0].set_ylabel(quantity.symbol)
        for axes, alignment in zip(grid[0], self.alignments, strict=True):
            axes.set_title(alignment, fontsize=7)
        groups = self.quantities[0].estimates[self.alignments[0]]
        add_legend(figure, [(each.label, "-", each.color) for each in groups])
        return panels


def _draw(
    axes: Axes, found: tuple[Estimates, ...], quantity: Measured, parts: tuple[str, ...]
) -> list[Trace]:
    places = np.arange(len(parts), dtype=np.float64)
    step = _SPREAD / max(1, len(found) - 1)
    traces = []
    for index, each in enumerate(found):
        x = places + (index - (len(found) - 1) / 2) * step
        axes.vlines(x, each.q10, each.q90, color=each.color, lw=4, alpha=0.22)
        axes.vlines(x, each.low, each.high, color=each.color, lw=1.1)
        axes.plot(x, each.value, "o", ms=2.6, color=each.color)
        traces.append(
            Trace(
                f"{quantity.symbol} {each.label}",
                each.color,
                x,
                each.value,
                parts,
                each.value,
                each.low,
                each.high,
            )
        )
    bounds = [v for each in found for v in (each.value, each.low, each.high, each.q10, each.q90)]
    if quantity.baseline is not None:
        axes.axhline(quantity.baseline, color="black", lw=0.9, ls=":")
        bounds.append(np.array([quantity.baseline]))
    scale_values(axes, bounds)
    axes.set_xlim(-0.6, len(parts) - 0.4)
    axes.xaxis.set_major_locator(FixedLocator(places.tolist()))
    axes.set_xticklabels(parts)
    axes.grid(visible=False, axis="x")
    return traces
