"""A small run for the tests of `analyze.gram`, and its products by dense float64 numpy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from analyze.gram import Gram
from capture.store import layout
from tests.analyze.small_runs import random_streams

Values = NDArray[Any]

SIZES = (60, 1, 0, 200, 39)
# Not contiguous: the first and the fourth tensor are one group.
GROUPS = np.array([0, 1, 1, 0, 2])
STREAMS = random_streams(300, rows=9, batches=3)
# Inner chunks of so many bytes make several of a row of 300 coordinates.
CHUNK_BYTES = 256
# Sums of 300 products of float64; what cancels does so in the dense sums as well.
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def dense(
    streams: dict[str, Values], name: str, pairs: Values, sizes: tuple[int, ...], groups: Values
) -> dict[str, Values]:
    """Every sum of every pair, batch and group, one at a time: ``[N, B, K]``."""
    group_of = np.repeat(groups, sizes)
    w = streams["weights"].astype(np.float64)
    g = streams[name].astype(np.float64)
    g = g[:, None] if g.ndim == 2 else g
    found: dict[str, list[list[list[float]]]] = {k: [] for k in ("dd", "gg", "gd", "dg", "hh")}
    for i, j in pairs:
        for sums in found.values():
            sums.append([[] for _ in range(g.shape[1])])
        for b in range(g.shape[1]):
            for k in range(groups.max() + 1):
                at = group_of == k
                d, gi, gj = (w[i] - w[j])[at], g[i, b][at], g[j, b][at]
                h = gi - gj
                for key, value in {
                    "dd": d @ d,
                    "gg": gi @ gj,
                    "gd": gi @ d,
                    "dg": -(gj @ d),
                    "hh": h @ h,
                }.items():
                    found[key][-1][b].append(value)
    return {key: np.array(value) for key, value in found.items()}


def same_bytes(left: Gram, right: Gram) -> bool:
    crossed = [g.batch_sums for g in (left, right) if g.batch_sums is not None]
    return all(
        left.sums[name].tobytes() == right.sums[name].tobytes() for name in left.sums
    ) and len({values.tobytes() for values in crossed}) in (0, 1)


@contextmanager
def small_chunks() -> Iterator[None]:
    """Cut small runs into several inner chunks, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "TARGET_CHUNK_BYTES", CHUNK_BYTES)
        yield
