"""The figures of a table of `analyze pca`: the path, what its components explain, and when."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from analyze.charts import Chart, Dash, Line
from analyze.drawing import Picture
from analyze.figures import NULL_COLOR, PALETTE
from analyze.plane import Plane

_DRAWN = 3


def path_pictures(rows: pa.Table, words: str, slug: str) -> Iterator[Picture]:
    """Make the figures of one group of a run.

    `words` end their titles, and `slug` their names, so that those of groups stay apart.
    """
    steps = np.unique(rows["step"].to_numpy())
    components = np.unique(rows["component"].to_numpy())
    # By component and step, in the order of the table.
    table = {
        name: rows[name].to_numpy().reshape(len(components), len(steps))
        for name in ("explained", "null_walk", "null_steps", "coordinate")
    }
    shares = table["explained"][:, 0]
    times = steps.astype(np.float64)
    if len(components) > 1 and np.isfinite(table["coordinate"][1]).any():
        labels = tuple(f"component {k} ({100 * shares[k - 1]:.3g} %)" for k in (1, 2))
        yield Plane(
            f"plane{slug}",
            f"The path of the weights{words}",
            "Coordinates of w − mean(w) along the first two principal components, in one scale; "
            "in parentheses how much of the variance each explains. A random walk draws arcs too.",
            (labels[0], labels[1]),
            times,
            *table["coordinate"][:2],
        )
    places = components.astype(np.float64)
    told: tuple[tuple[str, str, str, Dash], ...] = (
        ("explained", "this path", PALETTE[0], "-"),
        ("null_walk", "long random walk", NULL_COLOR, "--"),
        ("null_steps", "orthogonal steps of these lengths", "#000000", ":"),
    )
    yield Chart(
        f"explained{slug}",
        f"Variance that components explain, beside a random walk{words}",
        "A component says something where it explains more than both nulls: 6/(π²k²) of a long "
        "random walk, and orthogonal steps as many and as long as those between the saved rows.",
        "share of the variance",
        tuple(Line(label, places, table[key][:, 0], None, c, d) for key, label, c, d in told),
        places="component",
    )
    drawn = [
        Line(f"component {k + 1}", times, table["coordinate"][k], None, PALETTE[k])
        for k in range(min(_DRAWN, len(components)))
        if np.isfinite(table["coordinate"][k]).any()
    ]
    if drawn:
        yield Chart(
            f"coordinates{slug}",
            f"Coordinates along the components{words}",
            "Of a long random walk, component k is a cosine with k half-waves over the training.",
            "coordinate",
            tuple(drawn),
            named=True,
        )
