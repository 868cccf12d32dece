"""The path of the weights in the plane of its first two principal components."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from analyze.axes import GREY, PLACES, Values
from analyze.drawing import Panel, Trace


@dataclass(frozen=True)
class Plane:
    """A figure of a path: coordinates `first` and `second` at `steps`, float64 ``[T]``."""

    name: str
    title: str
    caption: str
    labels: tuple[str, str]
    steps: Values
    first: Values
    second: Values

    def draw(self, figure: Figure) -> list[Panel]:
        """Draw the path with one scale for both coordinates, coloured by step."""
        figure.set_figheight(0.78 * min(figure.get_figwidth(), 4.2))
        axes = figure.add_subplot()
        axes.plot(self.first, self.second, color="#b5b5b5", lw=0.7)
        dots = axes.scatter(self.first, self.second, c=self.steps, s=7, cmap="viridis", zorder=3)
        known = np.flatnonzero(np.isfinite(self.first) & np.isfinite(self.second))
        for place, name in ((known[0], "first"), (known[-1], "last")) if known.size else ():
            axes.annotate(
                name,
                (self.first[place], self.second[place]),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=6.5,
            )
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xlabel(self.labels[0])
        axes.set_ylabel(self.labels[1])
        figure.colorbar(dots, ax=axes, label=PLACES["step"], pad=0.02, aspect=25)
        at = (self.first, self.second, self.steps)
        traces = [Trace(self.labels[0], GREY, *at, self.first)]
        traces.append(Trace(self.labels[1], GREY, *at, self.second))
        return [Panel(axes, traces)]
