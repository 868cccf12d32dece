"""Figures as values, and how they become SVG, PNG and PDF.

What is drawn is decided in `analyze.figures`. Widths are in inches; `COLUMN` is that of one of the
two columns of a journal's page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analyze.axes import (
    GREY,
    STYLE,
    Values,
    add_angle_axis,
    mark_ends,
    scale_steps,
    scale_values,
)
from analyze.heatmap import HeatMap, draw_cells

# A name, or an offset and the lengths of strokes and gaps.
Dash = Literal["-", "--", ":", "-."] | tuple[int, tuple[float, ...]]
Format = Literal["svg", "png", "pdf"]
FORMATS: tuple[Format, ...] = ("png", "svg", "pdf")
COLUMN = 3.25

_METADATA: dict[str, dict[str, None]] = {
    "svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
    "png": {"Software": None},
    "pdf": dict.fromkeys(("CreationDate", "Creator", "Producer")),
}


@dataclass(frozen=True)
class Line:
    """One line: steps `x`, values `y` and `epoch`, float64 [T]; `low` and `high` bound its band."""

    label: str
    x: Values
    y: Values
    epoch: Values
    color: str
    dash: Dash = "-"
    low: Values | None = None
    high: Values | None = None
    in_legend: bool = True


@dataclass(frozen=True)
class Chart:
    """A figure of lines over steps.

    `ends` are the (first, last) steps of the end effect, `baseline` is a value to compare with,
    `legend` holds further entries as (label, dash), `angle` adds degrees on the right; `named`
    asks for a legend even of one line.
    """

    name: str
    title: str
    caption: str
    ylabel: str
    lines: tuple[Line, ...]
    ends: tuple[tuple[float, float], ...] = ()
    baseline: float | None = None
    legend: tuple[tuple[str, Dash], ...] = ()
    angle: bool = False
    named: bool = False


@dataclass(frozen=True)
class Drawing:
    """An `<svg>` element for a page, and where its points lie in it, ready for JSON."""

    svg: str
    points: dict[str, Any]


def draw_inline(chart: Chart | HeatMap, identity: str, width: float = COLUMN) -> Drawing:
    """Draw for a page; `identity` (letters, digits, hyphens) keeps ids on one page apart."""
    with _style(identity):
        figure, axes = _figure(chart, width)
        svg = _save(figure, "svg").decode()
        points = _points(chart, axes, figure.get_figheight() * 72)
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'\bid="', f'id="{identity}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{identity}-", svg)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    label = chart.title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        lambda found: f'<svg {namespaces} {found[1]} role="img" aria-label="{label}">',
        svg,
        count=1,
    )
    return Drawing(re.sub(r"\s*\n\s*", "\n", svg), points)


def draw_file(chart: Chart | HeatMap, kind: Format, width: float = COLUMN) -> bytes:
    """Draw for print: equal charts give equal bytes, PDF fonts are embedded as TrueType."""
    with _style(chart.name):
        return _save(_figure(chart, width)[0], kind)


@contextmanager
def _style(salt: str) -> Iterator[None]:
    settings: Any = {**STYLE, "svg.hashsalt": salt}
    with mpl.rc_context(settings), warnings.catch_warnings():
        # A run may have a name in a script that the font lacks: boxes are drawn, nothing breaks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _save(figure: Figure, kind: Format) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=72 if kind == "svg" else 300, metadata=_METADATA[kind])
    return buffer.getvalue()


def _figure(chart: Chart | HeatMap, width: float) -> tuple[Figure, Axes]:
    wide = width > 1.5 * COLUMN
    figure = Figure(figsize=(width, 2.6 if wide else 2.1), layout="constrained")
    axes = figure.add_subplot()
    if isinstance(chart, HeatMap):
        figure.set_figheight(max(1.6, 0.9 + 0.13 * len(chart.groups)))
        draw_cells(figure, axes, chart)
    else:
        _draw_lines(axes, chart)
        _draw_legend(figure, chart)
    return figure, axes


def _draw_lines(axes: Axes, chart: Chart) -> None:
    for line in chart.lines:
        axes.plot(line.x, line.y, ls=line.dash, color=line.color, marker=_marker(line), ms=2)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=line.color, alpha=0.18, lw=0)
    scale_values(axes, drawn_values(chart.lines))
    if chart.baseline is not None:
        axes.axhline(chart.baseline, color="black", lw=0.9, ls=":")
    steps = [line.x for line in chart.lines] + [np.array([last]) for _, last in chart.ends]
    scale_steps(axes, np.concatenate(steps))
    mark_ends(axes, chart.ends)
    axes.set_ylabel(chart.ylabel)
    if chart.angle:
        add_angle_axis(axes)


def drawn_values(lines: Iterable[Line]) -> list[Values]:
    """Every array of values that lines and their bands draw: what the scale must show."""
    bounds = [bound for line in lines for bound in (line.y, line.low, line.high)]
    return [bound for bound in bounds if bound is not None]


def _marker(line: Line) -> str | None:
    """Mark the points where a line would hide them: a few, or some between undefined ones."""
    good = np.isfinite(line.y)
    lonely = good & ~np.r_[False, good[:-1]] & ~np.r_[good[1:], False]
    return "o" if good.sum() < 4 or lonely.any() else None


def _draw_legend(figure: Figure, chart: Chart) -> None:
    entries = [(line.label, line.dash, line.color) for line in chart.lines if line.in_legend]
    entries += [(label, dash, GREY) for label, dash in chart.legend]
    if len(entries) < 2 and not chart.named:
        return
    # In points: about 4 a letter, and 27 for the line before it and the space behind it.
    columns = int(figure.get_figwidth() * 72 / (4 * max(len(e[0]) for e in entries) + 27)) or 1
    figure.set_figheight(figure.get_figheight() + 0.14 * -(-len(entries) // columns))
    handles = [Line2D([], [], ls=dash, color=color) for _, dash, color in entries]
    figure.legend(handles, [entry[0] for entry in entries], loc="outside upper left", ncols=columns)


def _points(chart: Chart | HeatMap, axes: Axes, height: float) -> dict[str, Any]:
    """Positions in the SVG's own units, in which y runs down from the top of the figure."""
    if isinstance(chart, HeatMap):
        middle, first = (chart.edges[:-1] + chart.edges[1:]) / 2, chart.edges[:-1]
        rows = enumerate(zip(chart.groups, chart.values, strict=True))
        lines = [
            _place(axes, height, middle, np.full(values.size, float(row)))
            | {"label": name, "color": GREY, "x": _json(first), "v": _json(values)}
            for row, (name, values) in rows
        ]
    else:
        lines = [
            _place(axes, height, line.x, line.y)
            | {"label": line.label, "color": line.color, "x": _json(line.x), "v": _json(line.y)}
            | {"epoch": _json(line.epoch)}
            for line in chart.lines
        ]
    left, bottom, right, top = axes.bbox.extents
    return {"box": [left, height - top, right, height - bottom], "lines": lines}


def _place(axes: Axes, height: float, x: Values, y: Values) -> dict[str, Any]:
    positions = np.ma.filled(axes.transData.transform(np.column_stack((x, y))), np.nan)
    return {"px": _json(positions[:, 0].round(1)), "py": _json((height - positions[:, 1]).round(1))}


def _json(values: Values) -> list[float | int | None]:
    """JSON has no NaN: null stands for it. Whole numbers lose their `.0`."""
    return [
        None if not np.isfinite(v) else int(v) if v == int(v) and abs(v) < 2**53 else v
        for v in values.tolist()
    ]
