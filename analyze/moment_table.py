"""The moments of a run as numbers: what they are called, and how they lie in memory.

Axes: T saved steps, B batches, R references, P tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# ⟨g,e⟩ ‖g‖² ‖e‖² Σg²e² ⟨g,w⟩ ⟨w,e⟩ ‖w‖², with e = w - w*.
MOMENTS = ("ge", "gg", "ee", "g2e2", "gw", "we", "ww")
GEOMETRY = ("ge", "gg", "ee")
WITHOUT_GRADIENT = ("ee", "we", "ww")

# What is left to sum where the rest is known: for another gradient at the same w and w*, for the
# same gradient against another w*, and for both.
NEXT_GRADIENT = ("ge", "gg", "g2e2", "gw")
NEXT_REFERENCE = ("ge", "ee", "g2e2", "we")
NEXT_BOTH = ("ge", "g2e2")


@dataclass(frozen=True)
class StreamMoments:
    """The moments of one stream of a run, by tensor.

    `steps` is int64 ``[T]``, `batches` B or `None`. `array` is float64 ``[T, R, P, 7]``, or
    ``[T, B, R, P, 7]`` where the stream has batches, in the order of `MOMENTS` and NaN where one
    was not asked for. `nonfinite` is int64 without the last axis: coordinates of w, g or w* that
    are NaN or infinite. In the stream `updates`, u stands in the place of g; `weights` has ⟨e,e⟩,
    ⟨w,e⟩ and ⟨w,w⟩ only.
    """

    stream: str
    steps: NDArray[np.int64]
    batches: int | None
    array: NDArray[np.float64]
    nonfinite: NDArray[np.int64]


@dataclass(frozen=True)
class Moments:
    """The moments of one run: the references as typed, and each stream by name."""

    references: tuple[str, ...]
    streams: Mapping[str, StreamMoments]
