"""The heat map of one value per group of coordinates and step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analyze.axes import GREY, Values, mark_ends, number_label, scale_steps
from analyze.curves import Columns, distinct, select, shorten
from analyze.derived import NULLS, cosine_of, rate_of
from analyze.drawing import Panel, Trace
from capture.store.layout import UPDATES

MAX_GROUPS, MAX_CELLS = 24, 80


@dataclass(frozen=True)
class HeatMap:
    """A figure of one value per group and step: `values` float64 [groups, T], `edges` [T + 1].

    `grouping` is what a group is, a layer or a tensor; `sizes` are their numbers of coordinates.
    `edges` are steps, those of the cells. A `ratio` is coloured by its logarithm around 1, with
    negative values in dark grey; anything else linearly around 0. Undefined cells stay blank.
    """

    name: str
    title: str
    caption: str
    label: str
    grouping: str
    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    edges: Values
    values: Values
    ratio: bool
    ends: tuple[tuple[float, float], ...] = ()

    def draw(self, figure: Figure) -> list[Panel]:
        """Draw the cells; their values can be asked for at the first step of each."""
        figure.set_figheight(max(1.6, 0.9 + 0.13 * len(self.groups)))
        axes = figure.add_subplot()
        draw_cells(figure, axes, self)
        middle, first = (self.edges[:-1] + self.edges[1:]) / 2, self.edges[:-1]
        traces = [
            Trace(name, GREY, middle, np.full(values.size, float(row)), first, values)
            for row, (name, values) in enumerate(zip(self.groups, self.values, strict=True))
        ]
        return [Panel(axes, traces)]


def build_heat_maps(
    columns: Columns, stream: str, end: tuple[float, float] | None, grouping: str = "group"
) -> list[HeatMap]:
    """Build the views by group of one stream of one run and reference: γ/γ⁰ and η*/a_t, else γ.

    At most `MAX_GROUPS` groups, the largest; the median over batches and consecutive steps.
    """
    rows = select(columns, stream=stream)
    ratios = (f"{cosine_of(stream)}_ratio", f"{rate_of(stream)}_ratio")
    names = [name for name in ratios if np.isfinite(rows[name]).any()]
    maps = [_build(rows, name, stream, end, grouping) for name in names or [cosine_of(stream)]]
    return [made for made in maps if made is not None]


def _build(
    rows: Columns, column: str, stream: str, end: tuple[float, float] | None, grouping: str
) -> HeatMap | None:
    groups = distinct(rows["group"])
    sizes = {g: int(rows["num_parameters"][rows["group"] == g].max()) for g in groups}
    largest = sorted(groups, key=lambda g: -sizes[g])[:MAX_GROUPS]
    shown = [g for g in groups if g in largest]
    ratio = column in NULLS
    steps = np.unique(rows["step"])
    if not shown or not np.isfinite(rows[column]).any():
        return None
    width = -(-steps.size // MAX_CELLS)
    edges = np.append(steps[::width], steps[-1] + (steps[-1] - steps[-2] if steps.size > 1 else 1))
    cells = np.array([_cells(select(rows, group=group), column, edges) for group in shown])
    own = "−cos(u, e)" if stream == UPDATES else "γ"
    symbol = own if not ratio else "η*/aₜ" if column == f"{rate_of(stream)}_ratio" else "γ/γ⁰"
    below = "η*" if symbol == "η*/aₜ" else own
    notes = [
        f"{symbol} of each group's own {'update' if stream == UPDATES else 'gradient'} and "
        "distance, by step.",
        f"Red: above 1, blue: below 1 (logarithmic); dark grey: {below} < 0; blank: undefined."
        if ratio
        else "Red: above 0, blue: below 0; blank: undefined.",
    ]
    if width > 1:
        notes.append(f"Each cell is the median of {width} consecutive rows.")
    if len(groups) > len(shown):
        notes.append(f"The {len(shown)} largest of {len(groups)} groups, in the model's order.")
    return HeatMap(
        name=f"groups-{stream}{'-rate' if symbol == 'η*/aₜ' else ''}",
        title=f"{symbol} by {grouping}, {stream}",
        caption=" ".join(notes),
        label=symbol,
        grouping=grouping,
        groups=tuple(shown),
        sizes=tuple(sizes[g] for g in shown),
        edges=edges,
        values=cells,
        ratio=ratio,
        ends=() if end is None else (end,),
    )


def _cells(rows: Columns, column: str, edges: Values) -> Values:
    place = np.searchsorted(edges, rows["step"], side="right") - 1
    result = np.full(edges.size - 1, np.nan)
    for cell in np.unique(place):
        values = rows[column][place == cell]
        if np.isfinite(values).any():
            result[cell] = np.median(values[np.isfinite(values)])
    return result


def draw_cells(figure: Figure, axes: Axes, chart: HeatMap) -> None:
    """Draw the cells, their colour bar and the names of the groups, the first one on top."""
    negative = (chart.values < 0) & chart.ratio
    shown = np.ma.masked_where(negative | ~np.isfinite(chart.values), chart.values)
    cells = _mesh(axes, chart, shown)
    norm, ticks = _norm(shown, chart.ratio)
    cells.set(norm=norm, cmap=mpl.colormaps["RdBu_r"])
    _mesh(axes, chart, np.ma.masked_where(~negative, negative)).set(cmap=ListedColormap(["#333"]))
    bar = figure.colorbar(cells, ax=axes, label=chart.label, pad=0.02, aspect=25, extend="both")
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_label(value)))
    names = [
        f"{shorten(name, 20)} · {size:,}"
        for name, size in zip(chart.groups, chart.sizes, strict=True)
    ]
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_ylabel(f"{chart.grouping} · parameters")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    axes.invert_yaxis()
    scale_steps(axes, chart.edges)
    mark_ends(axes, chart.ends, shade=False)


def _mesh(axes: Axes, chart: HeatMap, values: Any) -> QuadMesh:
    rows = np.arange(len(chart.groups) + 1) - 0.5
    return axes.pcolormesh(chart.edges, rows, values, edgecolors="face", linewidth=0.1)


def _norm(values: Any, ratio: bool) -> tuple[Normalize, list[float]]:
    """A symmetric norm and its ticks: equally far from the neutral value looks equally strong."""
    sizes = np.abs(np.log(values.compressed()) if ratio else values.compressed())
    size = float(np.quantile(sizes, 0.98)) if sizes.size else 1.0
    if not ratio:
        size = float(f"{size:.1g}") or 1.0
        return Normalize(-size, size), [-size, -size / 2, 0, size / 2, size]
    limit = max(float(np.exp(size)), 2.0)
    sides = [t for t in (2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1e3, 1e4) if t <= limit]
    chosen = sides[:: max(1, -(-len(sides) // 3))]
    return LogNorm(1 / limit, limit), sorted([1.0, *chosen, *(1 / t for t in chosen)])
