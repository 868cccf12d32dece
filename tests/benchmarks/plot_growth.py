"""Draw how a measurement grows, from the lines of `run.py growth`: `plot_growth.py LINES OUT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

# Per benchmark: the key that grows, and what it is called.
PANELS = {
    "growth_coordinates": ("size", "coordinates D"),
    "growth_rows": ("rows", "rows T"),
    "growth_batches": ("batches", "batches B"),
    "growth_references": ("references", "references R"),
    "growth_workers": ("workers", "workers"),
}
WITH_BATCHES = "growth_references_of_10_batches"


def draw(lines: list[dict[str, Any]], out: Path) -> None:
    """One panel for each thing that grows; dotted, growth in proportion."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 2.4), layout="constrained")
    for axis, (name, (key, label)) in zip(axes, PANELS.items(), strict=True):
        points = [(line[key], line["ratio"]) for line in lines if line["name"] == name]
        x, y = zip(*points, strict=True)
        axis.plot(x, y, "o-", markersize=4, label="1 batch" if key == "references" else None)
        if key == "references":
            more = [(line[key], line["ratio"]) for line in lines if line["name"] == WITH_BATCHES]
            axis.plot(*zip(*more, strict=True), "s-", markersize=4, label="10 batches")
            axis.legend(frameon=False, fontsize=7)
        proportion = [x[0] / value if key == "workers" else value / x[0] for value in x]
        axis.plot(x, proportion, ":", color="0.5")
        axis.set_xlabel(label)
        axis.set_xticks(x)
        axis.tick_params(labelsize=7)
        axis.set_ylim(0)
    axes[0].set_xticks([2e6, 8e6, 16e6], ["2 M", "8 M", "16 M"])
    axes[0].set_ylabel("time / first")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text().splitlines()
    draw([json.loads(line) for line in text], Path(sys.argv[2]))
