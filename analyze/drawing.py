"""How a picture becomes SVG for a page, or PNG, SVG and PDF for print.

Widths are in inches; `COLUMN` is that of one of the two columns of a journal's page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyze.axes import STYLE, Values

Format = Literal["svg", "png", "pdf"]
FORMATS: tuple[Format, ...] = ("png", "svg", "pdf")
COLUMN = 3.25

_METADATA: dict[str, dict[str, None]] = {
    "svg": dict.fromkeys(("Date", "Creator", "Format", "Type")),
    "png": {"Software": None},
    "pdf": dict.fromkeys(("CreationDate", "Creator", "Producer")),
}


@dataclass(frozen=True)
class Trace:
    """Points of one panel that can be asked for their values; arrays ``[N]``.

    Drawn at `x` and `y` and said to be `value` at `place`, which is a number or a name; `low` and
    `high` are the ends of a band or an interval, `epoch` what belongs to a place that is a step.
    """

    label: str
    color: str
    x: Values
    y: Values
    place: Sequence[Any] | Values
    value: Values
    low: Values | None = None
    high: Values | None = None
    epoch: Values | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes, the traces in it, and what their places are: `step`, `lag`, …"""

    axes: Axes
    traces: Sequence[Trace]
    place: str = "step"


class Picture(Protocol):
    """What can be drawn: a name for files and ids, words, and how."""

    @property
    def name(self) -> str:
        """Letters, digits and hyphens."""

    @property
    def title(self) -> str:
        """What it shows."""

    @property
    def caption(self) -> str:
        """What has to be known to read it."""

    def draw(self, figure: Figure) -> list[Panel]:
        """Draw into an empty figure, whose width is given and whose height may be changed."""


@dataclass(frozen=True)
class Drawing:
    """An `<svg>` element for a page, and where its points lie in it, ready for JSON."""

    svg: str
    points: dict[str, Any]


def draw_inline(picture: Picture, identity: str, width: float = COLUMN) -> Drawing:
    """Draw for a page; `identity` (letters, digits, hyphens) keeps ids on one page apart."""
    with _style(identity):
        figure, panels = _figure(picture, width)
        svg = _save(figure, "svg").decode()
        height = figure.get_figheight() * 72
        points = {"panels": [_points(panel, height) for panel in panels]}
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'\bid="', f'id="{identity}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{identity}-", svg)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    label = picture.title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        lambda found: f'<svg {namespaces} {found[1]} role="img" aria-label="{label}">',
        svg,
        count=1,
    )
    return Drawing(re.sub(r"\s*\n\s*", "\n", svg), points)


def draw_file(picture: Picture, kind: Format, width: float = COLUMN) -> bytes:
    """Draw for print: equal pictures give equal bytes, PDF fonts are embedded as TrueType."""
    with _style(picture.name):
        return _save(_figure(picture, width)[0], kind)


def is_wide(figure: Figure) -> bool:
    """Whether a figure has room for two panels beside each other."""
    return figure.get_figwidth() > 1.5 * COLUMN


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


def _figure(picture: Picture, width: float) -> tuple[Figure, list[Panel]]:
    figure = Figure(figsize=(width, 2.1), layout="constrained")
    return figure, picture.draw(figure)


def _points(panel: Panel, height: float) -> dict[str, Any]:
    """Positions in the SVG's own units, in which y runs down from the top of the figure."""
    left, bottom, right, top = panel.axes.bbox.extents
    return {
        "box": [left, height - top, right, height - bottom],
        "place": panel.place,
        "lines": [_line(panel.axes, height, trace) for trace in panel.traces],
    }


def _line(axes: Axes, height: float, trace: Trace) -> dict[str, Any]:
    at = np.column_stack((trace.x, trace.y))
    positions = np.ma.filled(axes.transData.transform(at), np.nan)
    found = {
        "label": trace.label,
        "color": trace.color,
        "px": _json(positions[:, 0].round(1)),
        "py": _json((height - positions[:, 1]).round(1)),
        "x": _json(trace.place) if isinstance(trace.place, np.ndarray) else list(trace.place),
        "v": _json(trace.value),
    }
    others = {"epoch": trace.epoch, "low": trace.low, "high": trace.high}
    return found | {name: _json(values) for name, values in others.items() if values is not None}


def _json(values: Values) -> list[float | int | None]:
    """JSON has no NaN: null stands for it. Whole numbers lose their `.0`."""
    return [
        None if not np.isfinite(v) else int(v) if v == int(v) and abs(v) < 2**53 else v
        for v in values.tolist()
    ]
