"""The report: one HTML page that needs nothing else, and each figure as a file on request."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analyze.cache import Where
from analyze.curves import distinct
from analyze.drawing import COLUMN, FORMATS, draw_file
from analyze.inputs import read_inputs
from analyze.other_sections import names_in, other_sections
from analyze.other_tables import sort_inputs
from analyze.page import render
from analyze.sections import Section, build_sections
from capture.store.errors import UsageError
from capture.store.files import writing
from capture.store.target import check_target

if TYPE_CHECKING:
    from analyze.schedulers import Cluster

# In inches. What is narrower has no room for its axes, what is wider for nothing a page holds.
NARROWEST, WIDEST = 1.5, 20.0


def write_report(
    inputs: Sequence[str],
    out: str | os.PathLike[str],
    *,
    figures_dir: str | os.PathLike[str] | None = None,
    formats: Sequence[str] = (),
    width: float = COLUMN,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    cache: Where = True,
) -> list[Path]:
    """Write the report of runs and Parquet tables to `out`; return the files written, it first.

    Tables are those of `compute`, `pairs` (its noise too), `pca`, `coverage` and `compare`, mixed
    as one likes.

    Each figure also goes to `figures_dir`, made if missing, in each of `formats` (png, svg, pdf),
    `width` inches wide. A run is measured against final; scheduler, workers and cache are those of
    `analyze.measure_run`. `InputError` for an input
    that is neither, `UsageError` for a wrong option or a place inside a run or over an input;
    then nothing is written.
    """
    page = check_target(out, inputs)
    if figures_dir is not None:
        _check_folder(figures_dir)
    _check_look(formats, width, figures_dir is not None)
    runs_and_tables, others = sort_inputs(inputs)
    # With neither, what is missing is said there.
    measured = None
    if runs_and_tables or not others:
        measured = read_inputs(runs_and_tables, scheduler=scheduler, workers=workers, cache=cache)
    used: set[str] = set()
    names = [] if measured is None else measured.table.column("run").unique().to_pylist()
    sections = [] if measured is None else build_sections(measured, used)
    sections += other_sections(others, used)
    names = distinct([*names, *names_in(others)])
    files = {page: render(names, measured, sections).encode()}
    if figures_dir is not None:
        figures = _draw(sections, Path(figures_dir), formats, width)
        _check_files(figures, page, inputs)
        files |= figures
    _write_all(files)
    return list(files)


def _draw(
    sections: Sequence[Section], folder: Path, formats: Sequence[str], width: float
) -> dict[Path, bytes]:
    return {
        folder / f"{section.slug}-{figure.name}.{kind}": draw_file(figure, kind, width)
        for section in sections
        for figure in section.figures
        for kind in FORMATS
        if kind in formats
    }


def _check_look(formats: Sequence[str], width: float, has_folder: bool) -> None:
    unknown = [kind for kind in formats if kind not in FORMATS]
    if unknown or (has_folder and not formats):
        what = f"unknown figure format {unknown[0]!r}" if unknown else "no figure format"
        raise UsageError(what, fix=f"choose from {', '.join(FORMATS)}")
    if formats and not has_folder:
        raise UsageError("figures need a folder to go to", fix="name one")
    if not NARROWEST <= width <= WIDEST:  # nor NaN
        fix = f"choose between {NARROWEST:g} and {WIDEST:g} inches"
        raise UsageError(f"figures cannot be {width:g} inches wide", fix=fix)


def _check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder for figures that is inside a run or can neither be used nor made."""
    if not os.fspath(folder):
        raise UsageError("the folder for figures has no name", fix="name one")
    place = Path(folder)
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    check_target(place / f".{os.getpid()}.tmp")


def _check_files(figures: dict[Path, bytes], page: Path, inputs: Sequence[str]) -> None:
    for path in figures:
        if os.path.isdir(path.parent):
            check_target(path, inputs)
        if os.path.realpath(path) == os.path.realpath(page):
            raise UsageError("the page and a figure have one name", where=path, fix="change one")


def _write_all(files: dict[Path, bytes]) -> None:
    """Write every file beside its place first: all of them appear, or none does."""
    staged: dict[Path, Path] = {}
    try:
        for path, data in files.items():
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                staged[path] = path.with_name(f".{len(staged)}.{os.getpid()}.tmp")
                staged[path].write_bytes(data)
        for path, temporary in staged.items():
            with writing(path):
                os.replace(temporary, path)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
