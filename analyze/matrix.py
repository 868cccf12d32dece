"""The map of one value for each two saved steps."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from analyze.axes import GREY, PLACES, Values
from analyze.drawing import Panel, Trace

MAX_STEPS = 80


@dataclass(frozen=True)
class StepMatrix:
    """A figure of one value for each two steps: `values` float64 ``[T, T]`` at `steps` ``[T]``.

    Coloured linearly around 0; undefined cells stay blank, the diagonal too.
    """

    name: str
    title: str
    caption: str
    label: str
    steps: Values
    values: Values

    def draw(self, figure: Figure) -> list[Panel]:
        """Draw the cells, each as wide as the others; the first step is below and left."""
        figure.set_figheight(0.86 * min(figure.get_figwidth(), 4.2))
        axes = figure.add_subplot()
        count = self.steps.size
        shown = np.ma.masked_invalid(self.values)
        size = float(np.quantile(np.abs(shown.compressed()), 0.98)) if shown.count() else 1.0
        cells = axes.pcolormesh(
            np.arange(count + 1) - 0.5,
            np.arange(count + 1) - 0.5,
            shown,
            cmap=mpl.colormaps["RdBu_r"],
            vmin=-size or -1.0,
            vmax=size or 1.0,
            edgecolors="face",
            linewidth=0.1,
        )
        axes.set_aspect("equal")
        axes.grid(visible=False)
        figure.colorbar(cells, ax=axes, label=self.label, pad=0.02, aspect=25, extend="both")
        ticks = np.unique(np.linspace(0, count - 1, min(count, 5)).round().astype(int))
        names = [f"{self.steps[tick]:g}" for tick in ticks]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(FixedLocator(ticks.tolist()))
            axis.set_ticklabels(names)
        axes.set_xlabel(PLACES["step"])
        axes.set_ylabel("step s")
        traces = [
            Trace(
                f"with step {step:g}",
                GREY,
                np.arange(float(count)),
                np.full(count, float(row)),
                self.steps,
                v,
            )
            for row, (step, v) in enumerate(
                zip(self.steps, self.values.astype(np.float64), strict=True)
            )
        ]
        return [Panel(axes, traces)]
