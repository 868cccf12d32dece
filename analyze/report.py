"""The report: one HTML page that needs nothing else, and each figure as a file on request."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from markupsafe import Markup

from analyze.charts import COLUMN, FORMATS, Chart, draw_file, draw_inline
from analyze.curves import Columns, Curve, distinct, read_columns, read_curves, run_labels, select
from analyze.facts import conditional_rate, no_null_reason, null_sentence, run_facts
from analyze.figures import END_EFFECT, SIGN, build_figures, end_of
from analyze.heatmap import HeatMap, build_heat_map
from analyze.inputs import Measured, read_inputs
from analyze.verdict import verdict
from capture.store.errors import UsageError
from capture.store.files import writing


@dataclass(frozen=True)
class Section:
    """A part of the report: a run against a reference, or several runs beside each other."""

    slug: str
    heading: str
    figures: list[Chart | HeatMap]
    facts: list[tuple[str, str]]
    warnings: list[str]
    notes: list[str]
    rate: str | None = None


def write_report(
    inputs: Sequence[str],
    out: Path,
    *,
    figures_dir: Path | None = None,
    formats: Sequence[str] = (),
    width: float = COLUMN,
) -> list[Path]:
    """Write the report of runs and Parquet tables to `out`; return the files written, it first.

    Each figure also goes to `figures_dir` in each of `formats` (png, svg, pdf), `width` inches
    wide. A run is measured with the default settings. `InputError` for an input that is neither,
    `UsageError` for an unknown format; then nothing is written.
    """
    _check_formats(formats, figures_dir)
    measured = read_inputs(inputs)
    sections = build_sections(measured)
    files = {out: render(measured, sections).encode()}
    for section in sections if figures_dir is not None else ():
        for figure in section.figures:
            for kind in FORMATS:
                if kind in formats and figures_dir is not None:
                    path = figures_dir / f"{section.slug}-{figure.name}.{kind}"
                    files[path] = draw_file(figure, kind, width)
    _write_all(files)
    return list(files)


def build_sections(measured: Measured) -> list[Section]:
    """Arrange what was measured: runs beside each other first, then each with each reference."""
    columns = read_columns(measured.table, _sizes(measured))
    runs, references = (distinct(columns[name]) for name in ("run", "reference"))
    labels = run_labels(runs)
    pairs = [(reference, run) for reference in references for run in runs]
    used: set[str] = set()
    alone = [
        _section(measured, rows, run, reference, labels[run], used)
        for reference, run in pairs
        if (rows := select(columns, run=run, reference=reference))["step"].size
    ]
    together = [_comparison(measured, columns, ref, labels, used) for ref in references]
    return [*(section for section in together if section is not None), *alone]


def render(measured: Measured, sections: Sequence[Section]) -> str:
    """Make the page, in which every text is escaped; equal contents give an equal page."""
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
        sign=SIGN,
        end_effect=END_EFFECT,
        sections=shown,
        version=measured.version,
    )


def _verdict(measured: Measured) -> str | None:
    whole = read_columns(measured.table, _sizes(measured))["whole"]
    return verdict(measured.table.filter(pa.array(whole))) if whole.any() else None


def _inline(section: Section, figure: Chart | HeatMap) -> dict[str, Any]:
    identity = f"{section.slug}-{figure.name}"
    drawing = draw_inline(figure, identity)
    return {
        "id": identity,
        "title": figure.title,
        "caption": figure.caption,
        "svg": Markup(drawing.svg),
        "points": drawing.points,
    }


def _section(
    measured: Measured, rows: Columns, run: str, reference: str, label: str, used: set[str]
) -> Section:
    entry = measured.runs.get(run, {})
    reason = no_null_reason(measured.nulls.get(f"{run}|{reference}"))
    end = end_of(_last_step(entry, rows), reference)
    ends = {} if end is None else {run: end}
    curves = read_curves(rows, run, reference, label)
    figures: list[Chart | HeatMap] = [*build_figures(curves, ends, reason), *_maps(rows, end)]
    return Section(
        slug=_slug(f"{label}-{reference}", used),
        heading=f"{label}, measured against {reference}",
        figures=figures,
        facts=[("Run", run), *run_facts(entry, reference)],
        warnings=_warnings(entry, rows),
        notes=_notes(curves, measured.nulls.get(f"{run}|{reference}")),
        rate=conditional_rate(curves, end),
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
        slug=_slug(f"together-{reference}", used),
        heading=f"{len({c.run for c in curves})} runs together, each measured against {reference}",
        figures=list(build_figures(curves, ends)),
        facts=[],
        warnings=[],
        notes=notes,
    )


def _sizes(measured: Measured) -> dict[str, int]:
    return {run: entry["num_parameters"] for run, entry in measured.runs.items()}


def _maps(rows: Columns, end: tuple[float, float] | None) -> list[HeatMap]:
    parts = select(rows, whole=False)
    maps = (build_heat_map(parts, stream, end) for stream in distinct(parts["stream"]))
    return [made for made in maps if made is not None]


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


def _slug(text: str, used: set[str]) -> str:
    """Letters, digits and hyphens only, safe as an id and as a file's name; each but once."""
    slug = base = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "run"
    number = 2
    while slug.lower() in used:
        slug, number = f"{base}-{number}", number + 1
    used.add(slug.lower())
    return slug


def _check_formats(formats: Sequence[str], figures_dir: Path | None) -> None:
    for kind in formats:
        if kind not in FORMATS:
            raise UsageError(
                "unknown figure format", where=kind, fix=f"choose from {', '.join(FORMATS)}"
            )
    if formats and figures_dir is None:
        raise UsageError("figures need a folder to go to", fix="name one")


def _write_all(files: dict[Path, bytes]) -> None:
    """Write every file beside its place first: all of them appear, or none does."""
    staged: dict[Path, Path] = {}
    try:
        for path, data in files.items():
            with writing(path):
                _make_folder(path.parent)
                staged[path] = path.with_name(f".{path.name}.{os.getpid()}.tmp")
                staged[path].write_bytes(data)
        for path, temporary in staged.items():
            with writing(path):
                os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        # The system's word for a file in the folder's place, which misleads here.
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder)) from error
