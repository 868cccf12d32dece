"""The page: everything of a report in one HTML file, in which every text is escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import pyarrow as pa

from analyze.charts import Chart, draw_inline
from analyze.curves import distinct
from analyze.figures import END_EFFECT
from analyze.heatmap import HeatMap
from analyze.inputs import Measured
from analyze.quantities import SIGN
from analyze.sections import Section, whole_columns
from analyze.verdict import verdict

# A number, and the quantiles that may follow it.
Cell = tuple[str, str]


@dataclass(frozen=True)
class Summary:
    """One block of the verdict: `streams` maps a stream to its rows below `head`."""

    heading: list[str]
    head: list[Cell] = field(default_factory=list)
    streams: dict[str, list[list[Cell]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def render(measured: Measured, sections: Sequence[Section]) -> str:
    """Make the page; equal contents give an equal page."""
    loader = jinja2.PackageLoader("analyze")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    shown = [
        {
            "id": section.slug,
            "heading": section.heading,
            "facts": section.facts,
            "warnings": section.warnings,
            "notes": section.notes,
            "rate": section.rate,
            "figures": [_inline(section, figure) for figure in section.figures],
        }
        for section in sections
    ]
    return environment.get_template("report.html.j2").render(
        names=distinct(measured.table.column("run").to_pylist()),
        verdict=_verdict(measured),
        # The terminal's hyphen is a minus sign.
        sign=SIGN.replace("-", "\u2212"),
        end_effect=END_EFFECT,
        sections=shown,
        version=measured.version,
    )


def read_verdict(text: str) -> list[Summary]:
    """Read the verdict's text back: on a page its lines are too wide, its tables need not be.

    The text stays the one place where the numbers are made. Two spaces or more part its cells.
    """
    return [_summary(block.split("\n")) for block in text.split("\n\n")]


def _summary(lines: list[str]) -> Summary:
    heading, *rest = lines
    summary = Summary(re.split(" {3,}", heading))
    width = 0
    for line in rest:
        cells = [_cell(text) for text in re.split(" {2,}", line)]
        if width and len(cells) == width:
            summary.streams.setdefault(cells[0][0], []).append(cells[1:])
        elif not width and line.startswith("stream "):
            width = len(cells)
            summary.head.extend(cells[1:])
        elif line.startswith("  ") and summary.notes:
            summary.notes[-1] += f" {line.strip()}"
        else:
            summary.notes.append(line)
    return summary


def _cell(text: str) -> Cell:
    value, bracket, band = text.partition(" [")
    return value, bracket.strip() + band


def _verdict(measured: Measured) -> list[Summary]:
    whole = whole_columns(measured)["whole"]
    return read_verdict(verdict(measured.table.filter(pa.array(whole)))) if whole.any() else []


def _inline(section: Section, figure: Chart | HeatMap) -> dict[str, Any]:
    identity = f"{section.slug}-{figure.name}"
    drawing = draw_inline(figure, identity)
    return {
        "id": identity,
        "title": figure.title,
        "caption": figure.caption,
        "svg": drawing.svg,
        "points": drawing.points,
    }
