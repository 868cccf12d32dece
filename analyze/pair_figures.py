"""The figures of the tables of `analyze pairs`: cosines between steps, what grows with the lag,
and the noise of gradients.

Axes: N rows, T saved steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from analyze.axes import Values
from analyze.charts import Chart, Dash, Line
from analyze.curves import shorten
from analyze.drawing import Picture
from analyze.figures import NULL_COLOR, PALETTE
from analyze.matrix import MAX_STEPS, StepMatrix
from analyze.rows import select_rows
from analyze.spread import Band, band_of
from capture.store.layout import ITERATES, UPDATES, WEIGHTS

# Places of a line over lags; where there are more lags, those next to each other share one.
_MOST_LAGS = 24
MOST_GROUPS = 6


@dataclass(frozen=True)
class _Kind:
    """A figure over lags: columns with their symbols and strokes, a slope to compare with."""

    name: str
    title: str
    ylabel: str
    caption: str
    columns: tuple[tuple[str, str, Dash], ...]
    slope: float | None = None
    baseline: float | None = None


_BY_LAG = (
    _Kind(
        "gamma",
        "Cosine γ(t, s) between a gradient and the way to a later step",
        "γ(t, s)",
        "γ(t, s) = cos(g_t, w_t − w_s), the step s being s − t updates later; dashed, where "
        "there is a null, what orthogonal gradients of the same sizes would give. Dotted, the "
        "slope −½ of a walk of orthogonal steps of one length.",
        (("gamma", "γ(t, s)", "-"), ("gamma_null", "γ⁰", "--")),
        slope=-0.5,
    ),
    _Kind(
        "gamma-back",
        "Cosine between a gradient and the way back to an earlier step",
        "γ(s, t)",
        "γ(s, t) = cos(g_s, w_s − w_t), the step s being s − t updates later; 0 for orthogonal "
        "gradients.",
        (("gamma_back", "γ(s, t)", "-"),),
        baseline=0.0,
    ),
    _Kind(
        "similarity",
        "Similarity of gradients",
        "cosine",
        "Cosine between the gradients of two steps; sim: between their parts at right angles to "
        "w − w*, the paper's sim_k.",
        (("cosine_grad", "cos(g_t, g_s)", "-"), ("sim", "sim", "-.")),
    ),
    _Kind(
        "steps",
        "Similarity of updates",
        "cosine",
        "Cosine between the updates of two steps.",
        (("cosine_step", "cos(u_t, u_s)", "-"),),
    ),
    _Kind(
        "distance",
        "Distance between steps",
        "‖w_t − w_s‖",
        "The paper's dist_k. A walk of orthogonal steps of one length has the slope ½, a straight "
        "line 1.",
        (("dist", "‖w_t − w_s‖", "-"),),
        slope=0.5,
    ),
    _Kind(
        "angle",
        "Angle between weights",
        "degrees",
        "The angle between the vectors w_t and w_s.",
        (("angle_weights_deg", "angle", "-"),),
    ),
    _Kind(
        "smoothness",
        "Local smoothness",
        "‖g_t − g_s‖ / ‖w_t − w_s‖",
        "Gradients at both steps are of the same batch, with the same augmentation and dropout.",
        (("smoothness", "smoothness", "-"),),
    ),
)
_MATRICES = {
    "gradient": ("cosine_grad", "cos(g_t, g_s)", "gradients"),
    UPDATES: ("cosine_step", "cos(u_t, u_s)", "updates"),
    WEIGHTS: ("cosine_dist", "cos(e_t, e_s)", "ways to w*"),
}


def pair_pictures(rows: pa.Table, stream: str) -> Iterator[Picture]:
    """Make the figures of one stream of a run against one reference.

    `rows` are of the whole model, or of several groups, of which the largest are drawn.
    """
    groups = _largest(rows)
    whole = len(groups) == 1
    if whole:
        matrix = _matrix(rows, stream)
        if matrix is not None:
            yield matrix
    for kind in _BY_LAG:
        lines = [
            line
            for index, group in enumerate(groups)
            for line in _lag_lines(
                select_rows(rows, group=group), kind, "" if whole else group, index
            )
        ]
        if lines:
            yield _lag_chart(kind, stream, lines, rows)


def noise_pictures(rows: pa.Table, stream: str) -> Iterator[Picture]:
    """Make the figures of a table of noise, of one stream of a run."""
    scales, norms = [], []
    groups = _largest(rows)
    for index, group in enumerate(groups):
        own, name = select_rows(rows, group=group), "" if len(groups) == 1 else shorten(group, 20)
        steps = own["step"].to_numpy().astype(np.float64)
        columns = {key: own[key].to_numpy() for key in own.column_names[6:]}
        color = PALETTE[index % len(PALETTE)]
        scales.append(
            Line(f"noise scale {name}".strip(), steps, columns["noise_scale"], None, color)
        )
        told: tuple[tuple[str, str, Dash], ...] = (
            ("noise_corrected", "‖∇f‖² without noise", "-"),
            ("square_of_mean", "‖mean g‖²", "--"),
            ("mean_of_squares", "mean ‖g‖²", ":"),
        )
        norms += [
            Line(f"{label} {name}".strip(), steps, columns[key], None, color, dash)
            for key, label, dash in told
        ]
    if any(np.isfinite(line.y).any() for line in scales):
        yield Chart(
            f"noise-scale-{stream}",
            f"Gradient noise scale, {stream}",
            "Batches of this size whose mean has as much noise as gradient; undefined where the "
            "corrected norm is not positive.",
            "batches",
            tuple(scales),
            named=len(groups) > 1,
        )
    if any(np.isfinite(line.y).any() for line in norms):
        yield Chart(
            f"noise-norm-{stream}",
            f"Squared gradient norm with and without noise, {stream}",
            "Without noise: products of different batches, unbiased for ‖∇f‖² over their draw, may "
            "be negative. The norm of the mean of B batches is too large by 1/B of their variance.",
            "‖g‖²",
            tuple(norms),
        )


def _matrix(rows: pa.Table, stream: str) -> StepMatrix | None:
    """The cosines between all steps, where most pairs are there."""
    kind = WEIGHTS if stream in ITERATES else UPDATES if stream == UPDATES else "gradient"
    column, symbol, what = _MATRICES[kind]
    first, second, values = (rows[name].to_numpy() for name in ("step", "step_to", column))
    steps = np.unique(np.concatenate([first, second]))
    kept = steps[:: -(-steps.size // MAX_STEPS)]
    found = np.full((kept.size, kept.size), np.nan)
    known = np.isin(first, kept) & np.isin(second, kept)
    rows_at, columns_at = (np.searchsorted(kept, place[known]) for place in (first, second))
    for i, j in set(zip(rows_at.tolist(), columns_at.tolist(), strict=True)):
        here = values[known][(rows_at == i) & (columns_at == j)]
        found[i, j] = found[j, i] = band_of(here).median
    if kept.size < 3 or np.isfinite(found).mean() < 0.5 * (1 - 1 / kept.size):
        return None
    more = "" if kept.size == steps.size else f" {kept.size} of {steps.size} saved steps."
    batches = len(rows["batch"].unique())
    several = f" Medians over {batches} batches." if batches > 1 else ""
    return StepMatrix(
        f"cosines-{stream}",
        f"Cosine between the {what} of two steps, {stream}",
        f"Red: above 0, blue: below 0; blank: undefined, and each step with itself.{several}{more}",
        symbol,
        kept.astype(np.float64),
        found,
    )


def _lag_lines(rows: pa.Table, kind: _Kind, group: str, index: int) -> Iterator[Line]:
    lags = rows["lag"].to_numpy()
    for number, (column, symbol, dash) in enumerate(kind.columns):
        if column not in rows.column_names:
            continue
        values = rows[column].to_numpy()
        if not np.isfinite(values).any():
            continue
        places, bands = zip(*_by_lag(lags, values), strict=True)
        middle, low, high = (
            np.array([getattr(band, end) for band in bands]) for end in ("median", "low", "high")
        )
        null = column.endswith("_null")
        color = PALETTE[index % len(PALETTE)]
        if null and not group:
            color = NULL_COLOR
        elif number and not group:
            color = PALETTE[number]
        band = (low, high) if number == 0 else (None, None)
        label = f"{symbol} {shorten(group, 20)}".strip()
        yield Line(label, np.array(places), middle, None, color, dash, *band)


def _lag_chart(kind: _Kind, stream: str, lines: Sequence[Line], rows: pa.Table) -> Chart:
    caption = [kind.caption, "Lines: medians over pairs; bands: their 10 % and 90 % quantiles."]
    shown = list(lines)
    lags = np.unique(rows["lag"].to_numpy())
    if lags.size > _MOST_LAGS:
        caption.append(f"{lags.size} lags, those near each other as one.")
    first = lines[0]
    if kind.slope is not None and first.x.size > 2 and first.y[0] > 0:
        guide = first.y[0] * (first.x / first.x[0]) ** kind.slope
        name = "−½" if kind.slope < 0 else "½"
        shown.append(Line(f"slope {name}", first.x, guide, None, "#000000", ":"))
    return Chart(
        f"lag-{kind.name}-{stream}",
        f"{kind.title}, {stream}",
        " ".join(caption),
        kind.ylabel,
        tuple(shown),
        baseline=kind.baseline,
        places="lag",
        log=kind.slope is not None,
    )


def _by_lag(lags: Values, values: Values) -> Iterator[tuple[float, Band]]:
    """The median place and the band of each lag, or of neighbouring lags on a logarithmic scale."""
    distinct = np.unique(lags)
    if distinct.size <= _MOST_LAGS:
        yield from ((float(lag), band_of(values[lags == lag])) for lag in distinct)
        return
    edges = np.geomspace(distinct[0], distinct[-1] * (1 + 1e-9), _MOST_LAGS + 1)
    places = np.searchsorted(edges, lags, side="right")
    for place in np.unique(places):
        here = places == place
        yield float(np.median(np.unique(lags[here]))), band_of(values[here])


def _largest(rows: pa.Table) -> list[str]:
    """The largest groups, in the model's order."""
    names, sizes = (rows[name].to_pylist() for name in ("group", "num_parameters"))
    size_of = dict(zip(names, sizes, strict=True))
    largest = sorted(size_of, key=lambda name: -size_of[name])[:MOST_GROUPS]
    return [name for name in size_of if name in largest]
