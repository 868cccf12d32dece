"""The parts of a report: which runs and references stand together, and what is said of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analyze.curves import Columns, Curve, distinct, read_columns, read_curves, run_labels, select
from analyze.drawing import Picture
from analyze.facts import conditional_rate, no_null_reason, null_sentence, run_facts
from analyze.figures import build_figures, end_of
from analyze.heatmap import HeatMap, build_heat_maps
from analyze.inputs import Measured

# A file's name may have 255 bytes, and a figure's own name follows.
_LONGEST_SLUG = 100


@dataclass(frozen=True)
class PageTable:
    """A table of a section: `head` and `rows` of cells; the first `left` columns are names."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclass(frozen=True)
class Section:
    """A part of the report: a run against a reference, or several runs beside each other.

    `subject` is the run and the reference where it is of one of each.
    """

    slug: str
    heading: str
    figures: Sequence[Picture]
    facts: list[tuple[str, str]]
    warnings: list[str]
    notes: list[str]
    rate: str | None = None
    tables: Sequence[PageTable] = ()
    subject: tuple[str, str] | None = None


def build_sections(measured: Measured, used: set[str]) -> list[Section]:
    """Arrange what was measured: runs beside each other first, then each with each reference.

    `used` are the slugs that are taken; those of the sections are added.
    """
    columns = whole_columns(measured)
    runs, references = (distinct(columns[name]) for name in ("run", "reference"))
    labels = run_labels(runs)
    pairs = [(reference, run) for reference in references for run in runs]
    alone = [
        _section(measured, rows, run, reference, labels[run], used)
        for reference, run in pairs
        if (rows := select(columns, run=run, reference=reference))["step"].size
    ]
    together = [_comparison(measured, columns, ref, labels, used) for ref in references]
    return [*(section for section in together if section is not None), *alone]


def whole_columns(measured: Measured) -> Columns:
    """Read the columns of everything measured; `whole` says which rows are of a whole model."""
    sizes = {run: entry["num_parameters"] for run, entry in measured.runs.items()}
    return read_columns(measured.table, sizes)


def _section(
    measured: Measured, rows: Columns, run: str, reference: str, label: str, used: set[str]
) -> Section:
    entry = measured.runs.get(run, {})
    reason = no_null_reason(measured.nulls.get(f"{run}|{reference}"))
    end = end_of(_last_step(entry, rows), reference)
    ends = {} if end is None else {run: end}
    curves = read_curves(rows, run, reference, label)
    maps = _maps(rows, end, measured.grouping)
    figures: list[Picture] = [*build_figures(curves, ends, reason), *maps]
    return Section(
        slug=slug_of(f"{label}-{reference}", used),
        heading=f"{label}, measured against {reference}",
        figures=figures,
        facts=[("Run", run), *run_facts(entry, reference, rows["lr"])],
        warnings=_warnings(entry, rows),
        notes=_notes(curves, measured.nulls.get(f"{run}|{reference}")),
        rate=conditional_rate(curves, end),
        subject=(run, reference),
    )


def _comparison(
    measured: Measured, columns: Columns, reference: str, labels: dict[str, str], used: set[str]
) -> Section | None:
    """All runs in the same figures, where there are several."""
    rows = select(columns, reference=reference, whole=True)
    curves: list[Curve] = []
    ends = {}
    for run in distinct(rows["run"]):
        own = select(rows, run=run)
        curves += read_curves(own, run, reference, labels[run])
        end = end_of(_last_step(measured.runs.get(run, {}), own), reference)
        if end is not None:
            ends[run] = end
    if len({curve.run for curve in curves}) < 2:
        return None
    notes = [
        f"No null for {labels[run]}: {no_null_reason(measured.nulls.get(f'{run}|{reference}'))}."
        for run in distinct(rows["run"])
        if not np.isfinite(rows["cosine_null"][rows["run"] == run]).any()
    ]
    if len(set(ends.values())) > 1:
        notes.append("Runs of different lengths show their end effect at different steps.")
    return Section(
        slug=slug_of(f"together-{reference}", used),
        heading=f"{len({c.run for c in curves})} runs together, each measured against {reference}",
        figures=list(build_figures(curves, ends)),
        facts=[],
        warnings=[],
        notes=notes,
    )


def _maps(rows: Columns, end: tuple[float, float] | None, grouping: str) -> list[HeatMap]:
    parts = select(rows, whole=False)
    return [
        made
        for stream in distinct(parts["stream"])
        for made in build_heat_maps(parts, stream, end, grouping)
    ]


def _last_step(entry: Any, rows: Columns) -> float:
    """T, or for a run that has not finished the last update that is known of."""
    final = entry.get("final_step")
    return float(final) if final is not None else float(rows["step"].max()) + 1


def _warnings(entry: Any, rows: Columns) -> list[str]:
    warnings = []
    if entry.get("status", "complete") != "complete":
        warnings.append("This run has not finished: its last recorded step is not its end.")
    bad = rows["nonfinite"] > 0
    if bad.any():
        steps = distinct(rows["step"][bad])
        warnings.append(
            f"NaN or infinite coordinates in the weights, gradients or w* at {len(steps)} of "
            f"{np.unique(rows['step']).size} steps, first at step {int(min(steps))}."
        )
    return warnings


def _notes(curves: Sequence[Curve], null: str | None) -> list[str]:
    notes = [] if null is None else [null_sentence(null)]
    if not curves:
        notes.append(
            "This table holds no rows of the whole model. Give the run itself, or a table made "
            "with --by model, beside it to see the figures of the whole."
        )
    return notes


def slug_of(text: str, used: set[str]) -> str:
    """Letters, digits and hyphens only, safe as an id and as a file's name; each but once."""
    base = re.sub(r"[^A-Za-z0-9]+", "-", text)[:_LONGEST_SLUG].strip("-") or "run"
    slug = base
    number = 2
    while slug.lower() in used:
        slug, number = f"{base}-{number}", number + 1
    used.add(slug.lower())
    return slug
