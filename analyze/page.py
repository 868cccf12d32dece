"""The page: everything of a report in one HTML file, in which every text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

import capture
from analyze.drawing import Picture, draw_inline
from analyze.figures import END_EFFECT
from analyze.inputs import Measured
from analyze.quantities import SIGN
from analyze.sections import Section
from analyze.text_table import minus
from analyze.verdict import Verdict, summarise
from analyze.verdict_groups import GroupVerdict, summarise_groups
from analyze.verdict_text import (
    GROUP_NOTE,
    HEAD,
    NOTE,
    Cell,
    cells,
    group_cells,
    group_head,
    group_notes,
    heading,
    notes,
)


@dataclass(frozen=True)
class Summary:
    """One block of the verdict: `streams` maps a stream to its rows below `head`."""

    heading: list[str]
    head: Sequence[Cell] = ()
    streams: dict[str, list[Sequence[Cell]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def render(names: Sequence[str], measured: Measured | None, sections: Sequence[Section]) -> str:
    """Make the page; equal contents give an equal page.

    `names` stand in its title. The verdict is of `measured`, where there is anything.
    """
    loader = jinja2.PackageLoader("analyze")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    groups: dict[tuple[str, str] | None, list[GroupVerdict]] = {}
    for each in [] if measured is None else summarise_groups(measured.table):
        groups.setdefault((each.run, each.reference), []).append(each)
    shown = [
        {
            "id": section.slug,
            "heading": section.heading,
            "facts": section.facts,
            "warnings": section.warnings,
            "notes": section.notes,
            "rate": section.rate,
            "tables": section.tables,
            "groups": [_by_groups(each) for each in groups.get(section.subject, [])],
            "figures": [_inline(section, figure) for figure in section.figures],
        }
        for section in sections
    ]
    verdict = [] if measured is None else [summary(each) for each in summarise(measured.table)]
    return environment.get_template("report.html.j2").render(
        names=names,
        verdict=verdict,
        reading=minus(NOTE),
        about_groups=minus(GROUP_NOTE),
        sign=minus(SIGN),
        end_effect=END_EFFECT,
        sections=shown,
        version=capture.__version__ if measured is None else measured.version,
    )


def summary(found: Verdict) -> Summary:
    """Lay out the verdict of one run and reference."""
    streams: dict[str, list[Sequence[Cell]]] = {}
    for part in found.parts:
        stream, *row = cells(part)
        streams.setdefault(stream[0], []).append(row)
    said = [] if found.streams else ["no gradients or updates"]
    return Summary(
        heading=heading(found),
        head=[(minus(title), band) for title, band in HEAD[1:]] if found.streams else (),
        streams=streams,
        notes=[minus(note) for note in (*said, *notes(found))],
    )


def _by_groups(found: GroupVerdict) -> dict[str, Any]:
    above, below = group_head(found)
    titles = [minus(title) for title in above[2:-1] if title]
    return {
        "title": above[0],
        "above": titles,
        "below": below,
        "rows": list(group_cells(found)),
        "notes": [minus(note) for note in group_notes(found)],
    }


def _inline(section: Section, figure: Picture) -> dict[str, Any]:
    identity = f"{section.slug}-{figure.name}"
    drawing = draw_inline(figure, identity)
    return {
        "id": identity,
        "title": figure.title,
        "caption": figure.caption,
        "svg": drawing.svg,
        "points": drawing.points,
    }
