"""The parts of a report that are made of tables of `pairs`, `pca`, `coverage` and `compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analyze.comparison import read_comparison
from analyze.comparison_figures import comparison_pictures, comparison_tables
from analyze.coverage_table import COVERAGE_HEAD, COVERAGE_MEANING, coverage_cells
from analyze.curves import distinct, run_labels
from analyze.drawing import Picture
from analyze.other_tables import Other
from analyze.pair_figures import MOST_GROUPS, noise_pictures, pair_pictures
from analyze.path_figures import path_pictures
from analyze.quantities import SIGN
from analyze.rows import select_rows, sizes_of, whole_model
from analyze.sections import PageTable, Section, slug_of
from analyze.text_table import minus, number
from analyze.verdict_groups import grouping_of
from capture.store.layout import ITERATES

_SHOWN_COMPONENTS = 5


def other_sections(others: Sequence[Other], used: set[str]) -> list[Section]:
    """Make the sections of tables of any kind but `compute`; `used` are the slugs taken."""
    return [section for other in others for section in _MAKERS[other.kind](other, used)]


def names_in(others: Sequence[Other]) -> list[str]:
    """The runs that tables are of, as their commands were told them."""
    return distinct(run for other in others for run in _runs(other))


def _runs(other: Other) -> list[str]:
    if other.kind == "compare":
        return [run for group in read_comparison(other.table).groups for run in group.runs]
    return list(other.table["run"].unique().to_pylist())


def _comparison(other: Other, used: set[str]) -> Iterator[Section]:
    comparison = read_comparison(other.table)
    runs = distinct(run for group in comparison.groups for run in group.runs)
    keys = ", ".join(comparison.keys)
    notes = dict.fromkeys(note for block in comparison.blocks for note in block.notes)
    yield Section(
        slug=slug_of(f"compared-by-{keys}", used),
        heading=f"{len(runs)} runs compared by {keys}",
        figures=list(comparison_pictures(comparison)),
        facts=[(group.label, ", ".join(group.runs)) for group in comparison.groups],
        warnings=[_capital(text) for text in comparison.warnings],
        notes=[
            *(f"{minus(note)}." for note in notes),
            f"{minus(SIGN)} Brackets: {100 * comparison.level:g} % intervals over "
            "runs; parentheses: within the one run that there is.",
        ],
        tables=list(comparison_tables(comparison)),
    )


def _pairs(other: Other, used: set[str]) -> Iterator[Section]:
    labels = run_labels(_runs(other))
    for run, label in labels.items():
        of_run = _whole_or_groups(select_rows(other.table, run=run), other.facts)
        for reference in of_run["reference"].unique().to_pylist():
            rows = select_rows(of_run, reference=reference)
            streams = rows["stream"].unique().to_pylist()
            figures = [
                picture
                for stream in streams
                for picture in pair_pictures(select_rows(rows, stream=stream), stream)
            ]
            nulls = [
                text
                for key, text in (other.facts.get("null") or {}).items()
                if key.startswith(f"{run}|")
            ]
            others = [name for name in streams if name not in ("minibatch", *ITERATES, "updates")]
            notes = [f"γ⁰ of minibatch: {text}." for text in nulls]
            if others:
                said = "no γ⁰, only the minibatch gradients made the path."
                notes.append(f"{', '.join(others)}: {said}")
            yield Section(
                slug=slug_of(f"{label}-pairs-{reference}", used),
                heading=f"{label}: saved steps beside each other (w* = {reference})",
                figures=figures,
                facts=[("Run", run), *_facts(rows)],
                warnings=[],
                notes=notes,
            )


def _noise(other: Other, used: set[str]) -> Iterator[Section]:
    for run, label in run_labels(_runs(other)).items():
        rows = _whole_or_groups(select_rows(other.table, run=run), other.facts)
        yield Section(
            slug=slug_of(f"{label}-noise", used),
            heading=f"{label}: noise of the gradients",
            figures=[
                picture
                for stream in rows["stream"].unique().to_pylist()
                for picture in noise_pictures(select_rows(rows, stream=stream), stream)
            ],
            facts=[("Run", run), ("Batches of a step", _listed(rows["batches"]))],
            warnings=[],
            notes=[],
        )


def _path(other: Other, used: set[str]) -> Iterator[Section]:
    for run, label in run_labels(_runs(other)).items():
        table = select_rows(other.table, run=run)
        columns = (table[name].to_pylist() for name in ("group", "num_parameters"))
        sizes = dict(zip(*columns, strict=True))
        largest = sorted(sizes, key=lambda name: -sizes[name])[:MOST_GROUPS]
        shown = [name for name in sizes if name in largest]
        taken: set[str] = set()
        grouping = grouping_of(str(other.facts.get("by", "")))
        by = "" if shown == ["model"] else f", by {grouping}"
        figures: list[Picture] = []
        for group in shown:
            whole = group == "model" and len(sizes) == 1
            slug = "" if whole else f"-{slug_of(group, taken)}"
            words = "" if whole else f", {grouping} {group}"
            figures += path_pictures(select_rows(table, group=group), words, slug)
        more = len(sizes) - len(shown)
        yield Section(
            slug=slug_of(f"{label}-path", used),
            heading=f"{label}: principal components of the path{by}",
            figures=figures,
            facts=[("Run", run), *_path_facts(table)],
            warnings=[],
            notes=[f"The {len(shown)} largest groups; {more} more are in the table."] * (more > 0),
            tables=[_explained(table)],
        )


def _coverage(other: Other, used: set[str]) -> Iterator[Section]:
    for run, label in run_labels(_runs(other)).items():
        cells = coverage_cells(select_rows(other.table, run=run))
        yield Section(
            slug=slug_of(f"{label}-coverage", used),
            heading=f"{label}: coordinates without a gradient in any saved row",
            figures=[],
            facts=[("Run", run)],
            warnings=[],
            notes=[_capital(COVERAGE_MEANING)],
            tables=[PageTable("Counts", COVERAGE_HEAD, cells)],
        )


def _explained(table: pa.Table) -> PageTable:
    """How much each component explains, beside its nulls."""
    rows = []
    for group in table["group"].unique().to_pylist():
        own = select_rows(table, group=group)
        first = own.filter(pc.equal(own["step"], own["step"][0])).slice(0, _SHOWN_COMPONENTS)
        for place, row in enumerate(first.to_pylist()):
            shares = (row[name] for name in ("explained", "null_walk", "null_steps"))
            told = (number(100 * share) for share in shares)
            name = group if place == 0 else ""
            rows.append([name, str(row["component"]), *(f"{text} %" for text in told)])
    head = ["group", "component", "explained", "random walk", "orthogonal steps"]
    return PageTable("Explained variance", head, rows)


def _path_facts(table: pa.Table) -> Iterator[tuple[str, str]]:
    steps = np.unique(table["step"].to_numpy())
    yield "Rows of weights", f"{len(steps)}, t = {steps[0]:,} to {steps[-1]:,}"
    whole = select_rows(table, group=table["group"][0].as_py())
    walked, displaced = (whole[name].to_numpy() for name in ("walked", "displaced"))
    if walked[-1] > 0:
        yield "‖w_last − w_first‖", number(displaced[-1])
        yield "Way over the saved rows", number(walked[-1])
        yield "Straightness", number(displaced[-1] / walked[-1])


def _facts(rows: pa.Table) -> Iterator[tuple[str, str]]:
    steps = np.unique(np.concatenate([rows[name].to_numpy() for name in ("step", "step_to")]))
    yield "Saved steps", f"{len(steps)}, t = {steps[0]:,} to {steps[-1]:,}"
    lags = np.unique(rows["lag"].to_numpy())
    yield "Lags", f"{len(lags)}, {lags[0]:,} to {lags[-1]:,} updates"
    yield "Parameters", _listed(rows["num_parameters"])


def _listed(column: pa.ChunkedArray) -> str:
    return ", ".join(f"{value:,}" for value in column.unique().to_pylist()[:MOST_GROUPS])


def _whole_or_groups(table: pa.Table, facts: Mapping[str, Any]) -> pa.Table:
    """The rows of the whole model where there are any, else those of the groups."""
    whole = whole_model(table, sizes_of(facts["runs"]))
    return whole if whole.num_rows else table


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


_MAKERS: Mapping[str, Callable[[Other, set[str]], Iterator[Section]]] = {
    "compare": _comparison,
    "pairs": _pairs,
    "noise": _noise,
    "pca": _path,
    "coverage": _coverage,
}
