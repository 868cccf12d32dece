"""What `analyze pca` prints: how straight the path is, and its components beside a walk's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analyze.quantities import Values, ratio
from analyze.tables import read_metadata
from analyze.text_table import NONE, aligned, wrapped

_SHOWN = 5
_MOST_GROUPS = 24
_HEAD = ("group", "k", "explained", "walk", "own steps")


def path_summary(table: pa.Table) -> str:
    """Summarise a table of `analyze.path_table.build_path`; several lines of plain text."""
    (entry,) = read_metadata(table)["runs"]
    steps = np.unique(table["step"].to_numpy())
    lines = [
        f"{entry['run']}   {len(steps)} rows of weights, t = {steps[0]} to {steps[-1]}   "
        f"D = {entry['num_parameters']:,}"
    ]
    cells: list[tuple[str, ...]] = [_HEAD]
    notes = []
    names = table["group"].unique().to_pylist()
    for name in names[:_MOST_GROUPS]:
        rows = table.filter(pc.equal(table["group"], name))
        cells += _components(rows, name)
        notes.append(_length(rows, name))
        notes += _left_out(rows, name)
    lines += aligned(cells)
    if len(names) > _MOST_GROUPS:
        lines.append(f"and {len(names) - _MOST_GROUPS} groups more, in the table")
    for note in (*notes, _EXPLANATION):
        lines += wrapped(note)
    return "\n".join(lines)


_EXPLANATION = (
    "walk: 6/(π²k²) of a long random walk; own steps: orthogonal steps as many and as long as "
    "those between this run's rows. A component says something where it explains more than both."
)


def _components(rows: pa.Table, name: str) -> Iterator[tuple[str, ...]]:
    first = rows.filter(pc.equal(rows["step"], rows["step"][0]))
    for place in range(min(_SHOWN, first.num_rows)):
        shares = (first[key][place].as_py() for key in ("explained", "null_walk", "null_steps"))
        component = str(first["component"][place].as_py())
        yield (name if place == 0 else "", component, *map(_percent, shares))


def _left_out(rows: pa.Table, name: str) -> list[str]:
    """Say which weights are not finite: nothing of theirs counts."""
    bad = np.unique(rows["step"].to_numpy()[np.isnan(rows["coordinate"].to_numpy())])
    if not len(bad):
        return []
    return [
        f"{name}: {len(bad)} rows have no finite distance to another, the first at t = {bad[0]}, "
        "and are left out"
    ]


def _length(rows: pa.Table, name: str) -> str:
    walked, updated, displaced = (
        _last(rows[key].to_numpy()) for key in ("walked", "updated", "displaced")
    )
    between = ratio(displaced, walked)[0]
    text = (
        f"{name}: ‖w_last - w_first‖ {displaced[0]:.3g}, over the saved rows a way of "
        f"{walked[0]:.3g} (straightness {between:.3g})"
    )
    if not np.isfinite(updated[0]):
        return f"{text}; norms of every update were not recorded"
    straight = ratio(displaced, updated)[0]
    return f"{text}, Σ‖u‖ {updated[0]:.3g} (straightness {straight:.3g})"


def _last(values: Values) -> Values:
    """The last finite one, ``[1]``; NaN without any."""
    known = values[np.isfinite(values)]
    return known[-1:] if len(known) else np.full(1, np.nan)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if np.isfinite(share) else NONE
