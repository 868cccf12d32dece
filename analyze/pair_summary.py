"""What `analyze pairs` prints: per stream and lag, medians over pairs of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analyze.pair_table import SIGN, PairTables
from analyze.rows import select_rows, sizes_of, whole_model
from analyze.tables import read_metadata
from analyze.text_table import NONE, aligned, band, median, wrapped
from capture.store.layout import ITERATES, UPDATES

# Lags that are told one by one; where there are more, from each power of two to the next.
_MOST_LAGS = 8

# What is shown with quantiles, and what by its median alone.
_BANDS = ("gamma", "gamma_back", "sim", "cosine_step", "cosine_dist", "angle_weights_deg")
_OF_GRADIENTS = {
    "γ(t, t+lag)": "gamma",
    "γ⁰": "gamma_null",
    "γ(t, t-lag)": "gamma_back",
    "sim": "sim",
}
_OF_UPDATES = {"cos(u, u')": "cosine_step"}
_OF_POINTS = {
    "cos(e, e')": "cosine_dist",
    "cos(w, w')": "cosine_weights",
    "in degrees": "angle_weights_deg",
}


def pair_summary(tables: PairTables) -> str:
    """Summarise the tables of `analyze.pairs_of_run.measure_pairs`; several lines of plain text.

    Only rows of the whole model are read.
    """
    entries = {entry["run"]: entry for entry in read_metadata(tables.pairs)["runs"]}
    sizes = sizes_of(entries.values())
    pairs, noise = (whole_model(table, sizes) for table in (tables.pairs, tables.noise))
    blocks = [
        _block(select_rows(pairs, run=run, reference=reference), entries[run], reference)
        for run in pairs["run"].unique().to_pylist()
        for reference in pairs["reference"].unique().to_pylist()
    ]
    nulls = dict.fromkeys(read_metadata(tables.pairs)["null"].values())
    closing = [*_noise(noise)]
    if set(pairs["stream"].unique().to_pylist()) - {*ITERATES, UPDATES}:
        rests = "".join(f" γ⁰: {text}." for text in nulls)
        closing += wrapped(
            f"{SIGN}{rests} sim: cosine of two gradients without their parts along w - w*. Numbers "
            "are medians of n pairs, [10 %, 90 %] their quantiles: no confidence interval."
        )
    return "\n\n".join([*blocks, *(["\n".join(closing)] if closing else [])])


def _block(rows: pa.Table, entry: dict[str, Any], reference: str) -> str:
    total = rows["num_parameters"][0].as_py()
    lines = [f"{entry['run']}   w* = {reference}   D = {total:,}"]
    for stream, count in entry["pairs"].items():
        if count:
            lines += ["", *_stream(select_rows(rows, stream=stream), stream)]
    missing = [stream for stream, count in entry["pairs"].items() if not count]
    if missing:
        lines += ["", f"{', '.join(missing)}: no two rows are a chosen lag apart"]
    return "\n".join(lines)


def _stream(rows: pa.Table, stream: str) -> list[str]:
    shown = _OF_POINTS if stream in ITERATES else _OF_GRADIENTS
    shown = _OF_UPDATES if stream == UPDATES else shown
    lags = rows["lag"].to_numpy()
    cells = [(stream, "lag", "n", "dist", *shown)]
    for label, here in _by_lag(lags):
        told = [
            (band if name in _BANDS else median)(rows[name].to_numpy()[here])
            for name in ("dist", *shown.values())
        ]
        cells.append(("", label, str(here.sum()), *told))
    return aligned(cells)


def _by_lag(lags: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    distinct = np.unique(lags)
    if len(distinct) <= _MOST_LAGS:
        yield from ((str(lag), lags == lag) for lag in distinct)
        return
    octaves = np.floor(np.log2(lags / distinct[0]) + 1e-9).astype(int)
    for octave in np.unique(octaves):
        here = octaves == octave
        low, high = lags[here].min(), lags[here].max()
        yield (str(low) if low == high else f"{low}–{high}"), here


def _noise(table: pa.Table) -> Iterator[str]:
    for run in table["run"].unique().to_pylist():
        of_run = select_rows(table, run=run)
        for stream in of_run["stream"].unique().to_pylist():
            rows = select_rows(of_run, stream=stream)
            corrected = rows["noise_corrected"].to_numpy()
            plain = rows["square_of_mean"].to_numpy()
            scale = rows["noise_scale"].to_numpy()
            known = corrected[np.isfinite(corrected)]
            if not len(known):
                continue
            below = f"{100 * (known < 0).mean():.3g} %"
            scale_text = NONE if median(scale) == NONE else f"{median(scale)} batches"
            yield from wrapped(
                f"{run}, {stream}: ‖∇f‖² without noise {median(corrected)} (below 0 in {below} of "
                f"{len(known)} steps), ‖mean g‖² {median(plain)}, gradient noise scale {scale_text}"
            )
